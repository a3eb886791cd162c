"""Model folders: what is checked before transformers reads them, and quantized models from them."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora import bnb, files, quantized_folder, shards
from qlora.adapter_files import load_adapter
from qlora.config import BASE_FIELDS, QLoRAConfig
from qlora.convert import quantize_model
from qlora.evaluation import compute_dtype
from qlora.folder_config import check_causal, first_line, own_code, read_config
from qlora.loading import load_and_quantize
from qlora.report import QuantizationReport
from qlora.tensor_names import NotStreamable

LAYOUTS = {module.METHOD: module for module in (quantized_folder, bnb)}
"""How a folder can hold a model in 4 bits, by quant_method in its config.json's quantization_config."""

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "*.model")
_CHAT_TEMPLATES = "chat_template*"


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, or an error that says what a model folder must hold."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. A model is a local folder with config.json, *.safetensors "
            "and the tokenizer's files; models are not downloaded"
        )
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder}: is an adapter's folder, not a model's: give its base as the model, and this with --adapter"
        )
    if _quantization(folder) not in LAYOUTS:
        _check_not_quantized(folder)
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no *.safetensors in the folder")
    return folder


def check_dense(folder: str | os.PathLike[str]) -> Path:
    """As `check_folder`, and not in 4 bits either."""
    folder = check_folder(folder)
    _check_not_quantized(folder)
    return folder


def _check_not_quantized(folder: Path) -> None:
    if (method := _quantization(folder)) is not None:
        raise ValueError(
            f"{folder}: quantized already ({method}), a dense model is needed: "
            "give the folder that it was made from"
        )


def _quantization(folder: Path) -> str | None:
    """How a folder says that it is quantized; None for a dense one."""
    path = folder / "config.json"
    given = files.read_json(path).get("quantization_config")
    if given is None:
        return None
    if given == {}:
        raise ValueError(
            f"{path}: quantization_config is empty; take it out if the model is dense, or give its quant_method"
        )
    if not isinstance(given, dict):
        raise ValueError(f"{path}: quantization_config must be a JSON object; got {given!r}")
    by_bits = any(given.get(f"load_in_{bits}bit") for bits in (4, 8))  # all that the oldest say
    return str(given.get("quant_method", bnb.METHOD if by_bits else "unknown"))


def base_settings(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of QLoRAConfig that a folder in 4 bits settles; none for a dense one."""
    layout = LAYOUTS.get(_quantization(folder := check_folder(folder)))
    return {} if layout is None else layout.read_base(folder)


def check_base(folder: str | os.PathLike[str], config: QLoRAConfig) -> None:
    """Refuse a config that asks for another base than a folder in 4 bits holds."""
    settled = base_settings(folder)
    for name, value in settled.items():
        if (asked := getattr(config, name)) != value:
            base = ", ".join(f"{name}={value!r}" for name, value in settled.items())
            raise ValueError(
                f"{folder}: is quantized already, with {base}; {name}={asked!r} contradicts that"
            )
    if settled and config.init != "lora":
        raise ValueError(
            f"{folder}: is quantized already, and init={config.init!r} starts from the weights before that; "
            "take the dense model"
        )


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    folder = check_folder(folder)
    # theirs looks at config.json as well, and would be blamed for what is wrong there
    base_settings(folder)
    read_config(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is raised differs from one kind of tokenizer to the next
        path = folder / "tokenizer_config.json"
        if path.is_file() and files.read_json(path).get("auto_map"):
            raise ValueError(f"{path}: {own_code('tokenizer')}") from error
        raise ValueError(f"{folder}: cannot read the tokenizer ({first_line(error)})") from error


def load_dense(folder: str | os.PathLike[str]) -> torch.nn.Module:
    """The model as it is in the folder, on the CPU, in the dtype of its files (float64: float32)."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_dense(folder)
    check_causal(folder, read_config(folder))
    if shards.paths(folder):
        shards.Shards(folder)  # names a damaged file
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are an error below, not a table in the log
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below, which unlike theirs says where
        )
    except MemoryError:
        raise
    except Exception as error:  # what is raised differs from one wrong value to the next
        reason = f"cannot read the model that config.json describes ({first_line(error)})"
        raise ValueError(f"{folder}: {reason}") from error
    finally:
        logging.set_verbosity(verbosity)
    _check_loaded(folder, found)
    return model.float() if model.dtype == torch.float64 else model


def _check_loaded(folder: Path, found: Mapping[str, Iterable[Any]]) -> None:
    """Refuse a model that is not all, and only, what the files hold."""
    for key, in_file, in_model in sorted(found["mismatched_keys"]):
        shapes = f"{tuple(in_file)} in the files and {tuple(in_model)} by config.json"
        raise ValueError(f"{folder}: {key} is {shapes}")
    kinds = {
        "missing_keys": "missing in the files",
        "unexpected_keys": "not in config.json's model",
    }
    for kind, what in kinds.items():
        if keys := sorted(found[kind]):
            raise ValueError(f"{folder}: {len(keys)} weights are {what} ({', '.join(keys[:3])})")


def load_quantized(
    folder: str | os.PathLike[str],
    config: QLoRAConfig,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[torch.nn.Module, QuantizationReport]:
    """A model from a folder, quantized, with adapters, on its device.

    It is quantized from the numbers in its files, so that the codes are the same whatever the
    device and the precision of the computation; one tensor at a time, so that the dense model is
    never in memory, unless transformers has to convert the files' weights first, of which a warning tells.

    Args:
        folder: a Hugging Face model folder with safetensors, or one in 4 bits that `quantize_folder` wrote, or
            transformers with bitsandbytes.
        config: as for `quantize_model`; for a folder in 4 bits, with the base that it holds.
        adapter: a folder whose adapter is loaded; new adapters change nothing until trained.
        device: "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", as in TrainConfig.
    """
    dtype = compute_dtype(torch.device(device), precision)
    model, report = _quantized(check_folder(folder), config, adapter, torch.device(device), dtype)
    if adapter is not None:
        load_adapter(model, adapter)
    return place(model, device, dtype), report


def quantize_folder(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    config: QLoRAConfig,
    device: str = "cpu",
    layout: str = quantized_folder.METHOD,
) -> QuantizationReport:
    """Write a folder whose model is that of another folder in 4 bits, to be loaded in its place.

    Args:
        folder: a Hugging Face model folder with safetensors.
        out: a new or empty folder.
        config: how to quantize; what it says of adapters does not matter.
        device: where to quantize.
        layout: "qlora"; or "bitsandbytes" for a folder that transformers loads where bitsandbytes is installed,
            in which experts that are held as 3-D parameters stay dense.
    """
    folder, out = check_dense(folder), Path(out)
    if config.format is None:
        raise ValueError("format must name a 4-bit data type; got None")
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be {' or '.join(LAYOUTS)}; got {layout!r}")
    LAYOUTS[layout].check_config(config)
    files.check_new_folder(out)
    base = {name: getattr(config, name) for name in BASE_FIELDS}
    config = QLoRAConfig(target_modules=None, **base)
    with files.new_folder(out) as temporary:  # before the work, as it may not be possible
        copy_tokenizer(folder, temporary)
        model, report = _quantized(
            folder, config, None, torch.device(device), None, LAYOUTS[layout].layers
        )
        LAYOUTS[layout].save(model, folder, temporary)
    return report


def _quantized(
    folder: Path,
    config: QLoRAConfig,
    adapter: str | os.PathLike[str] | None,
    device: torch.device,
    dtype: torch.dtype | None,
    choose: Callable[[torch.nn.Module], Collection[str] | None] = lambda model: None,
) -> tuple[torch.nn.Module, QuantizationReport]:
    """The model with new adapters; what stays dense is cast to `dtype` as it is read, if at all.

    Args:
        choose: which layers of a dense model to quantize, as `quantize_model` takes them.
    """

    def convert(
        model: torch.nn.Module, *, layers: Collection[str] | None = None
    ) -> QuantizationReport:
        try:
            return quantize_model(model, config, choose(model) if layers is None else layers)
        except ValueError as error:
            if adapter is None:
                raise
            raise ValueError(f"{adapter}: the adapter does not fit {folder}: {error}") from error

    if (layout := LAYOUTS.get(_quantization(folder))) is not None:
        check_base(folder, config)
        return layout.load_folder(folder, convert, device, dtype)
    if config.format is not None:
        try:
            return load_and_quantize(folder, convert, device, dtype)
        except NotStreamable as reason:
            size = f"{_weight_bytes(folder) / 1e9:.1f} GB and more of memory"
            warnings.warn(f"{folder}: read as a whole, {size}: {reason}", stacklevel=2)
    model = load_dense(folder)
    if _fits(model, device):  # quantizing is quicker there
        model.to(device)
    report = convert(model)
    return model.to(device), report


def place(model: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Move a model to a device and its frozen parameters to a dtype."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def save_dense(model: torch.nn.Module, tokenizer_from: Path, folder: Path) -> None:
    """Write a model folder as a whole, with the tokenizer's files of another folder."""
    from safetensors import SafetensorError

    files.check_new_folder(folder)
    with files.new_folder(folder) as temporary:
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(f"{folder}: cannot write ({first_line(error)})") from error
        copy_tokenizer(tokenizer_from, temporary)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer's files from one model folder to another; a warning tells if there are none."""
    found = {file for pattern in _TOKENIZER_FILES for file in source.glob(pattern)}
    found = {file for file in found if file.is_file()}
    if not found:
        warnings.warn(f"{source}: has no tokenizer files to copy", stacklevel=2)
    for file in found.union(source.glob(_CHAT_TEMPLATES)):
        if file.is_file():
            shutil.copy(file, folder)


def _weight_bytes(folder: Path) -> int:
    """Of the safetensors files that transformers reads."""
    found = shards.paths(folder) or folder.glob("*.safetensors")
    return sum(path.stat().st_size for path in found)


def _fits(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether the dense model and a quantized copy fit on a GPU."""
    if device.type != "cuda":
        return False
    size = sum(parameter.nbytes for parameter in model.parameters())
    return 1.5 * size < torch.cuda.mem_get_info(device)[0]
