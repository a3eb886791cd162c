"""The dense weights that a model was quantized from, by the names of its layers: in a model or in a folder."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from qlora.adapter import is_converted
from qlora.experts import expert_linears, is_experts, split_stacked
from qlora.loading import open_folder
from qlora.model_parts import is_conv1d
from qlora.pretrained import load_dense
from qlora.tensor_names import NotStreamable


@dataclass(frozen=True)
class Original:
    """A weight that is read when it is wanted.

    Attributes:
        shape: (n, k).
        read: gives it as [n, k].
    """

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def of_model(model: nn.Module) -> dict[str, Original]:
    """The weights of a model's linear layers, and of its experts by the names that they have in 4 bits.

    Raises:
        ValueError: the model has been quantized, or holds adapters.
    """
    if is_converted(model):
        raise ValueError("onto must be a dense model without adapters; it has been converted")
    return _originals(model, model.get_parameter)


def of_folder(folder: Path) -> dict[str, Original]:
    """The weights of the linear layers, and of experts, of a Hugging Face model folder, read one at a time.

    Where transformers changes weights as it reads them (experts that lie one by one) the model is read as a whole,
    of which a warning tells.

    Raises:
        ValueError, FileNotFoundError: the folder is quantized, damaged or missing; the message says so.
    """
    try:
        model, shards, places = open_folder(folder)
    except NotStreamable as reason:
        model = load_dense(folder)
        warnings.warn(f"{folder}: read as a whole: {reason}", stacklevel=2)
        return of_model(model)
    key_of = {name: key for key, names in places.items() for name in names}
    return _originals(model, lambda name: shards.read(key_of[name]))


def _originals(model: nn.Module, read: Callable[[str], Tensor]) -> dict[str, Original]:
    """By the names of layers in 4 bits; `read` gives a parameter of the model by its name."""
    found = {}
    for name, module in _linears(model):
        found[name] = _original(module, lambda name=name: read(f"{name}.weight"))
    for name, module in model.named_modules(remove_duplicate=False):
        if is_experts(module):
            for inner, layer in expert_linears(module).items():
                part = partial(_part, module, name, inner, read)
                found[f"{name}.{inner}"] = Original(tuple(layer.weight.shape), part)
    return found


def _part(experts: nn.Module, name: str, inner: str, read: Callable[[str], Tensor]) -> Tensor:
    """The weight of one expert, of a stack that is read."""
    stack = inner.rpartition(".")[0]
    return split_stacked(experts, stack, read(f"{name}.{stack}"))[f"{inner}.weight"]


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear) or is_conv1d(module):
            yield name, module


def _original(layer: nn.Module, read: Callable[[], Tensor]) -> Original:
    """The weight of a layer of this kind and size, which lies as [k, n] in a Conv1D."""
    shape = tuple(layer.weight.shape)
    return Original(shape[::-1], lambda: read().mT) if is_conv1d(layer) else Original(shape, read)
