"""Model folders in 4 bits, as `qlora quantize` writes them.

A Hugging Face model folder: config.json, safetensors, the tokenizer's files. config.json has a
`quantization_config` that says what the codes mean; the tensors are those of the quantized model's
state dict without adapters, what is not quantized in the dtype that it had.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora import files, shards
from qlora.adapters import base_settings
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.convert import QuantizationReport
from qlora.loading import (
    Convert,
    put,
    read_config,
    read_generation_config,
    shared_names,
    skeleton,
    start_adapters,
)
from qlora.modules import LoRALayer, QLoRALinear
from qlora.progress import Progress

METHOD = "qlora"
STEM = "quantized"  # of the files; where transformers finds no "model", it makes no random one

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Settings:
    """What config.json says of a quantized folder.

    Attributes:
        base: the fields of QLoRAConfig that say how the base is quantized; without `scale_format` where
            the scales are not quantized.
        dtype: what the model's parameters were in before.
        other_dtypes: by name, those that were in another one.
    """

    base: Mapping[str, Any]
    dtype: torch.dtype
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def read_settings(folder: Path) -> Settings | None:
    """What config.json says of a folder that `save` wrote; None for any other folder."""
    path = folder / "config.json"
    given = files.read_json(path).get("quantization_config")
    if not isinstance(given, dict) or given.get("quant_method") != METHOD:
        return None
    known = {"quant_method", *BASE_FIELDS, "dtype", "other_dtypes"}
    if unknown := given.keys() - known:
        raise ValueError(f"{path}: quantization_config has an unknown field {min(unknown)!r}")
    base = {name: given[name] for name in BASE_FIELDS if name in given}
    for name in (*BASE_FIELDS[:3], *(BASE_FIELDS[3:] if base.get("double_quant") else ()), "dtype"):
        if given.get(name) is None:
            raise ValueError(f"{path}: quantization_config must have {name}")
    try:
        QLoRAConfig(**base)
        others = {name: _dtype(value) for name, value in given.get("other_dtypes", {}).items()}
        return Settings(base, _dtype(given["dtype"]), others)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: quantization_config: {error}") from error


def _dtype(name: Any) -> torch.dtype:
    if name not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}; got {name!r}")
    return _DTYPES[name]


def check_base(folder: Path, settings: Settings, config: QLoRAConfig) -> None:
    """Refuse a config that asks for another base than the folder holds."""
    for name, value in settings.base.items():
        if (asked := getattr(config, name)) != value:
            base = ", ".join(f"{name}={value!r}" for name, value in settings.base.items())
            raise ValueError(
                f"{folder}: is quantized already, with {base}; {name}={asked!r} contradicts that"
            )


def load(
    folder: Path,
    settings: Settings,
    convert: Convert,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, QuantizationReport]:
    """The quantized model that `save` wrote, with new adapters; no dense weight is made.

    Args:
        folder, settings: the folder, and what `read_settings` says of it.
        convert, device, dtype: as for `loading.load`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or its tensors are not the model's
            by name, shape and dtype; the message names the file and the tensor.
    """
    model = _skeleton(folder, settings)
    report = convert(model)
    expected = _base_tensors(model)
    found = shards.Shards(folder, STEM)
    places = _match(folder, found, expected)
    start_adapters(model, device)
    for key in Progress(list(places), "load"):
        tensor = found.read(key)
        if key.endswith("_extra_state"):
            _check_meaning(model, key, tensor, found.entries[key].file)
        else:
            put(model, places[key], tensor, tensor.dtype, device, dtype)
        del tensor  # it would keep its file's map while the next file is opened
    found.close()
    return model, report


def _skeleton(folder: Path, settings: Settings) -> nn.Module:
    try:
        config = read_config(folder)
        del config.quantization_config  # the merged model, say, has none
        model = skeleton(config, settings.dtype)
        read_generation_config(folder, model)
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"{folder}: cannot make the model of config.json ({reason})") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, dtype in settings.other_dtypes.items():
        if name not in parameters:
            raise ValueError(f"{folder / 'config.json'}: other_dtypes: no parameter {name!r}")
        parameters[name].data = parameters[name].data.to(dtype)
    return model


def _match(
    folder: Path, found: shards.Shards, expected: Mapping[str, Tensor]
) -> dict[str, list[str]]:
    """The names in the model by the key in the files, which must be all, and only, the model's."""
    groups = shared_names(expected)
    group_of = {name: names for names in groups for name in names}
    places = {}
    for key, entry in found.entries.items():
        if key not in expected:
            raise ValueError(f"{entry.file}: {key} is not in config.json's model")
        for what, given, own in (
            ("shape", entry.shape, tuple(expected[key].shape)),
            ("dtype", entry.dtype, expected[key].dtype),
        ):
            if given != own and not key.endswith("_extra_state"):
                raise ValueError(f"{entry.file}: {key} must have {what} {own}; got {given}")
        places[key] = group_of[key]
    for names in groups:
        if not any(name in places for name in names):
            raise ValueError(f"{folder}: {names[0]} is missing in the safetensors files")
    return places


def _check_meaning(model: nn.Module, key: str, state: Tensor, file: Path) -> None:
    """Refuse codes that mean something else than the layer that gets them."""
    layer = model.get_submodule(key.rpartition(".")[0])
    try:
        layer.set_extra_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {key}: {error}") from error


def save(model: nn.Module, source: Path, folder: Path) -> None:
    """Write a quantized model, without its adapters, as a whole or not at all.

    Args:
        model: a model that was quantized from a folder, with dense parameters in their own dtype.
        source: that folder; its config and settings for generation are copied.
        folder: a new or empty folder, to be filled within `files.new_folder`.
    """
    tensors = _base_tensors(model)
    unique = {names[0]: tensors[names[0]].detach() for names in shared_names(tensors)}
    shards.write(folder, STEM, unique)
    config = files.read_json(source / "config.json")
    config["quantization_config"] = {"quant_method": METHOD} | _describe(model, source)
    files.write_json(folder / "config.json", config)
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, folder)


def _describe(model: nn.Module, source: Path) -> dict[str, Any]:
    """The fields of Settings, as JSON holds them."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, QLoRALinear)]
    bases = [base_settings(layer) for _, layer in layers]
    if not bases or any(base != bases[0] for base in bases):
        raise ValueError("model must hold quantized layers, all with the same format and scales")
    dtypes = {f"{name}.weight": layer.base_dtype for name, layer in layers}
    dtypes |= {name: p.dtype for name, p in model.named_parameters() if not p.requires_grad}
    usual = skeleton(read_config(source), model.config.dtype).named_parameters(
        remove_duplicate=False
    )
    others = {
        name: _name(dtypes[name])
        for name, parameter in usual
        if dtypes.get(name, parameter.dtype) != parameter.dtype
    }
    settings = bases[0] | {"dtype": _name(model.config.dtype)}
    return settings | ({"other_dtypes": others} if others else {})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without adapters, with the parameters and buffers themselves."""
    adapters = {
        f"{name}.{factor}"
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer)
        for factor in ("lora_a", "lora_b")
    }
    tensors = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in tensors.items() if name not in adapters}
