"""SmolLM2 as an ordinary Hugging Face folder, converted once from GGUF."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from paper_repro.materials import assets
from qlora import files
from qlora.pretrained import check_folder

MODEL_NAME = "SmolLM2-135M-Instruct"
ORIGIN = (
    "It arrives as GGUF: its linear layers were quantized to Q4_1 (4 bits, blocks of 32) and its embedding "
    "to Q8_0 before we got them. So the base is *dequantized*, not a 16-bit original, and the "
    "differences between data types need not be those on untouched weights"
)


def model_folder(cache: Path) -> Path:
    """The converted model with its tokenizer, fp32 safetensors, 540 MB."""
    folder = cache / "models" / "smollm2-135m-instruct"
    if not folder.is_dir():
        source = assets.model_file(cache)
        print("Converting SmolLM2 from GGUF (about 20 s, once) ...", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        files.remove_leftovers(folder.parent)
        with files.new_folder(folder) as temporary:
            convert_gguf(source, temporary)
    return check_folder(folder)


@cache
def weights_digest(folder: Path) -> str:
    """The SHA-256 of a folder's weights: what was measured with them depends on it."""
    return files.sha256(folder / "model.safetensors")


def convert_gguf(source: Path, folder: Path) -> None:
    """Write the model and tokenizer in a GGUF file as a folder of transformers'."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    decoded = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # A model that was read from GGUF counts as quantized and will not be saved; an equal one will.
    config = decoded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(decoded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
