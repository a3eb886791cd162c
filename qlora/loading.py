"""Quantize while loading: a model folder becomes a quantized model one tensor at a time.

The model is built from its config with parameters on the meta device, which take no memory, and
quantized there, where only sizes are worked out. Then each tensor is read, quantized or cast, put
in its place and dropped. Peak memory is the quantized model, one tensor and the map of one file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qlora.convert import QuantizationReport
from qlora.modules import LoRALayer, QLoRALinear
from qlora.progress import Progress
from qlora.quantized import QuantizedTensor, quantize_4bit
from qlora.shards import Shards

Convert = Callable[[nn.Module], QuantizationReport]

# Keys that older versions of transformers wrote, for tables that the model makes by itself now:
# the buffer's name, and what is ignored where the model has such a buffer.
_FORMER_BUFFERS = {
    "rotary_emb.inv_freq": r"rotary_emb\.inv_freq",
    "position_ids": r"(^|\.)position_ids$",
}


def load(
    folder: Path, convert: Convert, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, QuantizationReport] | None:
    """The quantized model of a folder whose tensors are the model's own by shape, and but for renaming by name.

    Bit for bit what reading the whole model and quantizing it gives, adapters included.

    Args:
        folder: a model folder with config.json and safetensors.
        convert: `quantize_model` with its config; gets a model on the meta device.
        device: where each tensor is quantized, and stays.
        dtype: what the parameters that stay dense are cast to; None leaves them as they are.

    Returns:
        The model and the report of `convert`; or None if transformers has to read this folder, because
        it merges or splits weights on the way, or because there is an error to explain.
    """
    opened = _open(folder)
    if opened is None:
        return None
    model, shards, places = opened
    dtypes = {key: _tensor(model, names[0]).dtype for key, names in places.items()}
    report = convert(model)
    start_adapters(model, device)
    for key in Progress(list(places), "load and quantize"):
        tensor = shards.read(key)
        try:
            put(model, places[key], tensor, dtypes[key], device, dtype)
        except ValueError as error:
            raise ValueError(f"{shards.entries[key].file}: {key}: {error}") from error
        del tensor  # it would keep its file's map while the next file is opened
    shards.close()
    return model, report


def skeleton(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model in evaluation mode, with parameters on the meta device and true buffers.

    Args:
        config: a transformers config.
        dtype: of the parameters; the config's by default. float64 becomes float32.

    torch's generator is left as it was.
    """
    from transformers import AutoModelForCausalLM

    settings = {} if dtype is None else {"dtype": dtype}
    hook = register_module_parameter_registration_hook(_to_meta)
    try:
        with torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, **settings)
            _fill_buffers(model)
    finally:
        hook.remove()
    return (model.float() if model.dtype == torch.float64 else model).eval()


def _fill_buffers(model: nn.Module) -> None:
    """Work the buffers out again, as transformers does when it has read a model's weights.

    While a model is made torch's default dtype is the model's, in which some tables would be rounded.
    """
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()


def _to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """Replaces each parameter as it is registered; None keeps it."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def read_config(folder: Path) -> Any:
    """The folder's transformers config, which remembers the folder as the model's name."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.name_or_path = str(folder)
    return config


def read_generation_config(folder: Path, model: nn.Module) -> None:
    """Give the model the folder's settings for generation, or those in its config."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    if (folder / "generation_config.json").is_file():
        settings = GenerationConfig.from_pretrained(folder, local_files_only=True)
    else:
        settings = GenerationConfig.from_model_config(model.config)
    model.generation_config = settings


def check_causal(folder: Path, config: Any) -> None:
    """Refuse an encoder, which transformers makes a causal model of whose tokens see those after."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    fills_masks = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills_masks and getattr(config, "is_decoder", None) is False:
        name = ", ".join(config.architectures or [config.model_type])
        raise ValueError(f"{folder}: {name} is an encoder; a causal language model is needed")


def start_adapters(model: nn.Module, device: torch.device) -> None:
    """Give adapters on the meta device their first values, drawn on the CPU as a dense model's are."""
    for layer in model.modules():
        if isinstance(layer, LoRALayer) and layer.lora_a is not None:
            layer.lora_a = nn.Parameter(torch.empty_like(layer.lora_a, device="cpu"))
            layer.lora_b = nn.Parameter(torch.empty_like(layer.lora_b, device="cpu"))
            layer.reset_adapter()
            layer.lora_a.data, layer.lora_b.data = layer.lora_a.to(device), layer.lora_b.to(device)


def put(
    model: nn.Module,
    names: Iterable[str],
    tensor: Tensor,
    own_dtype: torch.dtype,
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Put a file's tensor into the model under all names that share it, quantized where the layer is.

    Args:
        own_dtype: the model's for this tensor, to which it is cast before anything else.
        device, dtype: see `load`; buffers keep their own dtype.
    """
    value = tensor.to(device).to(own_dtype)
    quantized: dict[bool, QuantizedTensor] = {}
    parameter = buffer = None
    for name in names:
        module, attribute = _owner(model, name)
        if isinstance(module, QLoRALinear) and attribute == "weight":
            if module.fan_in_fan_out not in quantized:
                quantized[module.fan_in_fan_out] = _quantize(value, module)
            module.weight = quantized[module.fan_in_fan_out]
        elif attribute in module._buffers:
            buffer = _own(value, tensor) if buffer is None else buffer
            setattr(module, attribute, buffer)
        else:
            if parameter is None:
                cast = value.is_floating_point() and dtype is not None
                kept = _own(value.to(dtype) if cast else value, tensor)
                parameter = nn.Parameter(kept, requires_grad=False)
            setattr(module, attribute, parameter)


def _quantize(weight: Tensor, layer: QLoRALinear) -> QuantizedTensor:
    """As the layer is, whose weight has no values yet."""
    return quantize_4bit(
        weight.mT if layer.fan_in_fan_out else weight,
        layer.format,
        layer.blocksize,
        bool(layer.scale_format),
        layer.scale_format or "dynamic8",
    )


def _own(value: Tensor, mapped: Tensor) -> Tensor:
    """The value in memory of its own, not in the file's map."""
    return value.clone() if value.data_ptr() == mapped.data_ptr() else value


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute


def _tensor(model: nn.Module, name: str) -> Tensor:
    module, attribute = _owner(model, name)
    return getattr(module, attribute)


# --- Whether a folder's tensors are the model's own -------------------------------------------------


def _open(folder: Path) -> tuple[nn.Module, Shards, dict[str, list[str]]] | None:
    """A skeleton, the folder's tensors and the names in the model that each has; see `load`."""
    from safetensors import SafetensorError

    try:
        shards, config = Shards(folder), read_config(folder)
        check_causal(folder, config)
        dtype = None
        if config.dtype is None and config.get_text_config().dtype is None:
            dtype = _only_dtype(shards)
        model = skeleton(config, dtype)
        read_generation_config(folder, model)
        places = _match(shards, model)
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError, ImportError):
        return None  # transformers meets the same, and the error is worded there
    if places is None or model.config.dtype is None or _has_mixed_dtypes(model):
        return None
    return model, shards, places


def _only_dtype(shards: Shards) -> torch.dtype | None:
    """The dtype of all floating point tensors; None if they differ."""
    dtypes = {entry.dtype for entry in shards.entries.values()}
    floating = {dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point}
    return floating.pop() if len(floating) == 1 else None


def _has_mixed_dtypes(model: nn.Module) -> bool:
    """Whether transformers keeps some modules of this 16-bit model in fp32."""
    names = {"_keep_in_fp32_modules_strict"} if model.dtype != torch.float32 else set()
    if model.dtype == torch.float16:
        names.add("_keep_in_fp32_modules")
    return any(getattr(model, name, None) for name in names)


def _match(shards: Shards, model: nn.Module) -> dict[str, list[str]] | None:
    """The names in the model by the key in the files; None unless each tensor is there just once."""
    tensors = model.state_dict(keep_vars=True)
    names_of = {name: names for names in shared_names(tensors) for name in names}
    ignored = _ignored(model)
    places = {}
    for key, name in _renamed(model, shards.entries, tensors).items():
        entry, own = shards.entries[key], tensors.get(name) if name else None
        if own is None and ignored is not None and ignored.search(name or key):
            continue
        if (
            not isinstance(own, Tensor)
            or entry.shape != own.shape
            or not _castable(entry.dtype, own.dtype)
        ):
            return None
        places[key] = names_of[name]
    found = sorted(name for names in places.values() for name in names)
    return places if found == sorted(tensors) else None


def _renamed(
    model: nn.Module, keys: Iterable[str], tensors: Mapping[str, Tensor]
) -> dict[str, str | None]:
    """The model's name for each key, as transformers renames it; None where it merges, splits or turns."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    names = {}
    for key in sorted(keys):
        name, converter = rename_source_key(key, renamings, converters, prefix, tensors)
        if name not in tensors and key in tensors:  # the pattern was not meant for this one
            name, converter = rename_source_key(key, [], [], prefix, tensors)
        names[key] = name if converter is None else None
    return {key: names[key] for key in keys}


def shared_names(tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """The names of a state dict (with `keep_vars`), those of one tensor together."""
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _castable(given: torch.dtype | None, own: torch.dtype) -> bool:
    if given is None:
        return False
    return given == own or (given.is_floating_point and own.is_floating_point)


def _ignored(model: nn.Module) -> re.Pattern[str] | None:
    """Keys that transformers passes over in silence for this model."""
    patterns = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    buffers = [name for name, _ in model.named_buffers()]
    for ending, pattern in _FORMER_BUFFERS.items():
        if any(name.endswith(ending) for name in buffers):
            patterns.add(pattern)
    return re.compile("|".join(f"({pattern})" for pattern in patterns)) if patterns else None
