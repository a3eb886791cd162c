"""Section 3 and Appendix E: how well each 4-bit data type holds normal numbers, and trained weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from paper_repro import datatypes_plots
from paper_repro.harness.experiment import ARITHMETIC, Claim, Experiment, Result, table
from paper_repro.harness.lab import Lab
from paper_repro.materials import weights
from paper_repro.measures import in_data_type
from paper_repro.measures.in_data_type import DATA_TYPES, LABELS, NF4, NF4_DQ
from paper_repro.measures.quantiles import OFFSET, equation_4, nf4_from_quantiles
from qlora.kernels.formats import FORMATS

DRAWS, SEED = 4_000_000, 0
# From the least error on normal data to the greatest.
BY_MSE = (NF4, "e2m1", "int4", "fp4", "e3m0")
WITH_DQ = (NF4, NF4_DQ, *BY_MSE[1:])
BLOCKSIZE = DATA_TYPES[NF4].blocksize
SOURCES = ("minilm", "whisper", "own", "smollm2")
UNTOUCHED = ("minilm", "whisper", "own")  # never quantized before


def run(lab: Lab) -> Result:
    types = {name: DATA_TYPES[name].settings for name in WITH_DQ}
    settings = {"draws": DRAWS, "seed": SEED, "types": types}
    normal = lab.measure("normal-data", settings, lambda: _on_normal_data(lab), (in_data_type,))
    on_weights = {}
    for name in SOURCES:
        settings = {"weights": weights.digest(lab, name), "types": types}

        def measure(name: str = name) -> dict[str, Any]:
            return _on_weights(lab, name)

        on_weights[name] = lab.measure(f"errors-{name}", settings, measure, (in_data_type, weights))
    derived = nf4_from_quantiles()
    return {
        "blocksize": BLOCKSIZE,
        "seeds": [SEED],
        "normal": normal,
        "weights": on_weights,
        "nf4_deviation": _furthest(derived, sorted(FORMATS["nf4"].values)),
        "codebooks": _codebooks(),
        "equation_4": equation_4(),
    }


def _furthest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _codebooks() -> dict[str, list[float]]:
    """The values that a scaled weight can round to: Int4's code of -8/7 is never used."""
    return {name: sorted({v for v in FORMATS[name].values if abs(v) <= 1}) for name in BY_MSE}


def _on_normal_data(lab: Lab) -> dict[str, Any]:
    draws = torch.randn(DRAWS, generator=torch.Generator().manual_seed(SEED))
    bar = tqdm(WITH_DQ, desc="errors on normal data", unit="type")
    return _errors(draws.to(lab.device), bar)


def _on_weights(lab: Lab, name: str) -> dict[str, Any]:
    """The errors in each matrix, by its name."""
    found = weights.linear_weights(lab, name)
    bar = tqdm(found.items(), desc=f"errors on {weights.LABELS[name]}", unit="matrix")
    return {key: _errors(weight.to(lab.device), WITH_DQ) for key, weight in bar}


def _errors(weight: torch.Tensor, types: Iterable[str]) -> dict[str, Any]:
    """Mean squared errors of one tensor by data type, and its own mean square."""
    mse = {name: _mean_square(DATA_TYPES[name].hold(weight) - weight) for name in types}
    return {"numel": weight.numel(), "mean_square": _mean_square(weight), "mse": mse}


def _mean_square(values: torch.Tensor) -> float:
    return values.double().square().mean().item()


NF4_MSE, NF4_MSE_TOLERANCE, DQ_MOST = 0.00846, 0.01, 0.005


def _mse(result: Result, name: str) -> float:
    return result["normal"]["mse"][name]


def _in_order(result: Result) -> bool:
    errors = [_mse(result, name) for name in BY_MSE]
    return errors == sorted(errors) and abs(errors[0] / NF4_MSE - 1) <= NF4_MSE_TOLERANCE


def _dq_cost(result: Result) -> float:
    return _mse(result, NF4_DQ) / _mse(result, NF4) - 1


def _rmse(result: Result, source: str | None, name: str) -> float:
    """Root of the squared error relative to the weights' square, of all matrices together; None: normal data."""
    parts = [result["normal"]]
    if source is not None:
        parts = list(result["weights"][source].values())
    error = math.fsum(part["mse"][name] * part["numel"] for part in parts)
    return math.sqrt(error / math.fsum(part["mean_square"] * part["numel"] for part in parts))


def _nf4_is_best(result: Result) -> bool:
    return all(
        _rmse(result, source, NF4) < _rmse(result, source, name)
        for source in UNTOUCHED
        for name in BY_MSE[1:]
    )


def show_best(result: Result, source: str) -> str:
    """In how many matrices NF4 has the least error."""
    matrices = result["weights"][source].values()
    best = sum(min(BY_MSE, key=matrix["mse"].__getitem__) == NF4 for matrix in matrices)
    return f"{best} of {len(matrices)}"


def show_errors(result: Result, source: str) -> str:
    errors = [f"{_rmse(result, source, name):.2%} ({LABELS[name]})" for name in BY_MSE[1:]]
    return f"{weights.LABELS[source]}: {_rmse(result, source, NF4):.2%} against {', '.join(errors)}"


CLAIMS = (
    Claim(
        statement="NF4 is the quantile data type of Appendix E",
        paper="16 values",
        criterion="largest deviation from the values derived from normal quantiles at most 1e-6",
        passes=lambda r: r["nf4_deviation"] <= 1e-6,
        measured=lambda r: f"{r['nf4_deviation']:.1e}",
        kind=ARITHMETIC,
    ),
    Claim(
        statement="NF4 has the least error on normally distributed weights (section 3)",
        paper="no figure given",
        criterion=f"MSE: {' < '.join(LABELS[name] for name in BY_MSE)}; NF4 {NF4_MSE} within "
        f"{NF4_MSE_TOLERANCE:.0%}",
        passes=_in_order,
        measured=lambda r: f"NF4 {_mse(r, NF4):.5f}, next {_mse(r, BY_MSE[1]):.5f}",
        trend=True,
    ),
    Claim(
        statement="Double quantization costs no accuracy (section 3)",
        paper="no figure given",
        criterion=f"it adds at most {DQ_MOST:.1%} to NF4's MSE on normal data",
        passes=lambda r: _dq_cost(r) <= DQ_MOST,
        measured=lambda r: f"{_dq_cost(r):+.2%}",
        trend=True,
    ),
    Claim(
        statement="NF4 has the least error on trained weights (section 3), here on weights that were never "
        "quantized before, of other models than the paper's",
        paper="no figure given",
        criterion="on each of "
        + ", ".join(weights.LABELS[source] for source in UNTOUCHED)
        + ": relative RMSE of all matrices together lower than that of "
        + ", ".join(LABELS[name] for name in BY_MSE[1:]),
        passes=_nf4_is_best,
        measured=lambda r: "; ".join(show_errors(r, source) for source in UNTOUCHED),
        trend=True,
    ),
)


def section(result: Result) -> str:
    order = sorted(WITH_DQ, key=lambda name: _mse(result, name))
    rows = [
        (LABELS[name], f"{_mse(result, name):.5f}", f"{_rmse(result, None, name):.2%}")
        for name in order
    ]
    return (
        f"{result['normal']['numel']:,} draws of N(0, 1), blocks of {result['blocksize']}, seed "
        f"{result['seeds'][0]}.\n\n"
        + table(["data type", "mean squared error", "relative RMSE"], rows)
        + "\n\nRelative RMSE on the linear layers of trained models, all their matrices together. SmolLM2 is "
        "only reported: its weights lie on a 4-bit lattice already.\n\n" + show_weights(result)
    )


def show_weights(result: Result) -> str:
    rows = []
    for source, matrices in result["weights"].items():
        numel = sum(matrix["numel"] for matrix in matrices.values())
        errors = [f"{_rmse(result, source, name):.2%}" for name in WITH_DQ]
        label = weights.LABELS[source]
        rows.append((label, f"{numel / 1e6:.2f}", *errors, show_best(result, source)))
    header = ["weights of", "million weights", *(LABELS[name] for name in WITH_DQ)]
    return table([*header, "matrices in which NF4 is best"], rows)


def errata(result: Result) -> list[str]:
    values = result["equation_4"]
    off = max(min(abs(a - b) for b in result["codebooks"][NF4]) for a in values)
    symmetric = all(abs(a + b) < 1e-12 for a, b in zip(values, reversed(values), strict=True))
    return [
        f"QLoRA, equation 4: taken literally it gives {len(values)} finite {'symmetric ' * symmetric}values for "
        "4 bits and one that is infinite, not the 16 asymmetric ones of Appendix E; scaled to [-1, 1], some "
        f"lie {off:.3f} from the nearest of those. The values come from the paper's code: quantiles of both "
        f"halves from {OFFSET:.7f} on, and a zero."
    ]


def lessons(result: Result) -> list[str]:
    above = {
        (source, name): _rmse(result, source, name) / _rmse(result, None, name) - 1
        for source in UNTOUCHED
        for name in BY_MSE
    }
    of_nf4 = sorted(UNTOUCHED, key=lambda source: above[source, NF4])
    least, most = (f"{above[s, NF4]:+.1%} ({weights.LABELS[s]})" for s in (of_nf4[0], of_nf4[-1]))
    source, name = max(above, key=above.__getitem__)
    return [
        f"NF4's relative RMSE on trained weights that were never quantized differs from that on normal numbers by "
        f"{least} to {most}; {LABELS[name]} changes most, by {above[source, name]:+.1%} "
        f"({weights.LABELS[source]})."
    ]


def plots(result: Result, folder: Path) -> dict[str, Path]:
    rows = {None: "normal numbers", **{name: weights.LABELS[name] for name in result["weights"]}}
    errors = {
        label: {name: 100 * _rmse(result, source, name) for name in BY_MSE}
        for source, label in rows.items()
    }
    values = datatypes_plots.codebooks(result["codebooks"], folder / "datatypes_codebooks.svg")
    return {
        "The values of each data type, and the density of normal weights in a block": values,
        "Relative RMSE by data type on normal numbers and on trained weights": (
            datatypes_plots.errors(errors, folder / "datatypes_errors.svg")
        ),
    }


EXPERIMENT = Experiment(
    "datatypes",
    "4-bit data types on normal data and on trained weights",
    (4.3, 4),
    run,
    CLAIMS,
    section,
    plots,
    errata,
    lessons,
)
