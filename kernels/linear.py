"""The QLoRA linear layer on the device: which kernel serves it, first of all by the number of tokens.

    few_tokens      generating text: bound by reading the packed weight (see `few_tokens.fits` for what else it asks)
    fused_linear    in between: the weight is decoded, multiplied and the adapter added in one pass
    many_tokens     training: bound by the products, which are left to cuBLAS a slab of the weight at a time

An odd k, whose rows begin within a byte, and fp64 have no kernel: the weight is decoded whole.

Held to `reference.qlora_forward` and `reference.qlora_grad_x` by the tolerance rule.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.kernels import few_tokens, fused_linear, many_tokens, reference, tuning
from qlora.kernels.lora import lora_project
from qlora.kernels.nf4 import dequantize_4bit


def qlora_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.qlora_forward`."""
    (m, k), n = x.shape, lora_b.shape[0]
    weight, kind = (packed, absmax, nested_absmax, nested_offset), (format, blocksize, scale_format)
    h = lora_project(x, lora_a, rng, dropout)
    if not tuning.can_fuse(k, x.dtype):
        y = F.linear(x, dequantize_4bit(*weight, *kind, [n, k], x.dtype), bias)
        return y.addmm_(h, lora_b.mT, alpha=scaling), h
    kernel = few_tokens if few_tokens.fits(x, packed, blocksize) else _by_tokens(m)
    return kernel.forward(x, *weight, bias, h, lora_b, scaling, *kind), h


def qlora_grad_x(
    grad_y: Tensor,
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    lora_a: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> Tensor:
    """See `reference.qlora_grad_x`."""
    (m, n), k = grad_y.shape, lora_a.shape[1]
    weight, kind = (packed, absmax, nested_absmax, nested_offset), (format, blocksize, scale_format)
    if tuning.can_fuse(k, grad_y.dtype):
        return _by_tokens(m).grad_x(grad_y, g, *weight, lora_a, rng, scaling, dropout, *kind)
    grad_x = grad_y @ dequantize_4bit(*weight, *kind, [n, k], g.dtype)
    if rng is None:
        return grad_x.addmm_(g, lora_a, alpha=scaling)
    keep = reference.dropout_mask(rng, m, k, dropout)
    return grad_x.add_(torch.where(keep, g @ lora_a, 0), alpha=scaling / (1 - dropout))


def _by_tokens(m: int) -> ModuleType:
    return many_tokens if m >= tuning.MANY_TOKENS else fused_linear
