"""Model folders in bitsandbytes' 4-bit layout, as transformers writes and reads them.

A Hugging Face model folder whose config.json has a `quantization_config` with quant_method "bitsandbytes" and
whose safetensors hold some linear layers in 4 bits, each in several tensors (see `bnb_format`). Which layers
these are the files say: all others stay dense, linear or not. A Conv1D's weight lies there as [n, k], as ours does.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora import bnb_format, files, quantized_folder
from qlora.config import QLoRAConfig
from qlora.convert import quantize_model
from qlora.experts import QLoRAExperts
from qlora.folder_config import read_config
from qlora.loading import Convert, in_4_bits, load_and_quantize, open_folder, skeleton
from qlora.lora_layer import LoRALayer
from qlora.model_parts import is_conv1d
from qlora.modules import QLoRALinear
from qlora.placing import base_tensors
from qlora.quantized import QuantizedTensor, dtype_name
from qlora.report import QuantizationReport
from qlora.shards import Entry, Shards
from qlora.targets import find_linears
from qlora.tensor_names import NotStreamable, stays_dense

METHOD = "bitsandbytes"
STEM = "model"  # of the files, as of a dense model's
_WRAPPERS = (
    "base_model.model.",
    "module.",
)  # what PEFT's and torch's put before the names of tensors


class BnbShards:
    """The tensors of such a folder, of which those of a weight in 4 bits are read as one.

    Attributes:
        entries: by key, as in `Shards`; a weight in 4 bits by its name.

    Raises:
        ValueError: the files hold weights in 8 bits, or none in 4; or what should say what the codes of one
            mean is damaged; the message names the file and the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._files = Shards(folder, STEM)
        stored = self._files.entries
        bnb_format.check_not_int8(stored)
        self._keys: dict[str, list[str]] = {}
        for key in stored:
            if (name := bnb_format.weight_of(key)) is not None:
                self._keys.setdefault(name, [name] if name in stored else []).append(key)
        if not self._keys:
            said = f"config.json says {METHOD}, and the files hold no weight in 4 bits"
            raise ValueError(f"{folder}: {said}")
        inner = {key for keys in self._keys.values() for key in keys}
        self.entries = {key: entry for key, entry in stored.items() if key not in inner}
        self.entries |= {name: self._entry(name, keys) for name, keys in self._keys.items()}

    def _entry(self, name: str, keys: list[str]) -> Entry:
        """What the weight is, by its state alone."""
        file = self._files.entries[keys[0]].file
        try:
            key = bnb_format.state_key(keys, name)
            file = self._files.entries[key].file
            state = bnb_format.read_state(key, self._files.read(key))
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        return Entry(file, tuple(state["shape"]), bnb_format.DTYPES[state["dtype"]], in_4_bits=True)

    def read(self, key: str) -> Tensor | QuantizedTensor:
        """A tensor on the CPU, in the file's mapped memory; or a weight in 4 bits, in memory of its own.

        Raises:
            ValueError: one of the weight's tensors is missing or damaged; the message names it.
        """
        if key not in self._keys:
            return self._files.read(key)
        parts = {part: self._files.read(part).clone() for part in self._keys[key]}
        try:
            return bnb_format.from_bitsandbytes(parts, key)
        except ValueError as error:
            raise ValueError(f"{self.entries[key].file}: {error}") from error

    def close(self) -> None:
        """As `Shards.close`."""
        self._files.close()


def read_base(folder: Path) -> dict[str, Any]:
    """The fields of QLoRAConfig that say how the base is quantized, as the first weight in the files is.

    Raises:
        ValueError, FileNotFoundError: as `BnbShards`; or config.json says 8 bits.
    """
    path = folder / "config.json"
    given = files.read_json(path)["quantization_config"]
    if given.get("load_in_8bit") or given.get("_load_in_8bit"):
        raise ValueError(
            f"{path}: the model is in 8 bits (LLM.int8), which is not supported; "
            "load a 16-bit or a 4-bit model"
        )
    weights = BnbShards(folder)
    first = next(key for key, entry in weights.entries.items() if entry.in_4_bits)
    return weights.read(first).settings


def load_folder(
    folder: Path, convert: Convert, device: torch.device, dtype: torch.dtype | None
) -> tuple[nn.Module, QuantizationReport]:
    """The model of such a folder, its weights bit for bit those of the files, with new adapters.

    Args:
        folder, convert, device, dtype: as for `loading.load_and_quantize`.

    Raises:
        ValueError, FileNotFoundError: a file is missing or damaged, or transformers would have to change weights
            as it reads them; the message names what.
    """
    try:
        return load_and_quantize(folder, convert, device, dtype, BnbShards)
    except NotStreamable as reason:
        for key, entry in Shards(folder, STEM).entries.items():
            if key.startswith(_WRAPPERS):
                raise ValueError(
                    f"{entry.file}: {key} has the prefix of what the model was wrapped in (PEFT, DataParallel, ...); "
                    "save the model inside, or rename the tensors"
                ) from reason
        raise ValueError(
            f"{folder}: {reason}, which is not supported in the layout of {METHOD}; "
            "quantize the 16-bit model that it was made of"
        ) from reason


def check_config(config: QLoRAConfig) -> None:
    """Refuse a base that bitsandbytes has no format for."""
    bnb_format.check_base(config.format, config.scale_format if config.double_quant else "")


def layers(model: nn.Module) -> list[str]:
    """The names of the layers of a dense model to hold in 4 bits in such a folder."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [name for name in find_linears(model)[0] if _is_linear(modules.get(name))]
    return [name for name in names if not stays_dense(model, name, ())]


def _is_linear(module: nn.Module | None) -> bool:
    """What transformers replaces by bitsandbytes' layer."""
    return type(module) is nn.Linear or is_conv1d(module)


def state_dict(model: nn.Module, storage: torch.dtype = torch.uint8) -> dict[str, Tensor]:
    """A quantized model's state dict without adapters, with bitsandbytes' keys; those of a tied tensor once.

    Args:
        model: quantized by `quantize_model` to "nf4" or "fp4".
        storage: the dtype that packed codes are stored as.

    Raises:
        ValueError: bitsandbytes has no such format; the message names the layer.
    """
    hosts = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, LoRALayer)
    }
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in base_tensors(model).items():
        owner, _, attribute = name.rpartition(".")
        layer = hosts.get(owner)
        place = tensor.data_ptr(), tensor.shape
        if (tensor.numel() and place in seen) or (
            isinstance(layer, QLoRALinear) and attribute not in ("packed", "bias")
        ):
            continue
        seen.add(place)
        if isinstance(layer, QLoRALinear) and attribute == "packed":
            try:
                tensors |= bnb_format.to_bitsandbytes(layer.weight, storage, f"{owner}.weight")
            except ValueError as error:
                raise ValueError(f"{owner}: {error}") from error
        else:
            turned = layer is not None and layer.fan_in_fan_out and attribute == "weight"
            tensors[name] = tensor.detach().mT if turned else tensor.detach()
    return tensors


def save(model: nn.Module, source: Path, folder: Path, storage: torch.dtype = torch.uint8) -> None:
    """Write a quantized model, without its adapters, for transformers with bitsandbytes, as a whole or not at all.

    Args:
        model, source, folder: as for `quantized_folder.save`.
        storage: as for `state_dict`; sharding a model with FSDP wants that of its other parameters.

    Raises:
        ValueError: bitsandbytes has no such format, or transformers would not find its layers in 4 bits.
    """
    named = list(model.named_modules(remove_duplicate=False))
    quantized = {name: layer for name, layer in named if isinstance(layer, QLoRALinear)}
    if experts := [name for name, module in named if isinstance(module, QLoRAExperts)]:
        raise ValueError(
            f"{experts[0]}: experts one by one are not in the layout of {METHOD}; "
            "quantize_folder leaves them stacked and dense"
        )
    if not quantized:
        raise ValueError("model must hold quantized layers; call quantize_model first")
    plain = skeleton(read_config(source))
    modules = plain.named_modules(remove_duplicate=False)
    skipped = [name for name, module in modules if _is_linear(module) and name not in quantized]
    for name in quantized:
        if stays_dense(plain, name, skipped):
            raise ValueError(
                f"{name}: transformers keeps this layer dense, it must not be in 4 bits"
            )
    layer = next(iter(quantized.values()))
    described = _describe(layer.weight, model.config.dtype, storage, skipped)
    quantized_folder.write(folder, STEM, state_dict(model, storage), model, source, described)
    _check_written(folder, source)


def _describe(
    weight: QuantizedTensor, dtype: torch.dtype, storage: torch.dtype, skipped: Iterable[str]
) -> dict[str, Any]:
    """As transformers writes it. It reads the block size from the files."""
    return {
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "bnb_4bit_compute_dtype": dtype_name(dtype),
        "bnb_4bit_quant_storage": dtype_name(storage),
        "bnb_4bit_quant_type": weight.format,
        "bnb_4bit_use_double_quant": bool(weight.scale_format),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(skipped),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "quant_method": METHOD,
    }


def _check_written(folder: Path, source: Path) -> None:
    """Refuse what `load_folder` would refuse, as far as the files' headers show."""
    try:
        base = read_base(folder)
        model, weights, places = open_folder(folder, BnbShards)
        quantize_model(
            model, QLoRAConfig(target_modules=None, **base), in_4_bits(model, weights, places)
        )
    except (ValueError, OSError, NotStreamable) as error:
        reason = str(error).replace(str(folder), "what was written")  # and will be gone
        raise ValueError(
            f"{source}: its model cannot be read back in the layout of {METHOD}: {reason}"
        ) from error
