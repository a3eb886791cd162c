"""The QLoRA linear layer as a differentiable function (QLoRA, section 3, equations 5 and 6)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qlora.kernels import ops
from qlora.quantized import QuantizedTensor


class QLoRALinearFunction(torch.autograd.Function):
    """y = x W^T + bias + scaling * dropout(x) A^T B^T over a frozen 4-bit W.

    The weight is decoded anew in backward: between the passes only its packed form is held, and for the
    adapter x [m, k] and h = dropout(x) A^T [m, r]. Everything held goes through `save_for_backward`, so that
    saved-tensor hooks (CPU offload, checkpointing) see it.
    """

    @staticmethod
    def forward(
        ctx: Any,
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
    ) -> Tensor:
        """[m, k] to [m, n]; arguments as in `reference.qlora_forward`."""
        weight = (packed, absmax, nested_absmax, nested_offset)
        formats = (format, blocksize, scale_format)
        y, h = ops.qlora_forward(x, *weight, bias, lora_a, lora_b, rng, scaling, dropout, *formats)
        needs_grad_a, needs_grad_b = ctx.needs_input_grad[6:8]
        x, h = x if needs_grad_a else None, h if needs_grad_b else None
        ctx.save_for_backward(x, h, *weight, lora_a, lora_b, rng)
        ctx.scaling, ctx.dropout, ctx.formats = scaling, dropout, formats
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, bias, A and B; the base has none."""
        x, h, *weight, lora_a, lora_b, rng = ctx.saved_tensors
        needs_x, needs_bias, needs_a, needs_b = (ctx.needs_input_grad[i] for i in (0, 5, 6, 7))
        grad_x = grad_bias = grad_a = grad_b = None
        if needs_x or needs_a:
            g = ops.lora_project(grad_y, lora_b.mT, None, 0.0)
        if needs_x:
            grad_x = ops.qlora_grad_x(
                grad_y, g, *weight, lora_a, rng, ctx.scaling, ctx.dropout, *ctx.formats
            )
        if needs_a:
            grad_a = ops.lora_grad(g, x, rng, ctx.scaling, ctx.dropout)
        if needs_b:
            grad_b = ops.lora_grad(grad_y, h, None, ctx.scaling, 0.0)
        if needs_bias:
            grad_bias = grad_y.sum(0)
        return grad_x, None, None, None, None, grad_bias, grad_a, grad_b, *(None,) * 6


def qlora_linear(
    x: Tensor,
    q: QuantizedTensor,
    bias: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    dropout: float = 0.0,
) -> Tensor:
    """Apply a linear layer with a 4-bit weight, and its adapter if there is one.

    Computes in the dtype of `x`, or in autocast's where that is on; the parameters are cast to it.

    Args:
        x: [..., k], float.
        q: the quantized weight W, shape (n, k).
        bias: [n] or None.
        lora_a, lora_b: the adapter's factors A [r, k] and B [n, r], or None for the base alone.
        scaling: the adapter's weight, alpha / rank in the papers.
        dropout: probability that an element of the adapter's input is dropped; drawn from torch's
            generator of x's device. Pass 0 outside training.

    Returns:
        [..., n]: x W^T + bias + scaling * dropout(x) A^T B^T.

    Raises:
        ValueError, TypeError: a shape, dtype or device that does not fit; the message names the argument.
    """
    n, k = _check_arguments(x, q, lora_a, lora_b)
    x = in_autocast_dtype(x)
    if lora_a is None or lora_b is None:
        lora_a, lora_b, dropout = x.new_empty(0, k), x.new_empty(n, 0), 0.0
    rng = torch.randint(2**31, (2,), device=x.device) if dropout else None
    y = QLoRALinearFunction.apply(
        x.reshape(-1, k),
        q.packed,
        q.absmax,
        q.nested_absmax,
        q.nested_offset,
        None if bias is None else bias.to(x.dtype),
        lora_a.to(x.dtype),
        lora_b.to(x.dtype),
        rng,
        scaling,
        dropout,
        q.format,
        q.blocksize,
        q.scale_format,
    )
    return y.view(*x.shape[:-1], n)


def in_autocast_dtype(x: Tensor) -> Tensor:
    """x in autocast's dtype where that is on; as everywhere in torch, fp64 and integers are left alone."""
    kind = x.device.type
    castable = x.is_floating_point() and x.dtype != torch.float64
    if castable and torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return x.to(torch.get_autocast_dtype(kind))
    return x


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """Within the block, matrices on a kind of device are multiplied in their own dtype."""
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _check_arguments(
    x: Tensor, q: QuantizedTensor, lora_a: Tensor | None, lora_b: Tensor | None
) -> tuple[int, int]:
    if len(q.shape) != 2:
        raise ValueError(f"q must be a matrix (n, k); got shape {tuple(q.shape)}")
    n, k = q.shape
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"x must have shape [..., {k}]; got {tuple(x.shape)}")
    if x.device != q.device:
        raise ValueError(f"x must be on the weight's device {q.device}; got {x.device}")
    if (lora_a is None) != (lora_b is None):
        raise ValueError("lora_a and lora_b must be given together; got only one of them")
    if lora_a is not None and (lora_a.dim() != 2 or lora_a.shape[1] != k):
        raise ValueError(f"lora_a must have shape (rank, {k}); got {tuple(lora_a.shape)}")
    if lora_b is not None and lora_b.shape != (n, lora_a.shape[0]):
        expected = (n, lora_a.shape[0])
        raise ValueError(f"lora_b must have shape {expected}; got {tuple(lora_b.shape)}")
    return n, k
