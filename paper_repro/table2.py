"""Table 2: perplexity of language models whose linear layers are held in each 4-bit data type."""

from __future__ import annotations

import math
from pathlib import Path

from paper_repro.harness import published
from paper_repro.harness.experiment import Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.harness.panels import panels
from paper_repro.harness.stats import Interval, gap
from paper_repro.materials import model
from paper_repro.measures import perplexity
from paper_repro.measures.in_data_type import BASE, DATA_TYPES, LABELS, MODELS, NF4, NF4_DQ

# The paper's Table 2: mean perplexity on Pile-CC, by the names that it prints.
_PRINTED = {NF4_DQ: "NF4 + DQ", "e3m0": "Float4 (E3M0)", "e2m1": "Float4 (E2M1)", "int4": "Int4"}
PAPER = {
    variant: float(published.by_name(published.TABLE2)[name][0])
    for variant, name in _PRINTED.items()
}
WORSE = ("fp4", "e2m1", "int4", "e3m0")
DQ_MOST = 0.005


def run(lab: Lab) -> Result:
    return {
        "blocksize": DATA_TYPES[NF4].blocksize,
        "models": {name: perplexity.in_each(lab, name, DATA_TYPES) for name in MODELS},
    }


def _ppl(result: Result, name: str, variant: str) -> float:
    return result["models"][name]["perplexity"][variant]["perplexity"]


def _above(result: Result, name: str, variant: str, other: str) -> Interval:
    """Nats per token of one data type above another, and the 95 % interval over articles."""
    found = result["models"][name]["perplexity"]
    return gap(found[variant], found[other])


def _nf4_is_best(result: Result, name: str) -> bool:
    return all(_above(result, name, other, NF4_DQ).low > 0 for other in WORSE)


def show_nf4(result: Result, name: str) -> str:
    others = [
        f"{LABELS[v]} {_ppl(result, name, v):.2f} ({_above(result, name, v, NF4_DQ)} nats)"
        for v in WORSE
    ]
    return f"{_ppl(result, name, NF4_DQ):.2f}; above it: {', '.join(others)}"


def _dq_change(result: Result, name: str) -> float:
    return _ppl(result, name, NF4_DQ) / _ppl(result, name, NF4) - 1


def show_order(result: Result, name: str) -> str:
    order = sorted(PAPER, key=lambda v: _ppl(result, name, v))
    return " < ".join(f"{LABELS[v]} {_ppl(result, name, v):.2f}" for v in order)


def show_claims(name: str) -> tuple[Claim, ...]:
    """What is claimed of each of the two models."""
    where = f" ({MODELS[name]})"
    return (
        Claim(
            statement="Table 2: NF4 + DQ has the lowest perplexity of the 4-bit data types" + where,
            paper=", ".join(f"{value} ({LABELS[variant]})" for variant, value in PAPER.items()),
            criterion=f"{', '.join(LABELS[v] for v in WORSE)} above NF4 + DQ, the 95 % interval of each "
            "difference above zero",
            passes=lambda r: _nf4_is_best(r, name),
            measured=lambda r: show_nf4(r, name),
            trend=True,
        ),
        Claim(
            statement="Double quantization does not degrade perplexity (section 3)" + where,
            paper="no loss",
            criterion=f"NF4 + DQ within {DQ_MOST:.1%} of NF4's perplexity",
            passes=lambda r: abs(_dq_change(r, name)) <= DQ_MOST,
            measured=lambda r: (
                f"{_dq_change(r, name):+.2%} ({_above(r, name, NF4_DQ, NF4)} nats per token)"
            ),
            trend=True,
        ),
        Claim(
            statement="Table 2: E3M0 lies between NF4 + DQ and E2M1" + where,
            paper=" < ".join(LABELS[variant] for variant in PAPER),
            criterion="none: known to turn round on small models",
            passes=None,
            measured=lambda r: show_order(r, name),
        ),
    )


CLAIMS = tuple(claim for name in MODELS for claim in show_claims(name))


def section(result: Result) -> str:
    tables = "\n\n".join(show_model(result, name) for name in result["models"])
    return (
        "Linear layers only, fp32 arithmetic, the same tokens for every data type. Intervals are 95 %, by a "
        "bootstrap that draws articles anew. Other models and another text than the paper's: compare the "
        f"order, not the values.\n\n{tables}\n\n{MODELS['smollm2']}: {model.ORIGIN}. The {MODELS['own']} was "
        "trained here in fp32 and never quantized before."
    )


def show_model(result: Result, name: str) -> str:
    """The table of one model, the data types from the best to the worst."""
    of = result["models"][name]
    rows = []
    for variant in sorted(of["perplexity"], key=lambda v: _ppl(result, name, v)):
        is_base = variant == BASE
        rows.append(
            (
                LABELS[variant],
                "-" if is_base else f"{of['perplexity'][variant]['weight_rmse']:.2%}",
                f"{_ppl(result, name, variant):.2f}",
                "-" if is_base else _above(result, name, variant, BASE),
                "-" if variant == NF4_DQ else _above(result, name, variant, NF4_DQ),
                f"{PAPER[variant]:.2f}" if variant in PAPER else "-",
            )
        )
    header = ["linear layers in", "relative RMSE of weights", "perplexity", "nats above base"]
    header += ["nats above NF4 + DQ", "paper, Pile-CC"]
    return (
        f"**{MODELS[name]}** on {of['perplexity'][BASE]['tokens']:,} predicted tokens of Wikipedia prose: "
        f"{of['windows']} windows of {of['window_tokens']} tokens from {of['articles']} articles; blocks of "
        f"{result['blocksize']}.\n\n{table(header, rows)}"
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    order = [BASE, NF4, *PAPER, "fp4"]
    found = {"paper, Pile-CC": show_paper()}
    for name in result["models"]:
        found[MODELS[name]] = {LABELS[v]: _above(result, name, v, "int4") for v in order}
    path = panels(
        folder / "table2.svg",
        [LABELS[variant] for variant in order],
        found,
        xlabel="nats per token above Int4 (to the left is better)",
        line=0,
    )
    caption = "Log-perplexity of each data type relative to Int4, with 95 % intervals; each panel has its own scale"
    return {caption: path}


def show_paper() -> dict[str, Interval]:
    """The paper's values, which come without intervals and without the base."""
    above = {variant: math.log(value / PAPER["int4"]) for variant, value in PAPER.items()}
    return {LABELS[variant]: Interval(nats, nats, nats) for variant, nats in above.items()}


def lessons(result: Result) -> list[str]:
    """What an error of the weights costs in two models."""
    costs = [
        f"{_above(result, name, NF4_DQ, BASE).mean:.3f} nats per token in {MODELS[name]} at a relative RMSE of "
        f"{result['models'][name]['perplexity'][NF4_DQ]['weight_rmse']:.1%}"
        for name in result["models"]
    ]
    return [f"What NF4 + DQ costs beside the error that it makes: {' and '.join(costs)}."]


EXPERIMENT = Experiment(
    "table2",
    "Table 2: perplexity by 4-bit data type",
    (2, 6),
    run,
    CLAIMS,
    section,
    plots,
    lessons=lessons,
)
