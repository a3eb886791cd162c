"""Measurements that a small GPU, or a GPU in use by others, has no room for: the run goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def where_it_fits(what: str, function: Callable[[], T]) -> T | None:
    """`function()`, or None where the GPU runs out of memory; says that `what` is left out, and why."""
    try:
        return function()
    except torch.OutOfMemoryError as error:
        print(f"{what} does not fit on this GPU and is left out: {error}", flush=True)
    torch.cuda.empty_cache()  # not before: while the error is handled, its traceback holds the tensors
    return None
