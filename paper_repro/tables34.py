"""Tables 3 and 4 in trend: LoRA over bases in 16 bits' stead, NF4 + DQ, FP4 and Int4, with several seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_repro.harness import draw, stats
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.measures import lora_runs
from paper_repro.measures.lora_runs import BASES, DENSE, LABELS, NF4, Run

RATES = {"smollm2": 1e-3, "own": 1e-2}

# Table 4, MMLU's mean over four sizes and two datasets; Table 3, RougeL of T5 with 80M to 11B.
TABLE4 = {DENSE: 53.0, "fp4": 52.2, NF4: 53.1}
TABLE3 = {
    DENSE: (40.5, 42.6, 47.1, 55.4, 60.7),
    "fp4": (40.3, 42.4, 47.5, 55.6, 60.9),
    NF4: (40.4, 42.7, 47.7, 55.3, 60.9),
}


def run(lab: Lab) -> Result:
    seeds = [0, 1, 2]
    subjects = {"smollm2": lora_runs.smollm2(lab), "own": lora_runs.own(lab)}
    # A quick run has no time for all four on SmolLM2.
    bases = {"smollm2": lab.choose((DENSE, NF4), tuple(BASES)), "own": tuple(BASES)}
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
    return {"seeds": seeds, "rank": Run(NF4, 0.0, 0).rank, "models": models}


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
    start = model["before"][NF4]["nll"]
    pairs = zip(_after(model, NF4), _after(model, DENSE), strict=True)
    return [(start - ours) / (start - goal) for ours, goal in pairs]


def gap_closed(model: dict[str, Any]) -> list[float]:
    """Share of the gap between NF4 + DQ and its base that is gone when both are fine-tuned, seed by seed."""
    return [1 - gap / _gap_before(model, NF4) for gap in _gaps(model, NF4)]


RECOVERED_LEAST, SIGNIFICANT, OTHERS = 0.6, 0.05, ("fp4", "int4")


def _others(model: dict[str, Any]) -> list[str]:
    """FP4 and Int4, where they were run."""
    return [base for base in model["after"] if base in OTHERS]


def _nf4_is_nearest(model: dict[str, Any]) -> bool:
    """By every seed and by the test; a model without the other bases says nothing against it."""
    ours = _after(model, NF4)
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
        f"{LABELS[base]} {stats.spread(_gaps(model, base)).mean:+.4f}" for base in (NF4, *others)
    )
    if not others:
        return f"{gaps} nats (the others by --full)"
    p = max(stats.paired_p(_after(model, NF4), _after(model, other)) for other in others)
    return f"{gaps} nats (p at most {stats.p_in_words(p)})"


def _percents(shares: list[float]) -> str:
    return " / ".join(f"{share:.0%}" for share in shares)


def _left(model: dict[str, Any]) -> str:
    gaps = _gaps(model, NF4)
    p = stats.paired_p(_after(model, NF4), _after(model, DENSE))
    return f"{stats.spread(gaps).mean:+.4f} ± {stats.spread(gaps).deviation:.4f} nats (p {stats.p_in_words(p)})"


CLAIMS = (
    Claim(
        statement="Tables 3 and 4: fine-tuned through NF4 + DQ a model ends nearer to 16-bit LoRA than through FP4",
        paper="MMLU, mean: NF4 + DQ 53.1, FP4 52.2, 16 bits 53.0",
        criterion="on each model with these bases NF4 + DQ ends below FP4 and Int4 with each seed, and the paired t-test over seeds "
        f"has p < {SIGNIFICANT}",
        passes=lambda r: all(map(_nf4_is_nearest, r["models"].values())),
        measured=lambda r: _each(r, _nearest_in_words),
        trend=True,
    ),
    Claim(
        statement="Tables 3 and 4: LoRA through NF4 + DQ reaches LoRA on the unquantized base",
        paper="parity",
        criterion=f"on both models and with each seed at least {RECOVERED_LEAST:.0%} of the way in log-perplexity, "
        "from NF4 + DQ untrained to LoRA on the unquantized base",
        passes=lambda r: all(min(towards_lora(m)) >= RECOVERED_LEAST for m in r["models"].values()),
        measured=lambda r: _each(r, lambda m: _percents(towards_lora(m))),
        trend=True,
    ),
    Claim(
        statement="Section 4: fine-tuning recovers what 4-bit quantization lost",
        paper="all of it",
        criterion=f"on both models and with each seed at least {RECOVERED_LEAST:.0%} of the gap in log-perplexity "
        "between NF4 + DQ and the base is gone after both have been fine-tuned alike",
        passes=lambda r: all(min(gap_closed(m)) >= RECOVERED_LEAST for m in r["models"].values()),
        measured=lambda r: _each(r, lambda m: _percents(gap_closed(m))),
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
        f"({', '.join(map(str, result['seeds']))}: the adapter's start and the order of examples). All bases are "
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
    parts += ["The paper's, of other models, data and measures:", show_paper()]
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
    with draw.figure(path, height=3.8) as axes:
        for number, (name, model) in enumerate(result["models"].items()):
            for place, base in enumerate(b for b in model["after"] if b != DENSE):
                x = number * 4 + place
                color = draw.ORANGE if base == NF4 else draw.BLUE
                before, gaps = _gap_before(model, base), _gaps(model, base)
                axes.bar(x, before, 0.7, color=draw.LIGHT)
                axes.bar(x, sum(gaps) / len(gaps), 0.7, color=color)
                axes.scatter([x] * len(gaps), gaps, color="black", s=10, zorder=3)
                axes.text(x, before, f"{before:.3f}", ha="center", va="bottom", color=draw.GREY)
                axes.text(
                    x,
                    -0.03,
                    LABELS[base],
                    ha="center",
                    va="top",
                    color=color,
                    transform=axes.get_xaxis_transform(),
                )
            axes.text(
                number * 4 + 1,
                -0.12,
                name,
                ha="center",
                va="top",
                transform=axes.get_xaxis_transform(),
            )
        axes.set(ylabel="nats per token above\nthe unquantized base", xticks=[])
    caption = (
        "What 4 bits cost before fine-tuning (light) and after it, against LoRA on the unquantized base "
        "(colour; a dot for each seed)"
    )
    return {caption: path}


EXPERIMENT = Experiment(
    "tables34",
    "Tables 3 and 4: fine-tuning through 4 bits",
    (9, 32),
    run,
    CLAIMS,
    section,
    plots,
)
