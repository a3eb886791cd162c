"""Models as shapes: LLaMA by name, any other by its config.json, on the meta device."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from qlora import files
from qlora.folder_config import first_line

# hidden size, layers, heads, feed-forward size (Touvron et al. 2023, LLaMA, table 2)
LLAMA: dict[str, tuple[int, int, int, int]] = {
    "llama-7b": (4096, 32, 32, 11008),
    "llama-13b": (5120, 40, 40, 13824),
    "llama-33b": (6656, 60, 52, 17920),
    "llama-65b": (8192, 80, 64, 22016),
}
VOCABULARY = 32_000


def model_config(model: str | os.PathLike[str], layers: int | None = None) -> Any:
    """transformers' config of a model.

    Args:
        model: "llama-7b", "llama-13b", "llama-33b" or "llama-65b"; or a config.json, or a folder with one.
        layers: a LLaMA of another depth.

    Raises:
        ValueError, FileNotFoundError: no such name and no such file, or a config that transformers does not know.
    """
    name = str(model).lower()
    if name in LLAMA:
        return _llama(*LLAMA[name], layers)
    path = Path(model)
    if not path.exists():
        raise FileNotFoundError(
            f"model must be one of {', '.join(LLAMA)}, a config.json or a folder with one; got {model}"
        )
    return _read_config(path / "config.json" if path.is_dir() else path)


def _llama(hidden: int, depth: int, heads: int, feed_forward: int, layers: int | None) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=depth if layers is None else layers,
        num_attention_heads=heads,
        vocab_size=VOCABULARY,
    )


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    fields = files.read_json(path)
    fields.pop("quantization_config", None)  # a base in 4 bits has the shapes of its dense original
    fields.pop("auto_map", None)  # code that came with the model is never run
    kind = fields.pop("model_type", None)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{path}: model_type must be a causal language model's; got {kind!r}")
    try:
        return AutoConfig.for_model(kind, **fields)
    except Exception as error:  # what is raised differs from one config to the next
        reason = first_line(error)[:200]
        raise ValueError(f"{path}: transformers cannot read it ({reason})") from error


def meta_model(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """A causal language model without values: shapes and dtypes on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)
