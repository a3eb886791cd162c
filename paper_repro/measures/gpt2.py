"""Contenders of LoRA's table 1: GPT-2's shape as it is, with LoRA, with LoRA merged, and with serial adapters.

All share the base's parameters, but for what merging makes anew.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qlora import QLoRAConfig, merge, quantize_model

BASE, MERGED, UNMERGED, ADAPTER_L, ADAPTER_H = (
    "base",
    "LoRA, merged",
    "LoRA, not merged",
    "AdapterL",
    "AdapterH",
)
SEED = 0


class Bottleneck(nn.Module):
    """A serial adapter: x + W_up relu(W_down x), after a norm of its own in AdapterL.

    It is put behind a layer, so that the layer's output goes through it.
    """

    def __init__(self, width: int, inner: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.down, self.up = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same."""
        return x + self.up(torch.relu(self.down(self.norm(x))))


def contenders(
    layers: int, width: int, heads: int, context: int, rank: int, inner: dict[str, int]
) -> dict[str, nn.Module]:
    """Models in evaluation mode, fp32, on the CPU, with random weights.

    Args:
        layers, width, heads, context: GPT-2's shape; its vocabulary is the original's.
        rank: of LoRA on `c_attn`, which is q, k and v.
        inner: the bottleneck's width in AdapterL and AdapterH.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(SEED)
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, n_positions=context)
    base = GPT2LMHeadModel(config).eval()
    unmerged = _with_lora(_sharing(base), rank)
    return {
        BASE: base,
        MERGED: merge(_with_lora(_sharing(base), rank)),
        UNMERGED: unmerged,
        ADAPTER_L: _with_bottlenecks(_sharing(base), inner[ADAPTER_L], after_attention=False),
        ADAPTER_H: _with_bottlenecks(_sharing(base), inner[ADAPTER_H], after_attention=True),
    }


def _sharing(model: nn.Module) -> nn.Module:
    """A copy with the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _with_lora(model: nn.Module, rank: int) -> nn.Module:
    """With adapters that change something: B as large as A, not zero."""
    quantize_model(model, QLoRAConfig(rank=rank, format=None, target_modules=("c_attn",)))
    torch.manual_seed(SEED + 1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def _with_bottlenecks(model: Any, inner: int, after_attention: bool) -> nn.Module:
    """AdapterH: one after attention and one after the feed-forward layer (Houlsby et al. 2019); AdapterL: one after
    the feed-forward layer and a norm (Lin et al. 2020)."""
    for block in model.transformer.h:
        for part in (block.attn, block.mlp) if after_attention else (block.mlp,):
            bottleneck = Bottleneck(model.config.n_embd, inner, norm=not after_attention)
            part.c_proj = nn.Sequential(part.c_proj, bottleneck)
    return model.eval()


def added_parameters(model: nn.Module, base: nn.Module) -> int:
    """How many more parameters a model has than the base."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in base.parameters())


def layout(model: nn.Module) -> list[tuple[str, str, tuple[int, ...], tuple[int, ...]]]:
    """Each module with parameters of its own: name, class, and their shapes and strides, by which it computes."""
    return [
        (name, type(module).__name__, tuple(parameter.shape), parameter.stride())
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    ]
