"""Gradient checkpointing: keep a block's input, on the host if wanted, and compute the block again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(
    model: torch.nn.Module, enabled: bool = True, offload: bool = False
) -> Iterator[None]:
    """Within the block, recompute the activations of those modules that offer it.

    Args:
        model: where the modules are looked for.
        enabled: False changes nothing.
        offload: keep the modules' inputs in host memory until the backward pass. Results are the same.

    They are transformers' blocks, which look at two attributes of theirs. Setting these directly
    leaves no hook on the embeddings behind, as transformers' own switch does; the variant of
    checkpointing that is used here needs none.
    """
    blocks = [m for m in model.modules() if enabled and hasattr(m, "gradient_checkpointing")]
    before = [
        (block.gradient_checkpointing, getattr(block, "_gradient_checkpointing_func", None))
        for block in blocks
    ]
    function = _offloaded if offload else partial(checkpoint, use_reentrant=False)
    try:
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = function
        yield
    finally:
        for block, (was_enabled, previous) in zip(blocks, before, strict=True):
            block.gradient_checkpointing = was_enabled
            block._gradient_checkpointing_func = previous


def _offloaded(function: Any, *args: Any) -> Any:
    """`checkpoint`, the saved inputs on the host. What the function itself saves goes to checkpoint's own hooks."""
    with saved_tensors_hooks(_pack, _unpack):
        return checkpoint(function, *args, use_reentrant=False)


def _pack(tensor: Tensor) -> tuple[Tensor, torch.device | None]:
    """A hidden state goes to the host. Masks and position tables, which all blocks share, stay where they are."""
    if not (tensor.requires_grad and tensor.is_floating_point()):
        return tensor, None
    return _to_host(tensor), tensor.device


def _unpack(packed: tuple[Tensor, torch.device | None]) -> Tensor:
    tensor, device = packed
    return tensor if device is None else tensor.to(device, non_blocking=True)


def _to_host(tensor: Tensor) -> Tensor:
    """A copy with the same strides. From a GPU it goes to pinned memory and the host does not wait.

    Copies out and back are queued on the stream that computes, in whose order the GPU's memory is used
    again; and torch uses pinned memory again only after the copies that it was part of. On the meta device, where
    the memory planner looks on, there is nothing to copy.
    """
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False)
    return host if tensor.is_meta else host.copy_(tensor.detach(), non_blocking=True)
