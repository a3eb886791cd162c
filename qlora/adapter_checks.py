"""Whether an adapter's files fit a model: all that is looked at before the first value changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora.adapters import hosts, layer_shape
from qlora.model_parts import plain_name
from qlora.peft_format import StoredAdapter, key_of
from qlora.saved_modules import SavedModule


def check_has_values(model: nn.Module) -> None:
    """Whether there is a base to compute with: one on the meta device would take the adapter in, and lose it."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(
                f"model must have values; {name} is on the meta device: load the model's weights first"
            )


def check_layers(path: Path, model: nn.Module, stored: StoredAdapter) -> None:
    """Whether the model has what the adapter is for, of the same shapes."""
    modules = _plain_modules(model)
    sizes = {name: layer_shape(model, name) for name in stored.layers}
    extra = [key_of(name, "lora_a") for name, size in sizes.items() if size is None]
    extra += [
        key_of(name, next(iter(parts)))
        for name, parts in stored.saved.items()
        if name not in modules
    ]
    extra += [name for name in stored.brought if name not in modules]
    _raise_mismatch(path, (), extra)
    for name, parts in stored.layers.items():
        (n, k), rank = sizes[name], parts["lora_a"].shape[0]
        shapes = {"lora_a": (rank, k), "lora_b": (n, rank), "magnitude": (n,)}
        for factor, value in parts.items():
            _check_shape(path, key_of(name, factor), value, shapes[factor])
    for name, values in stored.saved.items():
        expected = modules[name].state_dict()
        _check_keys(path, {name: expected}, {name: values})
        for key, value in values.items():
            _check_shape(path, key_of(name, key), value, tuple(expected[key].shape))


def check_same(path: Path, model: nn.Module, stored: StoredAdapter, name: str) -> None:
    """Whether the model's adapter has the same layers, ranks and modules."""
    own = {
        where: host.adapters[name].state_dict()
        for where, host in hosts(model).items()
        if name in host.adapters
    }
    _check_keys(path, own, {**stored.layers, **stored.saved})
    for layer, parts in stored.layers.items():
        ranks = parts["lora_a"].shape[0], own[layer]["lora_a"].shape[0]
        if ranks[0] != ranks[1]:
            raise ValueError(
                f"{path.parent}: the adapter has rank {ranks[0]}, the model's {name!r} has {ranks[1]} "
                f"({layer}): load it under another name, or delete_adapter(model, {name!r}) first"
            )


def _plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's modules by name, the original in place of one that is trained whole."""
    return {
        plain_name(name): module.original if isinstance(module, SavedModule) else module
        for name, module in model.named_modules()
    }


def _check_keys(
    path: Path, own: Mapping[str, Mapping[str, Tensor]], given: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Whether the same modules have the same tensors."""
    mine, theirs = (
        {key_of(m, k) for m, parts in some.items() for k in parts} for some in (own, given)
    )
    _raise_mismatch(path, mine - theirs, theirs - mine)


def _raise_mismatch(path: Path, missing: Iterable[str], extra: Iterable[str]) -> None:
    parts = ((sorted(missing), "missing"), (sorted(extra), "not in the model"))
    if found := "; ".join(f"{len(keys)} {what} ({_some(keys)})" for keys, what in parts if keys):
        raise ValueError(f"{path}: the adapter is for another model or other layers: {found}")


def _check_shape(path: Path, key: str, value: Tensor, shape: tuple[int, ...]) -> None:
    if value.shape != shape:
        shapes = f"{tuple(value.shape)}, not {shape}"
        raise ValueError(f"{path}: the adapter is for another model: {key} has shape {shapes}")


def check_brought(path: Path, model: nn.Module, brought: Mapping[str, Tensor]) -> None:
    """PEFT puts embeddings beside an adapter that was trained on a model with other ones."""
    modules = _plain_modules(model)
    for name, value in brought.items():
        own = getattr(modules[name], "weight", None)
        same = isinstance(own, Tensor) and own.shape == value.shape
        if not same or not torch.equal(value.to(own), own):
            raise ValueError(
                f"{path}: brings a base weight for {name} that is not the model's; it was trained on a "
                "model whose embeddings had been changed: give the model those first"
            )


def _some(keys: Iterable[str], count: int = 3) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")
