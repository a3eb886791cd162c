"""Casts and products are exact on every device, the interpreter's bfloat16 included."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import reference
from qlora.kernels.primitives import dot, normalize, round_to, saturate, to_float32
from tests.on_device import DEVICES

pytestmark = pytest.mark.parametrize("device", DEVICES)


@triton.jit
def _cast_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    x = to_float32(tl.load(x_ptr + tl.arange(0, SIZE)))
    tl.store(out_ptr + tl.arange(0, SIZE), round_to(x, out_ptr.dtype.element_ty))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    tile = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    acc = tl.full((SIZE, SIZE), 1.0, tl.float32)
    tl.store(out_ptr + tile, dot(tl.load(a_ptr + tile), tl.load(b_ptr + tile), acc))


@triton.jit
def _saturate_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), saturate(tl.load(x_ptr + tl.arange(0, SIZE))))


@triton.jit
def _normalize_kernel(
    x_ptr, out_ptr, absmax_ptr, PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    part_row = tl.arange(0, PARTS * ROWS)
    element = part_row[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    x = tl.load(x_ptr + element).reshape(PARTS, ROWS, WIDTH)
    normalized, absmax = normalize(x)
    tl.store(out_ptr + element, normalized.reshape(PARTS * ROWS, WIDTH))
    tl.store(absmax_ptr + tl.arange(0, ROWS), absmax)


def _cast(device: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.full(x.shape, 7, dtype=dtype, device=device)
    _cast_kernel[(1,)](x.to(device), out, SIZE=x.numel())
    return out.cpu()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_exactly(device: str, dtype: torch.dtype) -> None:
    values = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    values = torch.where(values.isnan(), 0, values)
    assert torch.equal(_cast(device, values, torch.float32), values.float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_to_nearest_even(device: str, dtype: torch.dtype) -> None:
    """Every 16-bit value, the midpoint to the next, and the floats on both sides of the midpoint."""
    values = torch.arange(2**15, dtype=torch.int32).to(torch.uint16).view(dtype).float()
    values = values[values.isfinite()]
    midpoints = (values[1:] + values[:-1]) / 2
    above, below = (midpoints.nextafter(torch.tensor(to)) for to in (torch.inf, 0.0))
    for x in (midpoints, above, below, -midpoints):
        padded = torch.cat([x, x.new_zeros(2**15 - len(x))])
        assert torch.equal(_cast(device, padded, dtype), padded.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_adds_to_the_accumulator(device: str, dtype: torch.dtype) -> None:
    """Small integers, so that the product is exact in any order of summation."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).to(dtype) for _ in range(2))
    out = torch.full((32, 32), torch.nan, device=device)
    _dot_kernel[(1,)](a.to(device), b.to(device), out, SIZE=32)
    assert torch.equal(out.cpu(), a.float() @ b.float() + 1)


def test_fp32_products_are_not_tf32(device: str) -> None:
    a, b = torch.zeros(32, 32), torch.zeros(32, 32)
    a[0, 0], b[0, 0] = 1 + 2.0**-20, 1.0
    out = torch.full((32, 32), torch.nan, device=device)
    _dot_kernel[(1,)](a.to(device), b.to(device), out, SIZE=32)
    assert out[0, 0].item() == 2 + 2.0**-20


def test_saturate_sends_nan_to_zero(device: str) -> None:
    inf = torch.inf
    x = torch.tensor([torch.nan, -torch.nan, -inf, -1.0, -0.0, 0.25, 1.0, inf])
    out = torch.full((8,), 7.0, device=device)
    _saturate_kernel[(1,)](x.to(device), out, SIZE=8)
    assert torch.equal(out.cpu(), torch.tensor([0, 0, 0, 0, 0, 0.25, 1, 1]))


@pytest.mark.parametrize("parts", [1, 4])
def test_a_block_in_parts_is_normalized_as_a_whole(device: str, parts: int) -> None:
    """Tiny, huge and zero blocks among them; NaN shows in its own block's absmax alone."""
    x = torch.randn(parts, 8, 16, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1, 2.0**-140, 2.0**-101, 2.0**-99, 2.0**125, 0, 1, 1e-6])[None, :, None]
    blocks = x.transpose(0, 1).reshape(8, -1)
    expected, expected_absmax = reference.normalize(blocks)
    x[-1, 6, 5] = torch.nan
    out, absmax = torch.full(x.shape, 7.0, device=device), torch.full((8,), 7.0, device=device)
    _normalize_kernel[(1,)](x.to(device), out, absmax, PARTS=parts, ROWS=8, WIDTH=16)
    finite = torch.arange(8) != 6
    found = out.cpu().transpose(0, 1).reshape(8, -1)
    assert torch.equal(found[finite], expected[finite])
    assert torch.equal(absmax.cpu()[finite], expected_absmax[finite])
    assert absmax[6].isnan()
