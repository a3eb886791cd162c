"""What `tests.interpreter` changes of Triton's interpreter gives what it gave."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import ReduceOps

from tests import interpreter
from tests.on_device import interpreted_only

pytestmark = interpreted_only


@triton.jit
def _last_nonzero(a, b):
    """Associative, and other with its arguments exchanged."""
    return tl.where(b != 0, b, a)


@triton.jit
def _kernel(x_ptr, out_ptr, SIZE: tl.constexpr, AXIS: tl.constexpr, KEEP: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, SIZE)).reshape(2, SIZE // 8, 4)
    reduced = tl.reduce(x, AXIS, _last_nonzero, keep_dims=KEEP)
    tl.store(out_ptr + tl.arange(0, reduced.numel), reduced.reshape(reduced.numel))


def _reduced(x: Tensor, axis: int, keep: bool) -> Tensor:
    out = torch.full(x.shape, 7, dtype=x.dtype)
    _kernel[(1,)](x, out, SIZE=x.numel(), AXIS=axis, KEEP=keep)
    return out


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.uint8])
@pytest.mark.parametrize("size", [8, 64, 128])
def test_a_reduction(size: int, dtype: torch.dtype, axis: int, keep: bool) -> None:
    """In order, along each axis, one of length 1 included."""
    x = torch.arange(1, size + 1).where(torch.rand(size) < 0.5, 0).to(dtype)
    actual = _reduced(x, axis, keep)
    with mock.patch.object(ReduceOps, "generic_reduce", interpreter.reduce_by_element):
        expected = _reduced(x, axis, keep)
    assert torch.equal(actual, expected)
    assert (expected != 7).any()
    assert ReduceOps.generic_reduce is interpreter.reduce_by_halves
