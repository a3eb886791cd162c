"""Runs Triton launchers where they can run: interpreted on the CPU, compiled on a GPU. One test body for both.

TRITON_INTERPRET=1 pytest             the CPU parameter (the default, see conftest.py)
TRITON_INTERPRET=0 pytest -m gpu      the CUDA parameter
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor

from qlora.kernels import double_quant, few_tokens, fused_linear, linear, lora, many_tokens, nf4

INTERPRETED = triton.knobs.runtime.interpret

interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1")
compiled_only = pytest.mark.skipif(INTERPRETED, reason="needs a CUDA GPU, and TRITON_INTERPRET=0")

DEVICES = [
    pytest.param("cpu", marks=interpreted_only),
    pytest.param("cuda", marks=[pytest.mark.gpu, compiled_only]),
]
"""Values for a test's `device` parameter."""

_LAUNCHERS = (nf4, double_quant, linear, few_tokens, fused_linear, many_tokens, lora)


class _GuardedTorch:
    """torch, except for `empty`: an element that nobody writes shows, and so does a write beyond the ends.

    Outputs are filled with NaN or 0xFF and lie between two margins of the same, which `check` looks at.
    """

    _MARGIN = 2**15

    def __init__(self) -> None:
        self._margins: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, *shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], (list, torch.Size)) else shape)
        poison = torch.nan if dtype.is_floating_point else 0xFF
        buffer = torch.full((size.numel() + 2 * self._MARGIN,), poison, dtype=dtype, device=device)
        self._margins += [buffer[: self._MARGIN], buffer[-self._MARGIN :]]
        return buffer[self._MARGIN : -self._MARGIN].view(size)

    def check(self) -> None:
        for margin in self._margins:
            assert (margin.isnan() if margin.is_floating_point() else margin == 0xFF).all()


def launch(device: str, launcher: Callable[..., Any], *arguments: Any) -> Any:
    """The launcher's result on the CPU, from arguments moved to `device` and outputs poisoned beforehand."""
    guarded = _GuardedTorch()
    with ExitStack() as stack:
        for module in _LAUNCHERS:
            stack.enter_context(mock.patch.object(module, "torch", guarded))
        results = launcher(*(_to_device(argument, device) for argument in arguments))
    guarded.check()
    if isinstance(results, tuple):
        return tuple(result.cpu() for result in results)
    return results.cpu()


def _to_device(argument: Any, device: str) -> Any:
    """A tensor on `device` with the same strides and storage offset; anything else as it is."""
    if not isinstance(argument, Tensor) or device == "cpu":
        return argument
    storage = torch.empty(0, dtype=argument.dtype).set_(argument.untyped_storage()).to(device)
    return storage.as_strided(argument.shape, argument.stride(), argument.storage_offset())


def assert_identical(actual: Any, expected: Any) -> None:
    """Equal dtypes, shapes and values, of a tensor or of each in a tuple; -0 equals +0."""
    if isinstance(expected, tuple):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_identical(one, other)
    else:
        assert actual.dtype == expected.dtype
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected), (actual, expected)
