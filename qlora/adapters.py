"""Adapters as files in PEFT's format, and their merging into the base.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, which PEFT reads and
writes too, and `qlora_config.json`: the data type of the base that the adapter was trained on, and
a fingerprint of it.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora import files
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.modules import LoRALayer, QLoRALinear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE_CONFIG = "qlora_config.json"

_PREFIX = "base_model.model."
_FACTORS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}  # ours and PEFT's names
_FINGERPRINT = "fingerprint"
_SAMPLES = 1 << 16  # of a layer's weight, in its fingerprint

# Fields of adapter_config.json that only some values are allowed for. What pissa, loftq and others
# of that kind start from is a changed base weight, which the adapter's file does not hold.
_ALLOWED_VALUES: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
# Fields that we read, or that do not change what a trained adapter computes. Any other field must
# be empty: it switches on a variant of LoRA.
_KNOWN_FIELDS = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "fan_in_fan_out", "inference_mode", "task_type"),
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core"),
    *("eva_config", "loftq_config", "qalora_group_size", "ensure_weight_tying"),
}


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's adapter to a folder that `load_adapter` and PEFT read.

    Other files in the folder stay. Each file is replaced as a whole.

    Raises:
        ValueError: layers differ in rank, scaling, dropout or base, for which the files have one
            place only.
    """
    path = Path(path)
    layers = _adapted_layers(model)
    settings = adapter_settings(model)
    base = {name: settings[name] for name in BASE_FIELDS if name in settings}
    files.write_tensors(path / WEIGHTS, _by_key(layers))
    files.write_json(path / CONFIG, _peft_config(model, layers))
    files.write_json(path / BASE_CONFIG, base | {_FINGERPRINT: base_fingerprint(model)})


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Replace the values of the model's adapter by those of a folder from us or from PEFT.

    All is checked before the first value changes. The base is not touched. An adapter that was
    trained on another base, as far as its folder says, is loaded with a warning.

    Raises:
        FileNotFoundError, ValueError: a file is missing, damaged, made for another model or rank,
            or uses a variant of LoRA that is not supported; the message names it.
    """
    path = Path(path)
    layers = _adapted_layers(model)
    rank, scaling, _ = _read_peft_config(path / CONFIG)
    tensors = files.read_tensors(path / WEIGHTS)
    ours = next(iter(layers.values())).rank
    if rank != ours:
        raise ValueError(f"{path}: the adapter has rank {rank}, the model's layers have {ours}")
    targets = _by_key(layers)
    _check_tensors(path / WEIGHTS, tensors, targets)
    trained_on = _read_base(path).get(_FINGERPRINT)
    if trained_on not in (None, base_fingerprint(model)):
        warnings.warn(
            f"{path}: the adapter was trained on another base: other weights, or quantized "
            "otherwise; what it adds may not fit",
            stacklevel=2,
        )
    with torch.no_grad():
        for key, parameter in targets.items():
            parameter.copy_(tensors[key])
    for layer in layers.values():
        layer.scaling = scaling


def read_config(path: str | os.PathLike[str]) -> QLoRAConfig:
    """The QLoRAConfig with which `quantize_model` makes a model that this adapter fits.

    An adapter that PEFT wrote does not say what its base was; then the base's settings are the
    defaults.
    """
    path = Path(path)
    rank, scaling, dropout = _read_peft_config(path / CONFIG)
    keys = files.read_tensors(path / WEIGHTS).keys()
    names = {key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in keys}
    base = _read_base(path)
    base.pop(_FINGERPRINT, None)
    try:
        return QLoRAConfig(
            rank, scaling * rank, dropout, target_modules=tuple(sorted(names)), **base
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def merge(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every quantized layer, in place, by the dense layer with its adapter added in.

    W + scaling * B A is summed in fp32 over the dequantized W and rounded once, to `dtype` or
    else to the dtype that the layer had before it was quantized. Returns the model (or, where the
    model itself is such a layer, the dense layer). Its parameters stay frozen.
    """
    dense: dict[LoRALayer, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, LoRALayer):
            continue
        if layer not in dense:
            dense[layer] = _dense(name, layer, dtype or layer.base_dtype)
        if layer is model:
            return dense[layer]
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, dense[layer])
    if not dense:
        raise ValueError("model must hold QLoRA layers to merge; it has none")
    return model


def enable_adapters(model: nn.Module, enabled: bool = True) -> None:
    """Switch the model's adapters on, or off: then it answers as its base alone."""
    for layer in _adapted_layers(model).values():
        layer.adapter_enabled = enabled


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their names in the model."""
    return {
        f"{name}.{factor}": getattr(layer, factor)
        for name, layer in _adapted_layers(model).items()
        for factor in _FACTORS
    }


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Rank, scaling, dropout and dtype, and the data type of the base: one value each for all layers."""
    (first, layer), *others = _adapted_layers(model).items()
    settings = _layer_settings(layer)
    for name, other in others:
        for key, value in _layer_settings(other).items():
            if value != settings.get(key):
                raise ValueError(
                    f"all adapted layers must have the same {key}; got {settings.get(key)!r} in "
                    f"{first} and {value!r} in {name}"
                )
    return settings


def base_fingerprint(model: nn.Module) -> str:
    """A short checksum of the adapted layers' base weights, to tell one base from another.

    It is taken over evenly spaced samples of each weight. A quantized one is known by its codes,
    which are the same on every device, a dense one by its values in bfloat16, to which it may be
    cast in order to compute.
    """
    digest = hashlib.sha256()
    for name, layer in _adapted_layers(model).items():
        is_dense = not isinstance(layer, QLoRALinear)
        weight = layer.weight.detach() if is_dense else layer.packed
        samples = weight.reshape(-1)[:: -(-weight.numel() // _SAMPLES)]
        values = samples.bfloat16().view(torch.int16) if is_dense else samples
        digest.update(name.encode() + values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def plain_name(name: str) -> str:
    """The name of a module or parameter without what `torch.compile` adds to it."""
    return name.replace("_orig_mod.", "")


def _layer_settings(layer: LoRALayer) -> dict[str, Any]:
    adapter = {"rank": layer.rank, "scaling": layer.scaling, "dropout": layer.dropout}
    dtype = {"dtype": str(layer.lora_a.dtype).removeprefix("torch.")}
    return adapter | dtype | base_settings(layer)


def base_settings(layer: LoRALayer) -> dict[str, Any]:
    """Fields of QLoRAConfig that say what the base is."""
    if not isinstance(layer, QLoRALinear):
        return {"format": None}
    settings: dict[str, Any] = {"format": layer.format, "blocksize": layer.blocksize}
    if layer.scale_format:
        return settings | {"double_quant": True, "scale_format": layer.scale_format}
    return settings | {"double_quant": False}


def _adapted_layers(model: nn.Module) -> dict[str, LoRALayer]:
    layers = {
        plain_name(name): module
        for name, module in model.named_modules()
        if isinstance(module, LoRALayer) and module.lora_a is not None
    }
    if not layers:
        raise ValueError("model must have adapters: call quantize_model(model, config) first")
    return layers


def _by_key(layers: Mapping[str, LoRALayer]) -> dict[str, nn.Parameter]:
    """The adapters' parameters by their keys in the file."""
    return {
        f"{_PREFIX}{name}.{theirs}": getattr(layer, ours)
        for name, layer in layers.items()
        for ours, theirs in _FACTORS.items()
    }


def _read_base(path: Path) -> dict[str, Any]:
    """What the folder says of the base; nothing in a folder of PEFT's."""
    base = files.read_json(path / BASE_CONFIG) if (path / BASE_CONFIG).exists() else {}
    if unknown := base.keys() - {*BASE_FIELDS, _FINGERPRINT}:
        raise ValueError(f"{path / BASE_CONFIG}: unknown field {sorted(unknown)[0]!r}")
    return base


def _peft_config(model: nn.Module, layers: Mapping[str, LoRALayer]) -> dict[str, Any]:
    layer = next(iter(layers.values()))
    alpha = layer.scaling * layer.rank
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model),
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "r": layer.rank,
        "lora_alpha": round(alpha) if math.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": layer.dropout,
        "target_modules": _target_modules(model, layers.keys()),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        "bias": "none",
    }


def _task_type(model: nn.Module) -> str | None:
    """What PEFT's AutoPeftModel... classes look for."""
    if not hasattr(model, "prepare_inputs_for_generation"):
        return None
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _target_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Last parts of the names (q_proj, ...) where these single out the layers, else all names."""
    names = set(names)
    last_parts = {_last_part(name) for name in names}
    everything = (plain_name(name) for name, _ in model.named_modules())
    matched = {name for name in everything if _last_part(name) in last_parts}
    return sorted(last_parts if matched == names else names)


def _last_part(name: str) -> str:
    return name.rpartition(".")[2]


def _read_peft_config(path: Path) -> tuple[int, float, float]:
    """(rank, scaling, dropout), or an error that names what is not supported."""
    config = files.read_json(path)
    for name, value in config.items():
        allowed = _ALLOWED_VALUES.get(name)
        if (value not in allowed) if allowed else (value and name not in _KNOWN_FIELDS):
            raise ValueError(f"{path}: {name} = {value!r} is not supported, only plain LoRA is")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    dropout = config.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{path}: r must be an integer of at least 1; got {rank!r}")
    for name, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{path}: {name} must be a finite number; got {value!r}")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), dropout


def _check_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, nn.Parameter]
) -> None:
    missing, extra = targets.keys() - tensors.keys(), tensors.keys() - targets.keys()
    if missing or extra:
        parts = ((missing, "missing"), (extra, "not in the model"))
        found = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for keys, what in parts if keys)
        raise ValueError(f"{path}: the adapter is for another model or other layers: {found}")
    for key, parameter in targets.items():
        if tensors[key].shape != parameter.shape:
            shapes = f"{tuple(tensors[key].shape)}, not {tuple(parameter.shape)}"
            raise ValueError(f"{path}: the adapter is for another model: {key} has shape {shapes}")
        if not torch.isfinite(tensors[key]).all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values")


def _some(keys: Iterable[str], count: int = 3) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:count]) + (", ..." if len(keys) > count else "")


def _dense(name: str, layer: LoRALayer, dtype: torch.dtype) -> nn.Module:
    exact = layer.merged_weight()
    weight = exact.to(dtype)
    if not torch.isfinite(weight).all():
        hint = (
            "; merge to bfloat16, which has float32's range" if torch.isfinite(exact).all() else ""
        )
        raise ValueError(f"{name or 'model'}: the merged weight is not finite in {dtype}{hint}")
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    with torch.device("meta"):  # no memory and no time for values that are replaced at once
        if layer.fan_in_fan_out:
            from transformers.pytorch_utils import Conv1D

            dense, weight = Conv1D(layer.out_features, layer.in_features), weight.mT.contiguous()
        else:
            dense = nn.Linear(layer.in_features, layer.out_features, bias=bias is not None)
    dense.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        dense.bias = nn.Parameter(bias, requires_grad=False)
    return dense.train(layer.training)
