"""The models of LoRA's tables as shapes on torch's meta device: what an adapter takes, from the library's objects.

transformers' own classes, converted by `quantize_model`; what is counted are the converted objects' tensors. GPT-2's
`c_attn` is q, k and v in one matrix: an adapter on it has A [r, d] and B [3 d, r], so r (d + 3 d) parameters, as many
as two adapters of rank r on q and on v, 2 (d + d) r.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from qlora import QLoRAConfig, QuantizationReport, add_adapter, quantize_model, save_adapter, shapes
from qlora.peft_format import WEIGHTS
from qlora.pretrained import load_dense

Targets = str | tuple[str, ...]


@dataclass(frozen=True)
class Shape:
    """A model with LoRA.

    Attributes:
        kind: transformers' model_type.
        sizes: what its config says other than by default.
        targets: the layers with an adapter, q and v.
        rank: the adapters'.
        printed: parameters in LoRA's tables 2 to 4, in millions, as they are printed.
    """

    kind: str
    sizes: dict[str, int]
    targets: Targets
    rank: int
    printed: str


def _gpt2(
    width: int, layers: int, heads: int, rank: int, printed: str, context: int = 1024
) -> Shape:
    sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": context}
    return Shape("gpt2", sizes, ("c_attn",), rank, printed)


def _encoder(
    kind: str, targets: Targets, shape: Sequence[int], vocabulary: int, rank: int, printed: str
) -> Shape:
    width, layers, heads = shape
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"intermediate_size": 4 * width, "vocab_size": vocabulary}
    return Shape(kind, sizes, targets, rank, printed)


_QV, _XXL_QV = ("query", "value"), ("query_proj", "value_proj")
# DeBERTa's rank is that of the scripts published with LoRA; the others are the paper's.
SHAPES = {
    "GPT-2 M": _gpt2(1024, 24, 16, rank=4, printed=".35"),
    "GPT-2 L": _gpt2(1280, 36, 20, rank=4, printed=".77"),
    "RoBERTa base": _encoder("roberta", _QV, (768, 12, 12), 50_265, rank=8, printed=".3"),
    "RoBERTa large": _encoder("roberta", _QV, (1024, 24, 16), 50_265, rank=8, printed=".8"),
    "DeBERTa XXL": _encoder("deberta-v2", _XXL_QV, (1536, 48, 24), 128_100, 16, printed="4.7"),
    "GPT-3, r 1": _gpt2(12288, 96, 96, rank=1, printed="4.7", context=2048),
    "GPT-3, r 8": _gpt2(12288, 96, 96, rank=8, printed="37.7", context=2048),
}
PAPER_PARAMETERS = 175_255.8e6  # GPT-3, LoRA's table 4
CHECKPOINT = _gpt2(12288, 96, 96, rank=4, printed="", context=2048)
TRAINED = {"GPT-2 M": "float32", "GPT-3, r 8": "bfloat16"}
"""Of which a step of AdamW is counted, everything in this dtype."""

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LLAMA_TARGETS: dict[str, Targets] = {
    "k and q": ("k_proj", "q_proj"),
    "attention": _ATTENTION,
    "FFN": ("gate_proj", "up_proj", "down_proj"),
    "attention and FFN output": (*_ATTENTION, "down_proj"),
    "all": "all-linear",
}
"""The layers of QLoRA's search for hyperparameters (appendix A)."""
RANKS = (8, 16, 32, 64, 128, 256)
"""Its ranks."""
FULL_RANK = 64

FILES: dict[str, tuple[Targets, int]] = {
    "q and v, r 4": (("q_proj", "v_proj"), 4),
    "all linear, r 16": ("all-linear", 16),
    "all linear, r 64": ("all-linear", 64),
}
"""Adapters that are written for a model with values."""


def count() -> dict[str, Any]:
    """Parameters and bytes of all shapes."""
    sizes = [name.removeprefix("llama-") for name in shapes.LLAMA]
    return {
        "counts": {name: adapted(shape)[1] for name, shape in SHAPES.items()},
        "checkpoint": _checkpoint(),
        "training": {name: _training(SHAPES[name], dtype) for name, dtype in TRAINED.items()},
        "llama": {
            "linear": _llama(sizes[0], QLoRAConfig()).quantized_parameters,
            "of rank 1": {name: llama_adapter(sizes[0], t, 1) for name, t in LLAMA_TARGETS.items()},
            "of full rank": {s: llama_adapter(s, "all-linear", FULL_RANK) for s in sizes},
        },
    }


def network(shape: Shape, dtype: str = "float32") -> nn.Module:
    """The model on the meta device, before it is adapted; GPT-2 with its output layer."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(shape.kind, **shape.sizes)
    if shape.kind == "gpt2":
        return shapes.meta_model(config, getattr(torch, dtype))
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=getattr(torch, dtype))


def adapted(shape: Shape, dtype: str = "float32") -> tuple[nn.Module, int]:
    """The model with LoRA over a dense base, all of one dtype, and the parameters that are trained."""
    model = network(shape, dtype)
    config = QLoRAConfig(
        rank=shape.rank, format=None, target_modules=shape.targets, adapter_dtype=dtype
    )
    return model, quantize_model(model, config).trainable_parameters


def llama_adapter(size: str, targets: Targets, rank: int) -> int:
    """Parameters of LoRA on layers of a LLaMA."""
    return _llama(size, QLoRAConfig(rank=rank, target_modules=targets)).trainable_parameters


def _llama(size: str, config: QLoRAConfig) -> QuantizationReport:
    model = shapes.meta_model(shapes.model_config(f"llama-{size}"), torch.bfloat16)
    return quantize_model(model, config)


def _checkpoint() -> dict[str, int]:
    """Bytes of GPT-3 and of its adapter in 16 bits."""
    model, _ = adapted(CHECKPOINT, "bfloat16")
    adapter = sum(p.nbytes for p in _trained(model))
    return {"adapter": adapter, "model": sum(p.nbytes for p in model.parameters()) - adapter}


def _training(shape: Shape, dtype: str) -> dict[str, dict[str, int]]:
    """Bytes of weights, gradients and AdamW's states when all is trained, and with LoRA."""
    return {"full": step_bytes(network(shape, dtype)), "lora": step_bytes(adapted(shape, dtype)[0])}


def step_bytes(model: nn.Module) -> dict[str, int]:
    """What is there after a step of AdamW over all that is trainable, on whichever device the model is."""
    parameters = _trained(model)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = torch.optim.AdamW(parameters)
    optimizer.step()
    states = (tensor for state in optimizer.state.values() for tensor in state.values())
    return {
        "weights": sum(p.nbytes for p in model.parameters()),
        "gradients": sum(p.grad.nbytes for p in parameters),
        "optimizer": sum(tensor.nbytes for tensor in states),
    }


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def write(folder: Path) -> dict[str, Any]:
    """The bytes of adapters as files, 16 bits a parameter, of the model in a folder."""
    model = load_dense(folder)
    parameters = sum(p.numel() for p in model.parameters())
    configs = {
        f"adapter-{number}": QLoRAConfig(
            rank=rank, format=None, target_modules=targets, adapter_dtype="bfloat16"
        )
        for number, (targets, rank) in enumerate(FILES.values())
    }
    # Its first adapter, which is not written, makes it a model that others can be added to.
    quantize_model(model, QLoRAConfig(format=None))
    for name, config in configs.items():
        add_adapter(model, config, name)
    with TemporaryDirectory() as temporary:
        written = {
            label: _written(model, name, Path(temporary) / name)
            for label, name in zip(FILES, configs, strict=True)
        }
    return {"model_parameters": parameters, "adapters": written}


def _written(model: nn.Module, name: str, folder: Path) -> dict[str, int]:
    save_adapter(model, folder, name)
    return {
        "parameters": sum(p.numel() for n, p in model.named_parameters() if f".{name}." in n),
        "weights_bytes": (folder / WEIGHTS).stat().st_size,
        "folder_bytes": sum(path.stat().st_size for path in folder.iterdir()),
    }
