"""Model folders: what is checked before transformers reads them, and quantized models from them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qlora import files
from qlora.adapters import load_adapter
from qlora.config import QLoRAConfig
from qlora.convert import QuantizationReport, quantize_model
from qlora.evaluation import compute_dtype

_TOKENIZER_FILES = ("*token*", "vocab*", "merges.txt", "chat_template*", "*.model")


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder, or an error that says what a model folder must hold."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder. A model is a local folder with config.json, *.safetensors "
            "and the tokenizer's files; models are not downloaded"
        )
    config = files.read_json(folder / "config.json")
    if quantization := config.get("quantization_config"):
        is_object = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if is_object else quantization
        raise ValueError(f"{folder}: quantized already ({method}), a dense model is needed")
    if not any(folder.glob("*.safetensors")):
        raise FileNotFoundError(f"{folder}: no *.safetensors in the folder")
    return folder


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    from transformers import AutoTokenizer

    folder = check_folder(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # what is raised differs from one kind of tokenizer to the next
        raise ValueError(f"{folder}: cannot read the tokenizer ({_first_line(error)})") from error


def load_dense(folder: str | os.PathLike[str]) -> torch.nn.Module:
    """The model as it is in the folder, on the CPU, in the dtype of its files (float64: float32)."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_folder(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are an error below, not a table in the log
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # an error below, which unlike theirs says where
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: cannot read the model ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
    _check_loaded(folder, found)
    _check_causal(folder, model.config)
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


def _check_causal(folder: Path, config: Any) -> None:
    """Refuse an encoder, which transformers makes a causal model of whose tokens see those after."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    fills_masks = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills_masks and getattr(config, "is_decoder", None) is False:
        name = ", ".join(config.architectures or [config.model_type])
        raise ValueError(f"{folder}: {name} is an encoder; a causal language model is needed")


def load_quantized(
    folder: str | os.PathLike[str],
    config: QLoRAConfig,
    adapter: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    precision: str = "auto",
) -> tuple[torch.nn.Module, QuantizationReport]:
    """A model from a folder, quantized, with adapters, on its device.

    It is quantized from the numbers in its files, so that the codes are the same whatever the
    device and the precision of the computation.

    Args:
        folder: a Hugging Face model folder with safetensors.
        config: as for `quantize_model`.
        adapter: a folder whose adapter is loaded; new adapters change nothing until trained.
        device: "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", as in TrainConfig.
    """
    model = load_dense(folder)
    if _fits(model, torch.device(device)):  # quantizing is quicker there
        model.to(device)
    try:
        report = quantize_model(model, config)
    except ValueError as error:
        if adapter is None:
            raise
        raise ValueError(f"{adapter}: the adapter does not fit {folder}: {error}") from error
    if adapter is not None:
        load_adapter(model, adapter)
    return place(model, device, compute_dtype(torch.device(device), precision)), report


def place(model: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """Move a model to a device and its frozen parameters to a dtype."""
    model.to(device)
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def save_dense(model: torch.nn.Module, tokenizer_from: Path, folder: Path) -> None:
    """Write a model folder as a whole, with the tokenizer's files of another folder."""
    files.check_new_folder(folder)
    with files.new_folder(folder) as temporary:
        model.save_pretrained(temporary)
        for pattern in _TOKENIZER_FILES:
            for file in tokenizer_from.glob(pattern):
                shutil.copy(file, temporary / file.name)


def _fits(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether the dense model and a quantized copy fit on a GPU."""
    if device.type != "cuda":
        return False
    size = sum(parameter.nbytes for parameter in model.parameters())
    return 1.5 * size < torch.cuda.mem_get_info(device)[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
