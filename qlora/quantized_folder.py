"""Model folders in 4 bits, as `qlora quantize` writes them.

A Hugging Face model folder: config.json, safetensors, the tokenizer's files. config.json has a
`quantization_config` that says what the codes mean; the tensors are those of the quantized model's
state dict without adapters, what is not quantized in the dtype that it had. Which layers are in 4 bits they say.
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
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.convert import quantize_model
from qlora.fingerprint import base_settings
from qlora.folder_config import first_line, read_config, read_generation_config
from qlora.loading import Convert, skeleton
from qlora.modules import QLoRALinear
from qlora.placing import base_tensors, put, settle_adapters, start_adapters
from qlora.progress import Progress
from qlora.quantized import dtype_name
from qlora.report import QuantizationReport
from qlora.targets import find_linears
from qlora.tensor_names import shared_names

METHOD = "qlora"
STEM = "quantized"  # of the files; where transformers finds no "model", it makes no random one

_DTYPE_KEYS = {"dtype", "torch_dtype"}  # of config.json, today and formerly
_SCALES = (".absmax", ".nested_absmax", ".nested_offset")
_PARTS = (".packed", *_SCALES, "._extra_state")  # of a layer in 4 bits

_DENSE_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}
_KINDS = {
    "format": str,
    "blocksize": int,
    "double_quant": bool,
    "scale_format": str,
    "dtype": str,
    "other_dtypes": dict,
}


@dataclass(frozen=True)
class Settings:
    """What config.json says of a quantized folder.

    Attributes:
        base: the fields of QLoRAConfig that say how the base is quantized; without `scale_format` where
            the scales are not quantized.
        dtype: what the model's parameters and stored buffers were in before.
        other_dtypes: by name, those that were in another one.
    """

    base: Mapping[str, Any]
    dtype: torch.dtype
    other_dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)


def read_base(folder: Path) -> dict[str, Any]:
    """`Settings.base` of a folder that `save` wrote."""
    return dict(read_settings(folder).base)


def read_settings(folder: Path) -> Settings:
    """What config.json says of a folder that `save` wrote."""
    path = folder / "config.json"
    given = files.read_json(path)["quantization_config"]
    if unknown := given.keys() - _KINDS.keys() - {"quant_method"}:
        raise ValueError(f"{path}: quantization_config has an unknown field {min(unknown)!r}")
    base = {name: given[name] for name in BASE_FIELDS if name in given}
    for name in (*BASE_FIELDS[:3], *(BASE_FIELDS[3:] if base.get("double_quant") else ()), "dtype"):
        if given.get(name) is None:
            raise ValueError(f"{path}: quantization_config must have {name}")
    for name, value in given.items():
        if name in _KINDS and type(value) is not _KINDS[name]:
            kind = _KINDS[name].__name__
            raise ValueError(
                f"{path}: quantization_config: {name} must be of type {kind}; got {value!r}"
            )
    try:
        QLoRAConfig(**base)
        others = {name: _dtype(value) for name, value in given.get("other_dtypes", {}).items()}
        return Settings(base, _dtype(given["dtype"]), others)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: quantization_config: {error}") from error


def _dtype(name: Any) -> torch.dtype:
    if not isinstance(name, str) or name not in _DENSE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DENSE_DTYPES)}; got {name!r}")
    return _DENSE_DTYPES[name]


def load_folder(
    folder: Path,
    convert: Convert,
    device: torch.device,
    dtype: torch.dtype | None,
) -> tuple[nn.Module, QuantizationReport]:
    """The quantized model that `save` wrote, with new adapters; no dense weight is made.

    Args:
        folder: a folder that `save` wrote.
        convert, device, dtype: as for `loading.load_and_quantize`.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, or its tensors are not the model's
            by name, shape and dtype; the message names the file and the tensor.
    """
    model = _skeleton(folder, read_settings(folder))
    plain = model.state_dict(keep_vars=True)
    found = shards.Shards(folder, STEM)
    report = convert(model, layers=_in_4_bits(model, found))
    places = _places(folder, found, plain, base_tensors(model))
    start_adapters(model, device)
    for key in Progress(list(places), "load"):
        tensor = found.read(key)
        if key.endswith("_extra_state"):
            _check_meaning(model, key, tensor, found.entries[key].file)
        elif key.endswith(_SCALES) and not torch.isfinite(tensor).all():
            raise ValueError(f"{found.entries[key].file}: {key} must be finite")
        else:
            put(model, places[key], tensor, tensor.dtype, device, dtype)
        del tensor  # it would keep its file's map when that is to be dropped
    found.close()
    settle_adapters(model)
    return model, report


def _skeleton(folder: Path, settings: Settings) -> nn.Module:
    config, path = read_config(folder), folder / "config.json"
    try:
        model = skeleton(config, settings.dtype)
    except Exception as error:  # what is raised differs from one wrong value to the next
        raise ValueError(f"{path}: its model cannot be made ({first_line(error)})") from error
    read_generation_config(folder, model)
    tensors = model.state_dict(keep_vars=True)
    for name, dtype in settings.other_dtypes.items():
        if name not in tensors:
            raise ValueError(f"{path}: other_dtypes: no parameter or buffer {name!r}")
        tensors[name].data = tensors[name].data.to(dtype)
    return model


def _in_4_bits(model: nn.Module, found: shards.Shards) -> list[str] | None:
    """The layers of a plain model that the files hold in 4 bits, by all their names; None if they hold none."""
    owners = {key.rpartition(".")[0] for key in found.entries if key.endswith(_PARTS)}
    linears, heads, _ = find_linears(model)
    layers = linears | heads
    weights = {id(layer.weight) for name, layer in layers.items() if name in owners}
    return [name for name, layer in layers.items() if id(layer.weight) in weights] or None


def _places(
    folder: Path,
    found: shards.Shards,
    plain: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
) -> dict[str, list[str]]:
    """The names in the model by the key in the files, which must be all, and only, the model's.

    Args:
        plain, expected: the model's tensors before it was converted, by which some are tied, and after.
    """
    groups = shared_names({name: plain.get(name, tensor) for name, tensor in expected.items()})
    group_of = {name: names for names in groups for name in names}
    places: dict[str, list[str]] = {}
    key_of: dict[str, str] = {}
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
        if (first := key_of.setdefault(group_of[key][0], key)) != key:
            raise ValueError(
                f"{entry.file}: {first} and {key} are one tensor by config.json and two in the files"
            )
    for names in groups:
        if names[0] not in key_of:
            raise ValueError(f"{folder}: {names[0]} is missing in the safetensors files")
    return places


def _check_meaning(model: nn.Module, key: str, state: Tensor, file: Path) -> None:
    """Refuse codes that mean something else than the layer that gets them."""
    layer = model.get_submodule(key.rpartition(".")[0])
    try:
        layer.set_extra_state(state)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {key}: {error}") from error


def check_config(config: QLoRAConfig) -> None:
    """Any base can be written."""


def layers(model: nn.Module) -> None:
    """All that `quantize_model` quantizes by itself."""


def save(model: nn.Module, source: Path, folder: Path) -> None:
    """Write a quantized model, without its adapters, as a whole or not at all.

    Args:
        model: a model that was quantized from a folder, with dense parameters in their own dtype.
        source: that folder; its config and settings for generation are copied.
        folder: a new or empty folder, to be filled within `files.new_folder`.
    """
    described = {"quant_method": METHOD} | _describe(model, source)
    tensors = base_tensors(model)
    unique = {names[0]: tensors[names[0]].detach() for names in shared_names(tensors)}
    write(folder, STEM, unique, model, source, described)
    _check_written(folder, source)


def write(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    source: Path,
    described: Mapping[str, Any],
) -> None:
    """Write tensors and the source's settings, with `described` as config.json's quantization_config.

    Where the model's dtype has changed, or its embeddings are tied no longer (`merging`), config.json says so.
    """
    shards.write(folder, stem, tensors)
    config = files.read_json(source / "config.json")
    before = read_config(source)
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            if before.dtype != model.config.dtype:
                part |= {key: dtype_name(model.config.dtype) for key in _DTYPE_KEYS & part.keys()}
            if _is_tied(before) and not _is_tied(model.config):
                part["tie_word_embeddings"] = False
    files.write_json(folder / "config.json", config | {"quantization_config": described})
    generation = source / "generation_config.json"
    if generation.is_file():
        shutil.copy(generation, folder)


def _is_tied(config: Any) -> bool:
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))


def _check_written(folder: Path, source: Path) -> None:
    """Refuse what `load_folder` would refuse, as far as the files' headers show."""
    try:
        settings = read_settings(folder)
        model = _skeleton(folder, settings)
        plain = model.state_dict(keep_vars=True)
        found = shards.Shards(folder, STEM)
        config = QLoRAConfig(target_modules=None, **settings.base)
        quantize_model(model, config, _in_4_bits(model, found))
        _places(folder, found, plain, base_tensors(model))
    except (ValueError, OSError) as error:
        reason = str(error).replace(str(folder), "what was written")  # and will be gone
        raise ValueError(f"{source}: its model cannot be read back in 4 bits: {reason}") from error


def _describe(model: nn.Module, source: Path) -> dict[str, Any]:
    """The fields of Settings, as JSON holds them."""
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, QLoRALinear)}
    bases = [base_settings(layer) for layer in layers.values()]
    if not bases or any(base != bases[0] for base in bases):
        raise ValueError("model must hold quantized layers, all with the same format and scales")
    dtypes = {name: tensor.dtype for name, tensor in base_tensors(model).items()}
    dtypes |= {f"{name}.weight": layer.base_dtype for name, layer in layers.items()}
    usual = skeleton(read_config(source), model.config.dtype).state_dict(keep_vars=True)
    others = {
        name: dtype_name(dtypes[name])
        for name, tensor in usual.items()
        if dtypes.get(name, tensor.dtype) != tensor.dtype
    }
    settings = bases[0] | {"dtype": dtype_name(model.config.dtype)}
    return settings | ({"other_dtypes": others} if others else {})
