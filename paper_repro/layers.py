"""Figure 2: which layers an adapter must be on."""

from __future__ import annotations

from pathlib import Path

from paper_repro.harness import draw, stats
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.measures import lora_runs, tuned
from paper_repro.measures.lora_runs import NF4_DQ, Run

ATTENTION, FEED_FORWARD = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("gate_proj", "up_proj", "down_proj"),
)
TARGETS: dict[str, str | tuple[str, ...]] = {
    "all": "all-linear",
    "feed-forward": FEED_FORWARD,
    "attention": ATTENTION,
    "q, v": ("q_proj", "v_proj"),
}


def run(lab: Lab) -> Result:
    seeds = lab.choose([0, 1, 2], [0, 1, 2, 3, 4])
    subject = lora_runs.own(lab)
    kinds = {name: Run(NF4_DQ, 0.0, 0, targets=targets) for name, targets in TARGETS.items()}
    return {
        "model": subject.name,
        "task": subject.task.name,
        "seeds": seeds,
        "rank": kinds["all"].rank,
        "targets": {name: tuned.tuned(lab, subject, kind, seeds) for name, kind in kinds.items()},
    }


def _perplexities(result: Result, name: str) -> list[float]:
    return tuned.perplexities(result["targets"][name])


def _above_all(result: Result, name: str) -> list[float]:
    """By how much perplexity is above that of adapters on all layers, seed by seed."""
    pairs = zip(_perplexities(result, name), _perplexities(result, "all"), strict=True)
    return [other / every - 1 for other, every in pairs]


WORSE_LEAST = 0.02

CLAIMS = (
    Claim(
        statement="Figure 2: adapters on query and value alone do not do; all layers are needed",
        paper="all layers reach 16-bit fine-tuning, query and value fall short (LLaMA-7B, Alpaca)",
        criterion=f"with each seed adapters on q, v end more than {WORSE_LEAST:.0%} of perplexity above adapters on "
        "all layers, the learning rate chosen for each",
        passes=lambda r: min(_above_all(r, "q, v")) > WORSE_LEAST,
        measured=lambda r: " / ".join(f"{share:+.1%}" for share in _above_all(r, "q, v")),
        trend=True,
    ),
    Claim(
        statement="Figure 2: one kind of layer is not enough: attention, or feed-forward",
        paper="both below all layers",
        criterion="none: the two have other numbers of parameters",
        passes=None,
        measured=lambda r: ", ".join(
            f"{name} {stats.spread(_above_all(r, name)).mean:+.1%}"
            for name in ("attention", "feed-forward")
        ),
    ),
)


def section(result: Result) -> str:
    rows = []
    for name, found in result["targets"].items():
        rows.append(
            (
                name,
                f"{found['runs'][0]['adapter_parameters']:,}",
                tuned.rate_in_words(found),
                str(stats.spread(_perplexities(result, name))),
                *show_against_all(result, name),
            )
        )
    header = ["adapters on", "parameters", "learning rate", "perplexity", "against all", "p"]
    return (
        f"The {result['model']}, {result['task']}, NF4 + DQ, rank {result['rank']}. "
        f"{tuned.protocol_in_words(result)}; p of the paired t-test.\n\n" + table(header, rows)
    )


def show_against_all(result: Result, name: str) -> tuple[str, str]:
    if name == "all":
        return "-", "-"
    p = stats.paired_p(_perplexities(result, name), _perplexities(result, "all"))
    return f"{stats.spread(_above_all(result, name)).mean:+.1%}", stats.p_in_words(p)


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "layers.svg"
    with draw.figure(path, height=3.2) as axes:
        for place, name in enumerate(result["targets"]):
            values = _perplexities(result, name)
            color = draw.ORANGE if name == "all" else draw.BLUE
            axes.scatter(values, [-place] * len(values), color=color, s=28, zorder=3, alpha=0.8)
            mean = sum(values) / len(values)
            axes.text(mean, -place + 0.18, f"{mean:.2f}", ha="center", color=draw.GREY)
        axes.set_yticks([-i for i in range(len(result["targets"]))], list(result["targets"]))
        axes.set(xlabel="held-out perplexity", ylabel="adapters on")
        axes.set_ylim(0.6 - len(result["targets"]), 0.6)
        axes.grid(axis="x", alpha=0.3)
    return {
        "Perplexity by the layers that have adapters, a dot for each seed (the paper's Figure 2 has RougeL, without "
        "printed values)": path
    }


EXPERIMENT = Experiment(
    "layers",
    "Figure 2: which layers need adapters",
    (1.1, 2),
    run,
    CLAIMS,
    section,
    plots,
)
