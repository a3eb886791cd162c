"""Tables 3 and 4 in trend: LoRA over a base as it is, and in NF4 + DQ, FP4 and Int4, with several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_repro.harness import draw, published, stats
from paper_repro.harness.experiment import Claim, Experiment, Result, seeds_in_words, table
from paper_repro.harness.lab import Lab
from paper_repro.measures import lora_runs
from paper_repro.measures.lora_runs import BASES, DENSE, LABELS, NF4_DQ, Run

RATES = {"smollm2": 1e-3, "own": 1e-2}

# Table 4, MMLU's mean over four sizes and two datasets; Table 3, RougeL of T5 with 80M to 11B.
_TABLE4, _TABLE3 = map(published.by_name, (published.TABLE4, published.TABLE3))
TABLE4 = {
    base: _TABLE4[name][-1]
    for base, name in {DENSE: "BF16", "fp4": "Float4", NF4_DQ: "NF4 + DQ"}.items()
}
TABLE3 = {
    base: _TABLE3[name][1:]
    for base, name in {DENSE: "LoRA BF16", "fp4": "QLoRA FP4", NF4_DQ: "QLoRA NF4 + DQ"}.items()
}


def run(lab: Lab) -> Result:
    seeds = [0, 1, 2]
    subjects = {"smollm2": lora_runs.smollm2(lab), "own": lora_runs.own(lab)}
    # A quick run has no time for all four on SmolLM2.
    bases = {"smollm2": lab.choose((DENSE, NF4_DQ), tuple(BASES)), "own": tuple(BASES)}
    models = {}
    for key, subject in subjects.items():
        runs = {base: [Run(base, RATES[key], seed) for seed in seeds] for base in bases[key]}
        models[subject.name] = {
            "task": subject.task.name,
            "steps": subject.recipe.steps,
            "batch": subject.recipe.batch_size,
            "learning_rate": RATES[key],
            "before": {base: lora_runs.before(lab, subject, base) for base in runs},
            "after": {
                base: [lora_runs.after(lab, subject, run) for run in of_base]
                for base, of_base in runs.items()
            },
        }
    return {"seeds": seeds, "rank": Run(NF4_DQ, 0.0, 0).rank, "models": models}


def _after(model: dict[str, Any], base: str) -> list[float]:
    """Nats per token of each seed."""
    return [run["held_out"]["nll"] for run in model["after"][base]]


def _gaps(model: dict[str, Any], base: str) -> list[float]:
    """Nats per token above LoRA on the base that is not quantized, seed by seed."""
    return [a - b for a, b in zip(_after(model, base), _after(model, DENSE), strict=True)]


def _gap_before(model: dict[str, Any], base: str) -> float:
    return model["before"][base]["nll"] - model["before"][DENSE]["nll"]


def towards_lora(model: dict[str, Any]) -> list[float]:
    """Share of the way from NF4 + DQ, untrained, to LoRA on the unquantized base, seed by seed."""
    start = model["before"][NF4_DQ]["nll"]
    pairs = zip(_after(model, NF4_DQ), _after(model, DENSE), strict=True)
    return [(start - ours) / (start - goal) for ours, goal in pairs]


def gap_closed(model: dict[str, Any]) -> list[float]:
    """Share of the gap between NF4 + DQ and its base that is gone when both are fine-tuned, seed by seed."""
    return [1 - gap / _gap_before(model, NF4_DQ) for gap in _gaps(model, NF4_DQ)]


RECOVERED_LEAST, SIGNIFICANT, OTHERS = 0.6, 0.05, ("fp4", "int4")


def _others(model: dict[str, Any]) -> list[str]:
    """FP4 and Int4, where they were run."""
    return [base for base in model["after"] if base in OTHERS]


def _is_nearest_everywhere(result: Result) -> bool | None:
    """On each model that has the other bases; None if none has."""
    judged = [model for model in result["models"].values() if _others(model)]
    return all(map(_nf4_is_nearest, judged)) if judged else None


def _nf4_is_nearest(model: dict[str, Any]) -> bool:
    """By every seed and by the test."""
    ours = _after(model, NF4_DQ)
    return all(
        max(a - b for a, b in zip(ours, _after(model, other), strict=True)) < 0
        and stats.paired_p(ours, _after(model, other)) < SIGNIFICANT
        for other in _others(model)
    )


def _each(result: Result, words: Any) -> str:
    return "; ".join(f"{name}: {words(model)}" for name, model in result["models"].items())


def _nearest_in_words(model: dict[str, Any]) -> str:
    others = _others(model)
    gaps = ", ".join(
        f"{LABELS[base]} {stats.spread(_gaps(model, base)).mean:+.4f}" for base in (NF4_DQ, *others)
    )
    if not others:
        return f"{gaps} nats (the others by --full)"
    tests = {base: stats.paired_p(_after(model, NF4_DQ), _after(model, base)) for base in others}
    words = ", ".join(f"{LABELS[base]} {stats.p_in_words(p)}" for base, p in tests.items())
    return f"{gaps} nats (p: {words})"


def _percents(shares: list[float]) -> str:
    return " / ".join(f"{share:.0%}" for share in shares)


def _left(model: dict[str, Any]) -> str:
    gaps = _gaps(model, NF4_DQ)
    p = stats.paired_p(_after(model, NF4_DQ), _after(model, DENSE))
    return f"{stats.spread(gaps).mean:+.4f} ± {stats.spread(gaps).deviation:.4f} nats (p {stats.p_in_words(p)})"


CLAIMS = (
    Claim(
        statement="Tables 3 and 4: fine-tuned through NF4 + DQ a model ends nearer to 16-bit LoRA than through FP4, and "
        "here than through Int4",
        paper=f"MMLU, mean: NF4 + DQ {TABLE4[NF4_DQ]}, FP4 {TABLE4['fp4']}, 16 bits {TABLE4[DENSE]}",
        criterion="on each model with these bases NF4 + DQ ends below FP4 and Int4 with each seed, and the paired "
        f"t-test over seeds has p < {SIGNIFICANT}",
        passes=_is_nearest_everywhere,
        measured=lambda r: _each(r, _nearest_in_words),
        trend=True,
    ),
    Claim(
        statement="Tables 3 and 4: LoRA through NF4 + DQ reaches LoRA on the unquantized base",
        paper="parity",
        criterion="none: most of the way from NF4 + DQ untrained is learning the task, which any base does",
        passes=None,
        measured=lambda r: _each(r, lambda m: f"{_percents(towards_lora(m))} of the way"),
    ),
    Claim(
        statement="Section 4: fine-tuning recovers what 4-bit quantization lost",
        paper="all of it",
        criterion=f"on both models and with each seed at least {RECOVERED_LEAST:.0%} of the gap in log-perplexity "
        "between NF4 + DQ and the base is gone after both have been fine-tuned alike",
        passes=lambda r: all(min(gap_closed(m)) >= RECOVERED_LEAST for m in r["models"].values()),
        measured=lambda r: _each(
            r, lambda m: f"{_percents(gap_closed(m))} of {_gap_before(m, NF4_DQ):.4f} nats"
        ),
        trend=True,
    ),
    Claim(
        statement="Tables 3 and 4: NF4 + DQ equals 16-bit LoRA",
        paper="equal within noise, 7B and up",
        criterion="none: not expected of models this small",
        passes=None,
        measured=lambda r: _each(r, _left),
    ),
)


def section(result: Result) -> str:
    parts = [
        f"LoRA of rank {result['rank']} on all linear layers, {len(result['seeds'])} seeds "
        f"({seeds_in_words(result)}: the adapter's start and the order of examples). All bases are "
        "trained alike, on the same examples, each seen once, and measured on the same held-out tokens; none of "
        "them shares its headword or article with the training data. *Gap*: nats per token above LoRA on the "
        "unquantized base, mean and standard deviation over seeds, p of the paired t-test over seeds, and the 95 % "
        "interval of a bootstrap over held-out batches, seed by seed in one."
    ]
    for name, model in result["models"].items():
        tokens = model["before"][DENSE]["tokens"]
        parts += [
            f"**{name}**, {model['task']}, {model['steps']} steps of {model['batch']}, learning rate "
            f"{model['learning_rate']:g}, perplexity on {tokens:,} tokens:",
            show_model(model),
        ]
    parts += [
        "Where the gap before training is no larger than the spread over seeds, as of a model that quantization "
        "hardly harms, shares of it mean little. The learning rates were fixed before these runs, the same for all "
        "bases: SmolLM2's in a pilot on other text, the own model's by its loss on validation records.",
        "The paper's, of other models, data and measures:",
        show_paper(),
    ]
    return "\n\n".join(parts)


def show_model(model: dict[str, Any]) -> str:
    rows = []
    for base in model["after"]:
        after = stats.spread([run["held_out"]["perplexity"] for run in model["after"][base]])
        before = model["before"][base]["perplexity"]
        rows.append((LABELS[base], f"{before:.2f}", str(after), *_show_gap(model, base)))
    header = ["base", "before", "after", "gap before", "gap after", "p", "95 % interval"]
    return table(header, rows)


def _show_gap(model: dict[str, Any], base: str) -> tuple[str, ...]:
    if base == DENSE:
        return ("-",) * 4
    gaps = stats.spread(_gaps(model, base))
    p = stats.paired_p(_after(model, base), _after(model, DENSE))
    between = _pooled(model, base)
    return (
        f"{_gap_before(model, base):.4f}",
        f"{gaps.mean:.4f} ± {gaps.deviation:.4f}",
        stats.p_in_words(p),
        f"{between.low:.4f} to {between.high:.4f}",
    )


def _pooled(model: dict[str, Any], base: str) -> stats.Interval:
    """The gap after training, each held-out batch as its mean over seeds."""
    mean = [_mean_parts(model["after"][which]) for which in (base, DENSE)]
    return stats.gap(*mean)


def _mean_parts(runs: list[dict[str, Any]]) -> dict[str, Any]:
    parts = zip(*(run["held_out"]["parts"] for run in runs), strict=True)
    return {"parts": [(sum(nll for nll, _ in p) / len(p), p[0][1]) for p in parts]}


def show_paper() -> str:
    sizes = ["80M", "250M", "780M", "3B", "11B"]
    header = ["base", "Table 4: MMLU, mean", *(f"Table 3: T5 {size}, RougeL" for size in sizes)]
    rows = [
        (LABELS[base] if base != DENSE else "16 bits", TABLE4[base], *TABLE3[base])
        for base in TABLE4
    ]
    return table(header, rows)


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "tables34.svg"
    with draw.panels(path, 1 + len(result["models"]), width=8.4) as (paper, *panels):
        show_losses_of_paper(paper)
        for panel, (name, model) in zip(panels, result["models"].items(), strict=True):
            show_gaps(panel, name, model)
    caption = (
        "What 4 bits cost before fine-tuning (light) and after it, against LoRA on the unquantized base "
        "(colour; a dot for each seed), and what the paper has after it"
    )
    return {caption: path}


def show_losses_of_paper(panel: Any) -> None:
    for place, base in enumerate((NF4_DQ, "fp4")):
        lost = float(TABLE4[DENSE]) - float(TABLE4[base])
        panel.bar(place, lost, 0.7, color=draw.GREY)
        panel.text(place, max(lost, 0), f"{lost:.1f}", ha="center", va="bottom", color=draw.GREY)
    panel.set_xticks([0, 1], [LABELS[NF4_DQ], LABELS["fp4"]])
    panel.set_title("paper, Table 4", fontsize=10)
    panel.set_ylabel("MMLU points below 16 bits, mean")
    panel.margins(y=0.15)


def show_gaps(panel: Any, name: str, model: dict[str, Any]) -> None:
    bases = [base for base in model["after"] if base != DENSE]
    for place, base in enumerate(bases):
        before, gaps = _gap_before(model, base), _gaps(model, base)
        color = draw.ORANGE if base == NF4_DQ else draw.BLUE
        panel.bar(place - 0.2, before, 0.38, color=draw.LIGHT)
        panel.bar(place + 0.2, stats.spread(gaps).mean, 0.38, color=color)
        panel.scatter([place + 0.2] * len(gaps), gaps, color="black", s=8, zorder=3)
        panel.text(place - 0.2, before, f"{before:.3f}", ha="center", va="bottom", fontsize=9)
    panel.set_xticks(range(len(bases)), [LABELS[base] for base in bases])
    panel.set_xlim(-0.7, max(len(bases), 2) - 0.3)
    panel.set_title(name, fontsize=10)
    panel.set_ylabel("nats above the unquantized base")
    panel.margins(y=0.12)


EXPERIMENT = Experiment(
    "tables34",
    "Tables 3 and 4: fine-tuning through 4 bits",
    (4.3, 24),
    run,
    CLAIMS,
    section,
    plots,
)
