"""Perplexity of language models in data types that came after the paper, on Table 2's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from paper_repro import beyond_errors, table2
from paper_repro.beyond_errors import BLOCKSIZE, CODES, OF_NORMAL
from paper_repro.harness.lab import Lab
from paper_repro.materials import own_model, weights
from paper_repro.measures import codebooks, in_data_type, perplexity
from paper_repro.measures.in_data_type import BASE, DataType, HeldModel

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
MODULES = (beyond_errors, codebooks, in_data_type, perplexity)


def measure_models(lab: Lab) -> dict[str, Any]:
    """By model: our own, and in a full run SmolLM2, whose base comes from a 4-bit lattice."""
    folders = in_data_type.model_folders(lab)
    names = lab.choose(("own",), tuple(folders))
    return {name: _measure_model(lab, name, folders[name]) for name in names}


def _measure_model(lab: Lab, name: str, folder: Path) -> dict[str, Any]:
    quick, full, length = table2.WINDOWS[name]
    articles = perplexity.wikipedia_windows(lab, folder, lab.choose(quick, full), length)
    held = HeldModel(folder, lab.device)
    settings = {"model": own_model.digest(folder), "tokens": perplexity.digest(articles)}
    data_types = {BASE: DataType(None)}
    for variant, (code, size) in VARIANTS.items():
        values = _values(lab, name, code, size)
        data_types[variant] = beyond_errors.data_type(values, size)
    found = {}
    for variant, data_type in data_types.items():

        def measure(variant: str = variant, data_type: DataType = data_type) -> dict[str, Any]:
            network, rmse = held.hold(data_type)
            what = f"{in_data_type.MODELS[name]}, {variant}"
            return {**perplexity.measure(network, articles, what), "weight_rmse": rmse}

        found[variant] = lab.measure(
            f"beyond-{name}-{variant}",
            {**settings, "data type": data_type.settings},
            measure,
            MODULES,
        )
    return found


def _values(lab: Lab, name: str, code: str, size: int) -> tuple[float, ...]:
    """The codebook, remembered where it takes a pass over the model's weights."""
    if code in OF_NORMAL:
        return beyond_errors.values_of(code, size)

    def fit() -> dict[str, Any]:
        of = beyond_errors.source_weights(lab, name)
        return {"values": beyond_errors.fitted_values(code, of, size)}

    settings = {"weights": weights.digest(lab, name), "codebook": code, "blocksize": size}
    return tuple(lab.measure(f"beyond-fit-{name}", settings, fit, (codebooks,))["values"])
