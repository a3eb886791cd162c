"""Perplexity of language models in data types that came after the paper, on Table 2's text."""

from __future__ import annotations

from typing import Any

from paper_repro import beyond_errors
from paper_repro.beyond_errors import BLOCKSIZE, CODES, OF_NORMAL
from paper_repro.harness.lab import Lab
from paper_repro.materials import weights
from paper_repro.measures import perplexity
from paper_repro.measures.in_data_type import BASE, MODELS, DataType

LARGEST = 4096
# By the names under which results are kept: codebook and block size.
VARIANTS: dict[str, tuple[str, int]] = {
    f"{code}@{size}": (code, size)
    for size, codes in {
        BLOCKSIZE: tuple(CODES),
        256: ("nf4",),
        1024: ("nf4",),
        LARGEST: OF_NORMAL,
    }.items()
    for code in codes
}


def measure_models(lab: Lab) -> dict[str, Any]:
    """By model: our own, and in a full run SmolLM2, whose base comes from a 4-bit lattice."""
    return {
        name: perplexity.in_each(lab, name, _data_types(lab, name))["perplexity"]
        for name in lab.choose(("own",), tuple(MODELS))
    }


def _data_types(lab: Lab, name: str) -> dict[str, DataType]:
    """The data types that a model is held in; codebooks that are fitted are fitted to its own weights."""
    found = {BASE: DataType(None)}
    for variant, (code, size) in VARIANTS.items():
        found[variant] = beyond_errors.data_type(_values(lab, name, code, size), size)
    return found


def _values(lab: Lab, name: str, code: str, size: int) -> tuple[float, ...]:
    """The codebook, remembered where it takes a pass over the model's weights."""
    if code in OF_NORMAL:
        return beyond_errors.values_of(code, size)

    def fit() -> dict[str, Any]:
        of = beyond_errors.source_weights(lab, name)
        return {"values": beyond_errors.fitted_values(code, of, size)}

    settings = {"weights": weights.digest(lab, name), "codebook": code, "blocksize": size}
    modules = (beyond_errors, *beyond_errors.MODULES)
    return tuple(lab.measure(f"beyond-fit-{name}", settings, fit, modules)["values"])
