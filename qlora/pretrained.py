"""Model folders: what is checked before transformers reads them, and quantized models from them."""

from __future__ import annotations

import os
import shutil
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
    if "quantization_config" in config:
        method = config["quantization_config"].get("quant_method", "an unknown method")
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
    """The model as it is in the folder, on the CPU, in the dtype of its files."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    folder = check_folder(folder)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # missing weights are an error below, not a table in the log
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (SafetensorError, KeyError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: cannot read the model ({_first_line(error)})") from error
    finally:
        logging.set_verbosity(verbosity)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{folder}: {len(missing)} weights are missing in the files ({', '.join(missing[:3])})"
        )
    return model


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
        config: as for ``quantize_model``.
        adapter: a folder whose adapter is loaded; new adapters change nothing until trained.
        device: "cpu", "cuda", "cuda:1", ...
        precision: "auto", "bfloat16" or "float32", as in TrainConfig.
    """
    model = load_dense(folder)
    if _fits(model, torch.device(device)):  # quantizing is quicker there
        model.to(device)
    report = quantize_model(model, config)
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
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists already and is not an empty folder")
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
