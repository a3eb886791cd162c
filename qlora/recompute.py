"""Gradient checkpointing: keep a block's input, and compute the block again in backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputing(model: torch.nn.Module, enabled: bool = True) -> Iterator[None]:
    """Within the block, recompute the activations of those modules that offer it.

    They are transformers' blocks, which look at two attributes of theirs. Setting these directly
    leaves no hook on the embeddings behind, as transformers' own switch does; the variant of
    checkpointing that is used here needs none.
    """
    blocks = [m for m in model.modules() if enabled and hasattr(m, "gradient_checkpointing")]
    before = [
        (block.gradient_checkpointing, getattr(block, "_gradient_checkpointing_func", None))
        for block in blocks
    ]
    try:
        for block in blocks:
            block.gradient_checkpointing = True
            block._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        yield
    finally:
        for block, (was_enabled, function) in zip(blocks, before, strict=True):
            block.gradient_checkpointing = was_enabled
            block._gradient_checkpointing_func = function
