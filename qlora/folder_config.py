"""config.json and generation_config.json of a model folder, as transformers understands them.

Code that a folder brings along is never run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qlora import files


def read_config(folder: Path) -> Any:
    """The folder's transformers config, which remembers the folder as the model's name.

    It says what the model is, not what its files are: a quantized folder's `quantization_config` is left out.

    Raises:
        ValueError, FileNotFoundError: transformers makes nothing of config.json, or there is none.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    fields = files.read_json(path)
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is raised differs from one wrong value to the next
        if fields.get("auto_map"):
            raise ValueError(f"{path}: {own_code('model')}") from error
        raise ValueError(f"{path}: {first_line(error)}") from error
    config.name_or_path = str(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def own_code(what: str) -> str:
    """What is said of a model or tokenizer that transformers does not know."""
    return f"the {what} brings code of its own (auto_map), which is not supported and was not run"


def read_generation_config(folder: Path, model: nn.Module) -> None:
    """Give the model the folder's settings for generation, or those in its config."""
    from transformers import GenerationConfig

    if not model.can_generate():
        return
    path = folder / "generation_config.json"
    if not path.is_file():
        model.generation_config = GenerationConfig.from_model_config(model.config)
        return
    files.read_json(path)  # theirs reads it again
    try:
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"{path}: {first_line(error)}") from error


def check_causal(folder: Path, config: Any) -> None:
    """Refuse an encoder, which transformers makes a causal model of whose tokens see those after."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    fills_masks = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if fills_masks and getattr(config, "is_decoder", None) is False:
        name = ", ".join(config.architectures or [config.model_type])
        raise ValueError(f"{folder}: {name} is an encoder; a causal language model is needed")


def first_line(error: Exception) -> str:
    """What an error says, without what follows its first line, unless that is but a heading."""
    lines = str(error).strip().split("\n")
    heading = lines[0].endswith(":")
    return " ".join(line.strip() for line in lines[: 1 + heading]) or type(error).__name__
