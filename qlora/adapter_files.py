"""Adapters as files: `save_adapter`, `load_adapter` and `read_config`.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, which PEFT reads and
writes too, and `qlora_config.json`: the data type of the base that the adapter was trained on, and
a fingerprint of it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora import files, peft_format
from qlora.adapter import DEFAULT, Adapter, Start, is_converted
from qlora.adapter_checks import check_brought, check_has_values, check_layers, check_same
from qlora.adapter_settings import adapted_layers, adapter_config, saved_modules
from qlora.adapters import (
    adapter_names,
    adapter_parameters,
    as_lora_layer,
    check_new_name,
    hosts,
    settle_new,
    sole_adapter,
)
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.experts import stack_sizes
from qlora.fingerprint import base_fingerprint, common_base
from qlora.kernels.user_formats import check_stored, stored_codebook
from qlora.peft_format import CONFIG, WEIGHTS, StoredAdapter
from qlora.report import model_bytes
from qlora.saved_modules import as_saved_module
from qlora.targets import pattern_name

BASE_CONFIG = "qlora_config.json"

_FINGERPRINT = "fingerprint"
_ADAPTER_FIELDS = {"init", "init_iterations", "dropout"}
_OWN_FIELDS = {*BASE_FIELDS, *_ADAPTER_FIELDS, _FINGERPRINT}


def save_adapter(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write an adapter to a folder that `load_adapter` and PEFT read.

    Other files in the folder stay. Each file is replaced as a whole.

    Args:
        model: what `quantize_model` returned from.
        path: the folder.
        name: the adapter's; by default the one in use.

    Raises:
        ValueError: no such adapter, or layers differ in what the files have one place for only.
    """
    path, name = Path(path), sole_adapter(model, name)
    layers, saved = adapted_layers(model, name), saved_modules(model, name)
    settings, stacks = adapter_config(model, name), stack_sizes(model)
    tensors = peft_format.tensors_to_write(
        {where: dict(layer.adapters[name].named_parameters()) for where, layer in layers.items()},
        {where: host.adapters[name].state_dict() for where, host in saved.items()},
        stacks,
    )
    config = peft_format.config_to_write(model, settings, layers, stacks)
    base = common_base(layers)
    if settings.init != "lora":
        base |= {"init": settings.init, "init_iterations": settings.init_iterations}
    if config["lora_dropout"] != settings.dropout:
        base["dropout"] = settings.dropout
    if (codebook := stored_codebook(settings.format)) is not None:
        base["codebook"] = codebook
    files.write_tensors(path / WEIGHTS, tensors)
    files.write_json(path / CONFIG, config)
    files.write_json(path / BASE_CONFIG, base | {_FINGERPRINT: base_fingerprint(layers)})


def load_adapter(model: nn.Module, path: str | os.PathLike[str], name: str = DEFAULT) -> None:
    """Add the adapter of a folder from us or from PEFT, or fill the model's adapter of that name with its values.

    A new adapter has the folder's rank, layers and settings, and is used at once if it is the model's first:
    else see `set_adapter`. One that is there must be of the same layers and ranks; its parameters stay the same
    objects. All is checked before the first value changes. The base is not touched. An adapter that was trained
    on another base, as far as its folder says, is loaded with a warning.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, made for another model or rank,
            or uses a variant of LoRA that is not supported; the message names it.
    """
    path, known = Path(path), name in adapter_names(model)
    if not known:
        check_new_name(model, name)
    check_has_values(model)
    base = _read_base(path)
    stored = peft_format.read(path, stack_sizes(model))
    stored = replace(stored, settings=_with_own(path, stored.settings, base, _ADAPTER_FIELDS))
    check_layers(path / WEIGHTS, model, stored)
    check_brought(path / WEIGHTS, model, stored.brought)
    if known:
        check_same(path / WEIGHTS, model, stored, name)
    put = _fill if known else _add
    with torch.no_grad():
        put(model, stored, name)
    _warn_of_another_base(path, model, base, name)


def read_config(path: str | os.PathLike[str]) -> QLoRAConfig:
    """The QLoRAConfig with which `quantize_model` makes a model that this adapter fits.

    An adapter that PEFT wrote does not say what its base was; then the base's settings are the
    defaults.
    """
    path = Path(path)
    stored, base = peft_format.read(path), _read_base(path)
    targets = (*sorted(stored.layers), *stored.target_parameters) or None
    saved = tuple(sorted(stored.saved))  # PEFT's list has names that the model need not have
    settings = replace(stored.settings, target_modules=targets, modules_to_save=saved)
    return _with_own(path, settings, base, _OWN_FIELDS - {_FINGERPRINT})


def _with_own(
    path: Path, settings: QLoRAConfig, base: Mapping[str, Any], fields: Collection[str]
) -> QLoRAConfig:
    """The settings with what our own file says of some fields, for which PEFT's has no place."""
    try:
        return replace(settings, **{name: base[name] for name in fields if name in base})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path / BASE_CONFIG}: {error}") from error


def adapter_bytes(model: nn.Module, name: str | None = None) -> tuple[int, int]:
    """The bytes of an adapter's values, and of all that it needs of its model: the base, as it is in memory."""
    name = sole_adapter(model, name)
    sizes = {
        own: sum(parameter.nbytes for parameter in adapter_parameters(model, own).values())
        for own in adapter_names(model)
    }
    return sizes[name], model_bytes(model) - sum(sizes.values())


# --- Reading ----------------------------------------------------------------------------------------


def _read_base(path: Path) -> dict[str, Any]:
    """What the folder says of the base; nothing in a folder of PEFT's."""
    path = path / BASE_CONFIG
    base = files.read_json(path) if path.exists() else {}
    if unknown := base.keys() - _OWN_FIELDS - {"codebook"}:
        raise ValueError(f"{path}: unknown field {min(unknown)!r}")
    codebook = base.pop("codebook", None)
    if "format" in base:
        try:
            check_stored(base["format"], codebook)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return base


def _add(model: nn.Module, stored: StoredAdapter, name: str) -> None:
    settings, stacks = stored.settings, stack_sizes(model)
    if not is_converted(model):  # else its base is frozen
        model.requires_grad_(False)
    for where, parts in stored.layers.items():
        layer = as_lora_layer(model, where)
        tensors = {
            factor: value.to(layer.device, torch.float32, copy=True)
            for factor, value in parts.items()
        }
        alpha = settings.alpha_of(pattern_name(where, stacks))
        options = {"alpha": alpha, "rslora": settings.rslora, "dropout": settings.dropout}
        start = Start(settings.init, settings.init_iterations)
        layer.add(name, Adapter(**tensors, **options, start=start))
    for where, values in stored.saved.items():
        as_saved_module(model, where).add(name, values)
    settle_new(model, name)


def _fill(model: nn.Module, stored: StoredAdapter, name: str) -> None:
    found, settings, stacks = hosts(model), stored.settings, stack_sizes(model)
    for where, parts in stored.layers.items():
        adapter = found[where].adapters[name]
        for factor, value in parts.items():
            getattr(adapter, factor).copy_(value)
        adapter.alpha = settings.alpha_of(pattern_name(where, stacks))
        adapter.rslora, adapter.dropout = settings.rslora, settings.dropout
        adapter.start = Start(settings.init, settings.init_iterations)
    for where, values in stored.saved.items():
        found[where].adapters[name].load_state_dict(values)


def _warn_of_another_base(path: Path, model: nn.Module, base: Mapping[str, Any], name: str) -> None:
    trained_on = base.get(_FINGERPRINT)
    if trained_on in (None, base_fingerprint(adapted_layers(model, name))):
        return
    hint = ""
    if base.get("init", "lora") != "lora":
        hint = f" (with init={base['init']!r} one made on another machine may differ in a few codes of a million)"
    warnings.warn(
        f"{path}: the adapter was trained on another base: other weights, or quantized "
        f"otherwise; what it adds may not fit{hint}",
        stacklevel=3,
    )
