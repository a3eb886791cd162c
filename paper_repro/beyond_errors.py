"""What data types that came after the paper, block sizes and formats of scales do to weights: errors and bits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from paper_repro.harness.lab import Lab
from paper_repro.materials import weights
from paper_repro.measures import codebooks, in_data_type
from paper_repro.measures.codebooks import (
    KEPT,
    NF4_VALUES,
    lloyd_max,
    normal_mass,
    register,
    weights_mass,
)
from paper_repro.measures.in_data_type import DataType
from qlora import dequantize_4bit, quantize_4bit
from qlora.kernels import ops, reference
from qlora.kernels.formats import BLOCKSIZES, SCALE_FORMATS

Weights = Mapping[str, torch.Tensor]

SEED = 0
NORMAL = "normal"
DRAWS = (2**21, 2**24)  # quick, full
SOURCES = ("minilm", "whisper", "own")
LABELS = {NORMAL: "normal numbers", **weights.LABELS}
BLOCKSIZE = 64  # the paper's
COMPARED = (64, 256, 1024, 4096)  # block sizes at which codebooks are compared
MODULES = (codebooks, in_data_type, weights)

# Codebooks by how they come about; those of `fitted` from the weights that they are then measured on.
CODES = {
    "nf4": "NF4",
    "af4": "AF4",
    "least_absolute": "least absolute error",
    "least_squared": "least squared error",
    "least_squared_free": "least squared error, free",
    "fitted": "fitted",
    "fitted_free": "fitted, free",
}
OF_NORMAL = ("nf4", "af4", "least_absolute", "least_squared", "least_squared_free")


def values_of(code: str, blocksize: int) -> tuple[float, ...]:
    """The codebook for normal weights in blocks of this size; NF4 is the same for all."""
    if code == "nf4":
        return NF4_VALUES
    if code in ("af4", "least_absolute"):
        return getattr(codebooks, code)(blocksize)
    kept = () if code.endswith("_free") else KEPT
    return lloyd_max(normal_mass(blocksize, 2), kept)


def fitted_values(code: str, of: Weights, blocksize: int) -> tuple[float, ...]:
    """The codebook of least squared error for these very weights."""
    kept = () if code.endswith("_free") else KEPT
    return lloyd_max(weights_mass(of.values(), blocksize), kept)


def data_type(values: tuple[float, ...], blocksize: int = BLOCKSIZE) -> DataType:
    return DataType("nf4" if values == NF4_VALUES else register(values), blocksize=blocksize)


def errors(of: Weights, held: DataType) -> dict[str, float]:
    """Of all weights together: relative RMSE, mean squared and absolute error, and bits of a parameter.

    "scaled_mae" is the mean absolute error in units of the largest magnitude of each weight's block.
    """
    squared = absolute = scaled = total = 0.0
    count = size = 0
    for weight in of.values():
        q = quantize_4bit(weight, held.format, held.blocksize, held.double_quant, held.scale_format)
        error = dequantize_4bit(q) - weight
        squared += _square_sum(error)
        total += _square_sum(weight)
        blocks = reference.to_blocks(error, held.blocksize).abs_().sum(1, dtype=torch.float64)
        absolute += blocks.sum().item()
        absmax = reference.to_blocks(weight, held.blocksize).abs().amax(1)
        scaled += torch.where(absmax > 0, blocks / absmax, 0.0).sum().item()
        count, size = count + weight.numel(), size + q.nbytes
    return {
        "rmse": (squared / total) ** 0.5,
        "mse": squared / count,
        "mae": absolute / count,
        "scaled_mae": scaled / count,
        "bits": 8 * size / count,
    }


def scale_error(of: Weights, held: DataType) -> float:
    """Relative RMSE of the scales that double quantization restores; 0 without it."""
    if not held.double_quant:
        return 0.0
    squared = total = 0.0
    for weight in of.values():
        exact = quantize_4bit(weight, held.format, held.blocksize, double_quant=False).absmax
        restored = ops.dequantize_absmax(
            *ops.quantize_absmax(exact, held.scale_format), held.scale_format
        )
        squared += _square_sum(restored - exact)
        total += _square_sum(exact)
    return (squared / total) ** 0.5


def _square_sum(x: torch.Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


# --- Measurements, each of which is remembered by itself --------------------------------------------


def measure_definitions(lab: Lab) -> dict[str, Any]:
    """How far AF4's published values are from those that each definition gives, by block size."""

    def function() -> dict[str, Any]:
        return {
            str(size): {
                code: max(abs(a - b) for a, b in zip(values_of(code, size), published, strict=True))
                for code in ("af4", "least_absolute")
            }
            for size, published in codebooks.AF4_PUBLISHED.items()
        }

    sizes = list(codebooks.AF4_PUBLISHED)
    return lab.measure("beyond-definitions", {"sizes": sizes}, function, MODULES)


def measure_normal(lab: Lab) -> dict[str, Any]:
    """Errors of each codebook on normal numbers, by block size."""

    def function() -> dict[str, Any]:
        draws = source_weights(lab, NORMAL)
        found: dict[str, Any] = {}
        for size in tqdm(COMPARED, desc="codebooks on normal numbers", unit="block size"):
            found[str(size)] = {}
            for code in OF_NORMAL:
                values = values_of(code, size)
                measured = errors(draws, data_type(values, size))
                found[str(size)][code] = {**measured, "values": values}
        return found

    settings = {**_settings(lab, NORMAL), "sizes": COMPARED, "codes": OF_NORMAL}
    return lab.measure("beyond-normal", settings, function, MODULES)


def measure_source(lab: Lab, source: str) -> dict[str, Any]:
    """Of one source: NF4 by block size, codebooks at the paper's block size, and formats of the scales."""

    def function() -> dict[str, Any]:
        of = source_weights(lab, source)
        sizes = [
            {"blocksize": size, "double_quant": double, **errors(of, DataType("nf4", double, size))}
            for size in tqdm(BLOCKSIZES, desc=f"block sizes, {LABELS[source]}", unit="size")
            for double in (False, True)
        ]
        return {"sizes": sizes, "codes": _codes(of), "scales": _scales(of)}

    settings = {**_settings(lab, source), "sizes": BLOCKSIZES, "codes": list(CODES)}
    return lab.measure(f"beyond-{source}", settings, function, MODULES)


def _codes(of: Weights) -> dict[str, dict[str, float]]:
    found = {}
    for code in CODES:
        values = (
            values_of(code, BLOCKSIZE) if code in OF_NORMAL else fitted_values(code, of, BLOCKSIZE)
        )
        found[code] = {**errors(of, data_type(values)), "values": values}
    return found


def _scales(of: Weights) -> dict[str, dict[str, float]]:
    plain = DataType("nf4", blocksize=BLOCKSIZE)
    held = {"fp32": plain}
    held |= {name: replace(plain, double_quant=True, scale_format=name) for name in SCALE_FORMATS}
    return {name: {**errors(of, d), "scale_rmse": scale_error(of, d)} for name, d in held.items()}


def source_weights(lab: Lab, source: str) -> Weights:
    if source != NORMAL:
        found = weights.linear_weights(lab, source)
        return {name: weight.to(lab.device) for name, weight in found.items()}
    generator = torch.Generator().manual_seed(SEED)
    return {"draws": torch.randn(lab.choose(*DRAWS), generator=generator).to(lab.device)}


def _settings(lab: Lab, source: str) -> dict[str, Any]:
    if source == NORMAL:
        return {"draws": lab.choose(*DRAWS), "seed": SEED}
    return {"weights": weights.digest(lab, source)}
