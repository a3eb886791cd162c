"""Section 3 and Appendix E: how well each 4-bit data type holds normally distributed numbers."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch
from tqdm import tqdm

from paper_repro import draw
from paper_repro.experiment import Claim, Experiment, Result, table
from paper_repro.lab import Lab
from qlora import dequantize_4bit, quantize_4bit
from qlora.kernels.formats import FORMATS

DRAWS, BLOCKSIZE, SEED = 4_000_000, 64, 0
OFFSET = 1 - (1 / 30 + 1 / 32) / 2  # outermost quantile of NF4, in the paper's own code

LABELS = {
    "nf4": "NF4",
    "e2m1": "FP4 E2M1",
    "int4": "Int4",
    "fp4": "FP4 (bitsandbytes)",
    "e3m0": "FP4 E3M0",
}
BY_MSE = tuple(LABELS)  # from the least error on normal data to the greatest


def run(lab: Lab) -> Result:
    settings = {"draws": DRAWS, "blocksize": BLOCKSIZE, "seed": SEED}
    errors = lab.measure("normal-data", settings, _measure_errors)
    derived = nf4_from_quantiles()
    deviation = max(abs(a - b) for a, b in zip(derived, sorted(FORMATS["nf4"].values), strict=True))
    return {**settings, **errors, "nf4_deviation": deviation, "codebooks": _codebooks()}


def nf4_from_quantiles() -> list[float]:
    """NF4 from its definition: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

    Eight values come from the upper half and seven from the lower, as 16 codes with a zero leave one
    half a value more.
    """
    quantile = NormalDist().inv_cdf
    upper = [quantile(OFFSET + (0.5 - OFFSET) * i / 8) for i in range(8)]
    lower = [-quantile(OFFSET + (0.5 - OFFSET) * i / 7) for i in range(7)]
    return sorted(value / upper[0] for value in [*upper, 0.0, *lower])


def _codebooks() -> dict[str, list[float]]:
    """The values that a scaled weight can round to: Int4's code of -8/7 is never used."""
    return {name: sorted({v for v in FORMATS[name].values if abs(v) <= 1}) for name in LABELS}


def _measure_errors() -> dict[str, Any]:
    draws = torch.randn(DRAWS, generator=torch.Generator().manual_seed(SEED))
    variants = [(name, False) for name in LABELS] + [("nf4", True)]
    mse = {}
    for name, double_quant in tqdm(variants, desc="errors on normal data", unit="type"):
        q = quantize_4bit(draws, name, BLOCKSIZE, double_quant)
        error = (dequantize_4bit(q) - draws).double()
        mse[f"{name}+dq" if double_quant else name] = error.square().mean().item()
    return {"mse": mse, "mean_square": draws.double().square().mean().item()}


def _rmse(result: Result, name: str) -> float:
    return (result["mse"][name] / result["mean_square"]) ** 0.5


NF4_MSE, NF4_MSE_TOLERANCE, DQ_MOST = 0.00846, 0.01, 0.005


def _in_order(result: Result) -> bool:
    errors = [result["mse"][name] for name in BY_MSE]
    return errors == sorted(errors) and abs(errors[0] / NF4_MSE - 1) <= NF4_MSE_TOLERANCE


def _dq_cost(result: Result) -> float:
    return result["mse"]["nf4+dq"] / result["mse"]["nf4"] - 1


CLAIMS = (
    Claim(
        statement="NF4 is the quantile data type of Appendix E",
        paper="16 values",
        criterion="largest deviation from the values derived from normal quantiles at most 1e-6",
        passes=lambda r: r["nf4_deviation"] <= 1e-6,
        measured=lambda r: f"{r['nf4_deviation']:.1e}",
    ),
    Claim(
        statement="NF4 has the least error on normally distributed weights (section 3)",
        paper="no figure given",
        criterion=f"MSE: {' < '.join(LABELS[name] for name in BY_MSE)}; NF4 {NF4_MSE} within "
        f"{NF4_MSE_TOLERANCE:.0%}",
        passes=_in_order,
        measured=lambda r: f"NF4 {r['mse']['nf4']:.5f}, next {r['mse'][BY_MSE[1]]:.5f}",
    ),
    Claim(
        statement="Double quantization costs no accuracy (section 3)",
        paper="no figure given",
        criterion=f"it adds at most {DQ_MOST:.1%} to NF4's MSE",
        passes=lambda r: _dq_cost(r) <= DQ_MOST,
        measured=lambda r: f"{_dq_cost(r):+.2%}",
    ),
)


def section(result: Result) -> str:
    names = {**LABELS, "nf4+dq": "NF4 + double quantization"}
    order = sorted(result["mse"], key=result["mse"].__getitem__)
    rows = [
        (names[name], f"{result['mse'][name]:.5f}", f"{_rmse(result, name):.2%}") for name in order
    ]
    return (
        f"{result['draws']:,} draws of N(0, 1), blocks of {result['blocksize']}, seed "
        f"{result['seed']}.\n\n" + table(["data type", "mean squared error", "relative RMSE"], rows)
    )


def plots(result: Result, folder: Path) -> dict[str, Path]:
    path = draw.codebooks(result["codebooks"], LABELS, folder / "codebooks.png")
    return {"The values of each data type, and the density of normal weights in a block": path}


EXPERIMENT = Experiment(
    "datatypes", "4-bit data types on normal data", 0.2, run, CLAIMS, section, plots
)
