"""The kernels for double-quantized scales are the reference, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import double_quant, reference
from qlora.kernels.formats import SCALE_FORMATS
from tests import strategies as qst
from tests.on_device import DEVICES, assert_identical, launch

pytestmark = pytest.mark.parametrize("device", DEVICES)


def _check(device: str, absmax: Tensor, scale_format: str) -> None:
    """Both ways."""
    quantized = reference.quantize_absmax(absmax, scale_format)
    assert_identical(launch(device, double_quant.quantize_absmax, absmax, scale_format), quantized)
    assert_identical(
        launch(device, double_quant.dequantize_absmax, *quantized, scale_format),
        reference.dequantize_absmax(*quantized, scale_format),
    )


@settings(max_examples=60)
@given(qst.tensors(dtype=torch.float32), qst.scale_formats)
def test_equals_the_reference(device: str, x: Tensor, scale_format: str) -> None:
    # Halved: the mean of the largest floats has to be finite.
    _check(device, x.abs() / 2, scale_format)


@pytest.mark.parametrize("scale_format", sorted(SCALE_FORMATS))
@pytest.mark.parametrize("blocks", [0, 1, 255, 256, 257, 1024, 3000])
def test_sizes_around_nested_blocks(device: str, blocks: int, scale_format: str) -> None:
    absmax = torch.rand(blocks, generator=torch.Generator().manual_seed(blocks)) + 0.5
    _check(device, absmax, scale_format)


@pytest.mark.parametrize("scale_format", sorted(SCALE_FORMATS))
def test_equal_scales(device: str, scale_format: str) -> None:
    """All deviations from the mean are zero: the nested blocks are zero, the offset alone is left."""
    absmax = torch.full((300,), 0.1)
    _check(device, absmax, scale_format)
    quantized = launch(device, double_quant.quantize_absmax, absmax, scale_format)
    assert_identical(
        launch(device, double_quant.dequantize_absmax, *quantized, scale_format), absmax
    )


@pytest.mark.parametrize("scale_format", sorted(SCALE_FORMATS))
def test_ties_take_the_lower_code(device: str, scale_format: str) -> None:
    """At each of the midpoints the lower code, just above it the upper: a strict comparison."""
    thresholds = SCALE_FORMATS[scale_format].thresholds
    below = thresholds.isfinite().nonzero().view(-1)
    midpoints = thresholds[below]
    above = midpoints.nextafter(torch.tensor(torch.inf))
    values = torch.cat([midpoints, above])
    # Nested blocks of 256 that each reach 1, and every value with its negative: the mean is exactly zero.
    rows = torch.zeros(-(-len(values) // 252), 256)
    for row, part in zip(rows, values.split(252), strict=True):
        row[: len(part)], row[-1] = part, 1.0
    absmax = torch.cat([rows, -rows]).view(-1)
    codes, nested_absmax, offset = launch(
        device, double_quant.quantize_absmax, absmax, scale_format
    )
    assert offset == 0
    assert nested_absmax.eq(1).all()
    found = torch.cat([row[:252] for row in codes.view(-1, 256)])[: len(values)]
    assert_identical(found, torch.cat([below, below + 1]).to(torch.uint8))


def test_strided_scales(device: str) -> None:
    absmax = torch.rand(600, generator=torch.Generator().manual_seed(0))[::2]
    _check(device, absmax, "dynamic8")


@given(st.integers(1, 600))
@settings(max_examples=10)
def test_every_code_decodes(device: str, blocks: int) -> None:
    codes = torch.arange(blocks, dtype=torch.int32).to(torch.uint8)
    nested_absmax = torch.rand(-(-blocks // 256))
    arguments = (codes, nested_absmax, torch.tensor(0.3), "e4m3")
    actual = launch(device, double_quant.dequantize_absmax, *arguments)
    assert_identical(actual, reference.dequantize_absmax(*arguments))
