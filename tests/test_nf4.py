"""The 4-bit kernels are the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import nf4, reference
from qlora.kernels.formats import BLOCKSIZES, CELLS, FORMATS
from tests import strategies as qst
from tests.on_device import DEVICES, assert_identical, launch

pytestmark = pytest.mark.parametrize("device", DEVICES)


def _check_quantize(device: str, x: Tensor, format: str, blocksize: int) -> None:
    actual = launch(device, nf4.quantize_4bit, x, format, blocksize)
    assert_identical(actual, reference.quantize_4bit(x, format, blocksize))


def _check_dequantize(
    device: str,
    x: Tensor,
    format: str,
    blocksize: int,
    scale_format: str,
    dtype: torch.dtype,
) -> None:
    packed, absmax = reference.quantize_4bit(x, format, blocksize)
    scales = (
        reference.quantize_absmax(absmax, scale_format) if scale_format else (absmax, None, None)
    )
    arguments = (packed, *scales, format, blocksize, scale_format, list(x.shape), dtype)
    actual = launch(device, nf4.dequantize_4bit, *arguments)
    assert_identical(actual, reference.dequantize_4bit(*arguments))


@settings(max_examples=60)
@given(qst.tensors(), qst.formats, qst.blocksizes)
def test_quantize(device: str, x: Tensor, format: str, blocksize: int) -> None:
    _check_quantize(device, x, format, blocksize)


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_absmax(device: str, dtype: torch.dtype, bad: float) -> None:
    """That is where `qlora.quantize_4bit` looks for it. A device's own maximum drops a NaN."""
    x = torch.randn(640).to(dtype)
    x[100] = bad
    _, absmax = launch(device, nf4.quantize_4bit, x, "nf4", 64)
    assert absmax.isfinite().tolist() == [block != 1 for block in range(10)]


@settings(max_examples=60)
@given(
    qst.tensors(),
    qst.formats,
    qst.blocksizes,
    st.sampled_from(["", "dynamic8", "e4m3"]),
    st.sampled_from([*qst.DTYPES, torch.float64]),
)
def test_dequantize(
    device: str, x: Tensor, format: str, blocksize: int, scale_format: str, dtype: torch.dtype
) -> None:
    _check_dequantize(device, x, format, blocksize, scale_format, dtype)


@pytest.mark.parametrize("numel", [0, 1, 2, 8193, 16384, 20001])
@pytest.mark.parametrize(("blocksize", "dtype"), list(zip((32, 64, 4096), qst.DTYPES, strict=True)))
def test_sizes_around_programs(device: str, numel: int, blocksize: int, dtype: torch.dtype) -> None:
    """No element, one, and several programs of which the last is full or short."""
    x = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    _check_quantize(device, x, "nf4", blocksize)
    _check_dequantize(device, x, "nf4", blocksize, "dynamic8", dtype)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(device: str, blocksize: int) -> None:
    x = torch.randn(3, 2 * blocksize + 7, generator=torch.Generator().manual_seed(blocksize))
    _check_quantize(device, x, "fp4", blocksize)
    _check_dequantize(device, x, "fp4", blocksize, "e4m3", torch.bfloat16)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_ties_take_the_lower_value(device: str, format: str) -> None:
    """At each midpoint the lower value, just above it the upper: a strict comparison."""
    thresholds = FORMATS[format].thresholds
    ranks = (thresholds.abs() < 1).nonzero().view(-1)
    midpoints = thresholds[ranks]
    above, below = (midpoints.nextafter(torch.tensor(to)) for to in (torch.inf, -torch.inf))
    x = torch.cat([torch.ones(1), midpoints, above, below])
    packed, _ = launch(device, nf4.quantize_4bit, x, format, 64)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)[1 : len(x)]
    rank_to_code = torch.tensor(FORMATS[format].rank_to_code, dtype=torch.uint8)
    lower, upper = rank_to_code[ranks], rank_to_code[ranks + 1]
    assert_identical(codes, torch.cat([lower, upper, lower]))


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_ranks_around_every_threshold_and_cell(device: str, format: str) -> None:
    """The 100 nearest floats on both sides of each: the kernel's look-up must send none to a neighbour."""
    thresholds = FORMATS[format].thresholds
    edges = torch.tensor([(2 * i - 1) / (CELLS - 1) - 1 for i in range(1, CELLS)])
    centres = torch.cat([thresholds[thresholds.abs() < 1], edges, torch.tensor([0.0, 1.0, -1.0])])
    near = (centres.view(torch.int32)[:, None] + torch.arange(-100, 101, dtype=torch.int32)).view(
        -1
    )
    x = near.view(torch.float32)
    x = x[x.abs() <= 1]  # around zero and one, half of the bit patterns are no neighbours
    for shape in (32, 4096):  # a one in each block: what is stored is what is compared
        rows = torch.cat([x, x.new_zeros(-len(x) % (shape - 1))]).view(-1, shape - 1)
        _check_quantize(device, torch.cat([rows, torch.ones(len(rows), 1)], 1), format, shape)


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_byte(device: str, format: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8)
    arguments = (packed, torch.rand(16), None, None, format, 32, "", [512], torch.float32)
    actual = launch(device, nf4.dequantize_4bit, *arguments)
    assert_identical(actual, reference.dequantize_4bit(*arguments))


def test_words_and_what_is_left_of_them(device: str) -> None:
    """The kernel writes words of eight codes: no byte more than the codes take comes back."""
    x = torch.randn(20, generator=torch.Generator().manual_seed(0))
    for numel in range(1, 20):
        packed, _ = launch(device, nf4.quantize_4bit, x[:numel], "fp4", 32)
        assert packed.shape == ((numel + 1) // 2,)
        assert packed.is_contiguous()
        assert_identical(packed, reference.quantize_4bit(x[:numel], "fp4", 32)[0])


def test_nibbles_and_leftover(device: str) -> None:
    """The even element is in the high nibble; the low nibble that an odd count leaves over is 0."""
    packed, absmax = launch(device, nf4.quantize_4bit, torch.tensor([-1.0, 1.0, 1.0]), "nf4", 32)
    assert packed.tolist() == [0x0F, 0xF0]
    assert absmax.tolist() == [1.0]


def test_zero_blocks_decode_to_zeros(device: str) -> None:
    packed, absmax = launch(device, nf4.quantize_4bit, torch.zeros(100), "nf4", 64)
    arguments = (packed, absmax, None, None, "nf4", 64, "", [100], torch.float16)
    assert absmax.eq(0).all()
    assert launch(device, nf4.dequantize_4bit, *arguments).eq(0).all()


def test_extreme_magnitudes(device: str) -> None:
    """Blocks whose absmax is the smallest subnormal, just below and above the lift at 2^-100, the largest."""
    scales = [2.0**-149, 2.0**-127, 2.0**-101, 2.0**-100, 2.0**-99, torch.finfo(torch.float32).max]
    pattern = torch.linspace(-1, 1, 64, dtype=torch.float64)
    x = (torch.tensor(scales, dtype=torch.float64)[:, None] * pattern).float()
    _check_quantize(device, x, "nf4", 64)
    _check_dequantize(device, x, "nf4", 64, "", torch.float32)


def test_strided_input(device: str) -> None:
    x = torch.randn(40, 66, generator=torch.Generator().manual_seed(0))
    for view in (x.T, x[:, ::2], x[1:, 3:], x[0].expand(5, 66), x.flip(0)):
        _check_quantize(device, view, "nf4", 32)


def test_strided_scales(device: str) -> None:
    """Codes, scales and packed bytes that are views with gaps."""
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    packed, absmax = reference.quantize_4bit(x, "nf4", 32)
    codes, nested_absmax, offset = reference.quantize_absmax(absmax, "dynamic8")
    tensors = (packed, codes, nested_absmax)
    gapped = (tensor.repeat_interleave(2)[::2] for tensor in tensors)
    rest = (offset, "nf4", 32, "dynamic8", [2000], torch.float32)
    actual = launch(device, nf4.dequantize_4bit, *gapped, *rest)
    assert_identical(actual, reference.dequantize_4bit(*tensors, *rest))


def test_inputs_are_not_written(device: str) -> None:
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    before = x.clone()
    launch(device, nf4.quantize_4bit, x, "nf4", 64)
    assert_identical(x, before)
