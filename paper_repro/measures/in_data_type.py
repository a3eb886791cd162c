"""A language model whose linear layers are held in any data type, one after the other from the same originals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from inspect import getmodule
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from paper_repro.harness.lab import Lab
from paper_repro.materials import model, own_model
from qlora import dequantize_4bit, quantize_4bit
from qlora.kernels.formats import FORMATS
from qlora.pretrained import load_dense


@dataclass(frozen=True)
class DataType:
    """How weights are held: arguments of `qlora.quantize_4bit`; with format None as they are in the folder."""

    format: str | None
    double_quant: bool = False
    blocksize: int = 64
    scale_format: str = "dynamic8"

    @property
    def settings(self) -> dict[str, Any]:
        """What determines the weights, for `Lab.measure`: the codebook too, as a name may be registered anew."""
        values = list(FORMATS[self.format].values) if self.format else None
        return {**asdict(self), "values": values}

    def hold(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as this data type has it, in its own shape and dtype."""
        if self.format is None:
            return weight
        q = quantize_4bit(weight, self.format, self.blocksize, self.double_quant, self.scale_format)
        return dequantize_4bit(q)


BASE, NF4, NF4_DQ = "base", "nf4", "nf4+dq"
DATA_TYPES: dict[str, DataType] = {
    BASE: DataType(None),
    NF4: DataType("nf4"),
    NF4_DQ: DataType("nf4", double_quant=True),
    "fp4": DataType("fp4"),
    "e2m1": DataType("e2m1"),
    "int4": DataType("int4"),
    "e3m0": DataType("e3m0"),
}
LABELS = {
    BASE: "base",
    NF4: "NF4",
    NF4_DQ: "NF4 + DQ",
    "fp4": "FP4 (bitsandbytes)",
    "e2m1": "FP4 E2M1",
    "int4": "Int4",
    "e3m0": "FP4 E3M0",
}
MODELS = {"smollm2": model.MODEL_NAME, "own": own_model.NAME}


def model_folders(lab: Lab) -> dict[str, Path]:
    """The two models: one that comes from a 4-bit lattice, and one that was never quantized."""
    return {"smollm2": model.model_folder(lab.folder), "own": own_model.own_folder(lab)}


def measure_each(
    lab: Lab,
    what: str,
    settings: Mapping[str, Any],
    data_types: Mapping[str, DataType],
    measure: Callable[[str], dict[str, Any]],
    modules: Sequence[ModuleType] = (),
) -> dict[str, Any]:
    """The value of each data type, by its name, each remembered by itself.

    Args:
        what: a short name; with the data type's it is part of the name of a file.
        settings: everything that determines the values besides the data type.
        data_types: by the names under which the values are returned.
        measure: measures the data type of a name. The code of its module is part of the key.
        modules: further modules whose code determines the values.
    """

    def one(name: str, data_type: DataType) -> dict[str, Any]:
        of_type = {**settings, "data type": data_type.settings}
        return lab.measure(f"{what}-{name}", of_type, lambda: measure(name), sources)

    sources = (getmodule(measure), *modules)
    return {name: one(name, data_type) for name, data_type in data_types.items()}


class HeldModel:
    """The dense model of a folder, loaded when first asked for; there is one, whose weights are replaced.

    Attributes:
        folder: model and tokenizer, as Hugging Face writes them.
        device: where the model is.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self._model: torch.nn.Module | None = None
        self._originals: dict[str, torch.Tensor] = {}

    def hold(self, data_type: DataType) -> tuple[torch.nn.Module, float]:
        """The model with its linear layers in a data type, and the relative RMSE of their weights.

        The model is the same object each time: a call replaces the weights that the one before had put in.
        """
        if self._model is None:
            self._model = load_dense(self.folder).to(self.device)
            self._originals = {name: layer.weight.detach() for name, layer in _linears(self._model)}
        error = total = 0.0
        for name, layer in _linears(self._model):
            original = self._originals[name]
            changed = data_type.hold(original)
            error += (changed - original).double().square().sum().item()
            total += original.double().square().sum().item()
            layer.weight.data = changed
        return self._model, (error / total) ** 0.5


def _linears(network: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """All linear layers but the output layer, which is tied to the embedding or as large as it."""
    head = network.get_output_embeddings()
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield name, module
