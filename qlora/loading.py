"""Quantize while loading: a model folder becomes a quantized model one tensor at a time.

The model is built from its config with parameters on the meta device, which take no memory, and
quantized there, where only sizes are worked out. Then each tensor is read, quantized or cast, put
in its place and dropped. Peak memory is the quantized model, one tensor, and of the files what
`shards.MAP_BYTES` allows to be mapped at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qlora.convert import QuantizationReport
from qlora.folder_config import check_causal, first_line, read_config, read_generation_config
from qlora.modules import LoRALayer, QLoRALinear
from qlora.progress import Progress
from qlora.quantized import QuantizedTensor, quantize_4bit
from qlora.shards import Shards, paths
from qlora.tensor_names import NotStreamable, has_mixed_dtypes, match

Convert = Callable[[nn.Module], QuantizationReport]


def load_and_quantize(
    folder: Path, convert: Convert, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, QuantizationReport]:
    """The quantized model of a folder whose tensors are the model's own by shape, and but for renaming by name.

    Bit for bit what reading the whole model and quantizing it gives, adapters included.

    Args:
        folder: a model folder with config.json and safetensors.
        convert: `quantize_model` with its config; gets a model on the meta device.
        device: where each tensor is quantized, and stays.
        dtype: what the parameters that stay dense are cast to; None leaves them as they are.

    Returns:
        The model and the report of `convert`.

    Raises:
        NotStreamable: transformers has to read this folder, because it merges or splits weights on the
            way, say; the message is the reason.
        ValueError, FileNotFoundError: a file is damaged or missing, or a weight is not finite.
    """
    model, shards, places = _open(folder)
    dtypes = {key: _tensor(model, names[0]).dtype for key, names in places.items()}
    report = convert(model)
    start_adapters(model, device)
    for key in Progress(list(places), "load and quantize"):
        tensor = shards.read(key)
        try:
            put(model, places[key], tensor, dtypes[key], device, dtype)
        except ValueError as error:
            raise ValueError(f"{shards.entries[key].file}: {key}: {error}") from error
        del tensor  # it would keep its file's map when that is to be dropped
    shards.close()
    return model, report


def _open(folder: Path) -> tuple[nn.Module, Shards, dict[str, list[str]]]:
    """A skeleton, the folder's tensors and the names in the model that each has."""
    config = read_config(folder)
    check_causal(folder, config)
    if not paths(folder):
        raise NotStreamable("it has neither model.safetensors nor an index of such files")
    shards = Shards(folder)
    try:
        dtype = None
        if config.dtype is None and config.get_text_config().dtype is None:
            dtype = _only_dtype(shards)
        model = skeleton(config, dtype)
    except Exception as error:  # what is raised differs from one wrong value to the next
        raise NotStreamable(f"config.json's model cannot be made ({first_line(error)})") from error
    read_generation_config(folder, model)
    if model.config.dtype is None:
        raise NotStreamable("its files hold several dtypes, and config.json names none")
    if has_mixed_dtypes(model):
        raise NotStreamable("transformers keeps a part of this model in float32")
    return model, shards, match(shards, model)


def _only_dtype(shards: Shards) -> torch.dtype | None:
    """The dtype of all floating point tensors; None if they differ."""
    dtypes = {entry.dtype for entry in shards.entries.values()}
    floating = {dtype for dtype in dtypes if dtype is not None and dtype.is_floating_point}
    return floating.pop() if len(floating) == 1 else None


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
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **settings)
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
        device, dtype: see `load_and_quantize`; buffers keep their own dtype.
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
