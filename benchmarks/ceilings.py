"""What the hardware gives, measured in the same run: the speed of a large copy, and of a large square product."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.clocks import Call, clock_for

COPIED_BYTES = {"cpu": 256 * 2**20, "cuda": 2 * 2**30}
SIDE = {"cpu": 2048, "cuda": 8192}
_QUICK_COPIED_BYTES, _QUICK_SIDE = 32 * 2**20, 512
_ROUNDS = {"cpu": 7, "cuda": 20}


def measure(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> dict[str, Any]:
    """{"copy_gb_per_s", "product_tflop_per_s": {dtype: ...}}; with `quick`, of small tensors.

    A copy counts what it reads and what it writes, and is the faster of two: torch's own and an element-wise
    kernel's. All are medians of several calls.
    """
    copied = _QUICK_COPIED_BYTES if quick else COPIED_BYTES[device.type]
    side = _QUICK_SIDE if quick else SIDE[device.type]
    return {
        "copy_gb_per_s": 2
        * copied
        / min(_seconds(c, device) for c in _copies(device, copied))
        / 1e9,
        "product_tflop_per_s": {
            str(dtype).removeprefix("torch."): product_tflop_per_s(device, dtype, side)
            for dtype in dtypes
        },
    }


def product_tflop_per_s(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """Of a [side, side] by [side, side] product of random matrices: zeros would draw less power."""
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    out = torch.empty_like(a)
    return 2 * side**3 / _seconds(partial(torch.mm, a, b.mT, out=out), device) / 1e12


def _copies(device: torch.device, copied: int) -> list[Call]:
    source, target = torch.ones(2, copied // 4, device=device)
    return [partial(target.copy_, source), partial(torch.neg, source, out=target)]


def _seconds(call: Call, device: torch.device) -> float:
    """The median of several calls, after one that is not counted."""
    clock = clock_for(device)
    return median([clock(call) for _ in range(_ROUNDS[device.type] + 1)][1:])
