"""Appendix F: are a hidden unit's weights normal? Shapiro and Wilk's test, and a Gaussian control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.harness import draw
from paper_repro.harness.draw import BLUE, GREY, ORANGE
from paper_repro.harness.experiment import OTHER, Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.materials import weights

SEED = 0
LEVEL = 0.05
ROWS = 300  # of a kind of layer that a quick run draws
BLOCK = 64  # weights that share a scale in the paper
# Kinds of layers, by what stands in the names of their weights; the first that fits.
KINDS = {
    "attention output": (
        "attention.output",
        "self_attention/linear_1",
        "/attention/linear_2",
        "o_proj",
    ),
    "attention input": ("attention", "self_attn"),
    "feed-forward output": ("ffn/linear_1", "down_proj", ".output."),
    "feed-forward input": ("intermediate", "ffn/linear_0", "gate_proj", "up_proj"),
}
UNITS = ("row", "block")


def run(lab: Lab) -> Result:
    found = {name: _measure_model(lab, name) for name in weights.LABELS}
    return {"seeds": [SEED], "level": LEVEL, "rows": lab.choose(ROWS, None), "models": found}


def _measure_model(lab: Lab, name: str) -> dict[str, Any]:
    most = lab.choose(ROWS, None)
    settings = {"weights": weights.digest(lab, name), "rows": most, "seed": SEED, "block": BLOCK}

    def function() -> dict[str, Any]:
        of = weights.linear_weights(lab, name)
        by_kind: dict[str, list[torch.Tensor]] = {kind: [] for kind in KINDS}
        for key, weight in of.items():
            by_kind[kind_of(key)] += weight.unbind()
        bar = tqdm(by_kind.items(), desc=f"normality, {weights.LABELS[name]}", unit="kind")
        return {kind: _count(rows, most) for kind, rows in bar if rows}

    return lab.measure(f"normality-{name}", settings, function, (weights,))


def kind_of(key: str) -> str:
    """The kind of layer of the weight with this name.

    Raises:
        ValueError: it is none of `KINDS`.
    """
    for kind, parts in KINDS.items():
        if any(part in key for part in parts):
            return kind
    raise ValueError(f"key must have a part that KINDS lists, got {key!r}")


def _count(rows: Sequence[torch.Tensor], most: int | None) -> dict[str, Any]:
    """How many rows are rejected, and how many of their blocks (one drawn from each), and so of Gaussian ones."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randperm(len(rows), generator=generator)[:most].tolist()
    rejected = {source: dict.fromkeys(UNITS, 0) for source in ("weights", "control")}
    corrected = dict.fromkeys(rejected, 0)
    for i in drawn:
        normal = torch.randn(len(rows[i]), generator=generator)
        blocks = max(len(rows[i]) // BLOCK, 1)
        start = BLOCK * int(torch.randint(blocks, (), generator=generator))
        for source, row in (("weights", rows[i]), ("control", normal)):
            p = _p_of_normality(row)
            rejected[source]["row"] += p < LEVEL
            rejected[source]["block"] += _p_of_normality(row[start : start + BLOCK]) < LEVEL
            corrected[source] += p < LEVEL / len(drawn)
    lengths = sorted({len(rows[i]) for i in drawn})
    counts = {"rows": len(rows), "tested": len(drawn), "lengths": lengths}
    return {**counts, **rejected, "bonferroni": corrected}


def _p_of_normality(values: torch.Tensor) -> float:
    from scipy.stats import shapiro

    return float(shapiro(values.double().numpy()).pvalue)


PAPER = 0.075
CONTROL = (0.03, 0.07)


def _share(of: Mapping[str, Any], source: str, unit: str = "row") -> float:
    """Of all rows of these kinds, by those that were tested of each kind."""
    rejected = sum(kind["rows"] * kind[source][unit] / kind["tested"] for kind in of.values())
    return rejected / sum(kind["rows"] for kind in of.values())


def _all(result: Result) -> dict[str, Any]:
    """The kinds of all models, which is what the control is judged on."""
    return {f"{m} {k}": kind for m, of in result["models"].items() for k, kind in of.items()}


def _control(result: Result) -> float:
    return _share(_all(result), "control")


CLAIMS = (
    Claim(
        statement="For Appendix F: Shapiro and Wilk's test keeps its level of 5 % on Gaussian rows (control)",
        paper="5 % by its level",
        criterion=f"{CONTROL[0]:.0%} to {CONTROL[1]:.0%} of Gaussian rows of the same lengths are rejected",
        passes=lambda r: CONTROL[0] <= _control(r) <= CONTROL[1],
        measured=lambda r: f"{_control(r):.1%}",
        kind=OTHER,
    ),
    Claim(
        statement="Appendix F: most hidden units of a trained model have normal weights",
        paper=f"{PAPER:.1%} of LLaMA-7B's rejected",
        criterion="none: other models",
        passes=None,
        measured=lambda r: ", ".join(
            f"{weights.LABELS[name]} {_share(of, 'weights'):.0%}"
            for name, of in r["models"].items()
        ),
    ),
)


def section(result: Result) -> str:
    rows = []
    for name, of in result["models"].items():
        for kind, found in of.items():
            tested = found["tested"]
            shares = [
                f"{found[source][unit] / tested:.1%}"
                for unit in UNITS
                for source in ("weights", "control")
            ]
            lengths = ", ".join(map(str, found["lengths"]))
            corrected = f"{found['bonferroni']['weights'] / tested:.1%}"
            rows.append((f"{weights.LABELS[name]}, {kind}", tested, lengths, *shares, corrected))
    header = ["hidden units of", "rows tested", "weights in a row", "rejected", "Gaussian rejected"]
    header += [f"of their blocks of {BLOCK}", "Gaussian blocks", "rows, with Bonferroni"]
    drawn = "all rows" if result["rows"] is None else f"{result['rows']} drawn of a kind of layer"
    return (
        "A hidden unit is a row of a weight matrix [out, in]. Each is tested by itself at "
        f"{result['level']:.0%} (scipy's `shapiro`), as in the paper: without correction, so that a share "
        f"of {result['level']:.0%} is what normal rows give; the last column divides the level by the number of "
        "rows. Beside each row a Gaussian one of its length is tested, and of both the same block of "
        f"{BLOCK} weights, which is what a scale is taken over. Rows: {drawn}, seed "
        f"{result['seeds'][0]}. The paper's rows have 4,096 and 11,008 weights: a longer row is rejected for "
        "a smaller departure, and beyond 5,000 scipy warns that its p-value may be off. SmolLM2's weights "
        "come from a lattice of 16 values in each 32.\n\n" + table(header, rows)
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = folder / "normality.svg"
    styles = (
        ("weights", "row", "o", BLUE, BLUE, "rows"),
        ("weights", "block", "D", BLUE, "white", f"their blocks of {BLOCK}"),
        ("control", "row", "o", GREY, "white", "Gaussian rows"),
    )
    kinds = [(name, kind) for name, of in result["models"].items() for kind in of]
    labels = [f"{weights.LABELS[name]}, {kind}" for name, kind in kinds]
    # Models are set apart by half a line.
    names = list(result["models"])
    places = [row + names.index(name) / 2 for row, (name, _) in enumerate(kinds)]
    with draw.figure(path, height=1.2 + 0.25 * len(kinds)) as axes:
        for source, unit, marker, edge, face, label in styles:
            found = [result["models"][name][kind] for name, kind in kinds]
            shares = [100 * of[source][unit] / of["tested"] for of in found]
            axes.plot(shares, places, marker, color=edge, markerfacecolor=face, label=label)
        axes.axvline(100 * PAPER, color=ORANGE, linewidth=1, linestyle="--", zorder=0)
        axes.plot([], [], "--", color=ORANGE, label=f"paper, rows of LLaMA-7B: {PAPER:.1%}")
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set(xlabel=f"not normal at {LEVEL:.0%}, in % of those tested", xlim=(0, 102))
        axes.figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return {
        f"Hidden units whose weights are not normal, by Shapiro and Wilk's test at {LEVEL:.0%}": path
    }


def lessons(result: Result) -> Sequence[str]:
    rows, blocks = (_share(_all(result), "weights", unit) for unit in UNITS)
    least, most = (
        choose(result["models"].items(), key=lambda item: _share(item[1], "weights"))
        for choose in (min, max)
    )
    return (
        f"Of the rows of these models the test rejects {rows:.0%} at {LEVEL:.0%}, from "
        f"{_share(least[1], 'weights'):.0%} in {weights.LABELS[least[0]]} to "
        f"{_share(most[1], 'weights'):.0%} in {weights.LABELS[most[0]]}, and of the blocks of {BLOCK} that "
        f"share a scale {blocks:.0%}.",
    )


EXPERIMENT = Experiment(
    "normality",
    "Appendix F: whether hidden units are normal",
    (0.1, 1),
    run,
    CLAIMS,
    section,
    plots,
    lessons=lessons,
)
