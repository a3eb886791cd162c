"""Quantize while loading: a model folder becomes a quantized model one tensor at a time.

The model is built from its config with parameters on the meta device, which take no memory, and
quantized there, where only sizes are worked out. Then each tensor is read, quantized or cast, put
in its place and dropped. Peak memory is the quantized model, one tensor, and of the files what
`shards.MAP_BYTES` allows to be mapped at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from qlora.folder_config import check_causal, first_line, read_config, read_generation_config
from qlora.model_parts import is_conv1d
from qlora.placing import put, settle_adapters, start_adapters
from qlora.progress import Progress
from qlora.report import QuantizationReport
from qlora.shards import Shards, Tensors, paths
from qlora.tensor_names import NotStreamable, has_mixed_dtypes, match


class Convert(Protocol):
    """`quantize_model` with its config."""

    def __call__(
        self, model: nn.Module, *, layers: Collection[str] | None
    ) -> QuantizationReport: ...


def load_and_quantize(
    folder: Path,
    convert: Convert,
    device: torch.device,
    dtype: torch.dtype | None,
    read: Callable[[Path], Tensors] = Shards,
) -> tuple[nn.Module, QuantizationReport]:
    """The quantized model of a folder whose tensors are the model's own by shape, and but for renaming by name.

    Bit for bit what reading the whole model and quantizing it gives, adapters included.

    Args:
        folder: a model folder with config.json and safetensors.
        convert: `quantize_model` with its config; gets a model on the meta device.
        device: where each tensor is quantized, and stays.
        dtype: what the parameters that stay dense are cast to; None leaves them as they are.
        read: opens the folder's tensors. Where some are in 4 bits already, all others stay as they are.

    Returns:
        The model and the report of `convert`.

    Raises:
        NotStreamable: transformers has to read this folder, because it merges or splits weights on the
            way, say; the message is the reason.
        ValueError, FileNotFoundError: a file is damaged or missing, or a weight is not finite.
    """
    model, shards, places = open_folder(folder, read)
    plain = model.state_dict(keep_vars=True)
    dtypes = {key: plain[names[0]].dtype for key, names in places.items()}
    report = convert(model, layers=in_4_bits(model, shards, places))
    start_adapters(model, device)
    for key in Progress(list(places), "load and quantize"):
        tensor = shards.read(key)
        try:
            put(model, places[key], tensor, dtypes[key], device, dtype)
        except ValueError as error:
            raise ValueError(f"{shards.entries[key].file}: {key}: {error}") from error
        del tensor  # it would keep its file's map when that is to be dropped
    shards.close()
    settle_adapters(model)
    return model, report


def in_4_bits(model: nn.Module, shards: Tensors, places: dict[str, list[str]]) -> list[str] | None:
    """The names of the layers whose weights the files hold in 4 bits; None if they hold none."""
    keys = [key for key in places if shards.entries[key].in_4_bits]
    names = [name.rpartition(".")[0] for key in keys for name in places[key]]
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            raise NotStreamable(f"{name} is in 4 bits in the files and no linear layer")
    return names or None


def open_folder(
    folder: Path, read: Callable[[Path], Tensors] = Shards
) -> tuple[nn.Module, Tensors, dict[str, list[str]]]:
    """A skeleton, the folder's tensors and the names in the model that each has; see `load_and_quantize`."""
    config = read_config(folder)
    check_causal(folder, config)
    if not paths(folder):
        raise NotStreamable("it has neither model.safetensors nor an index of such files")
    shards = read(folder)
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
