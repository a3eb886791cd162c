"""The public face: `quantize_4bit`, `dequantize_4bit` and what a `QuantizedTensor` says of itself."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import qlora
from qlora.kernels import reference
from tests import strategies as qst


def test_weights_too_large_for_double_quantization_are_refused() -> None:
    """All of them finite; but the largest scale, put together again from mean and difference, is not."""
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, 0.0] * 32 + [1e38] * 64)
    with pytest.raises(ValueError, match=r"would be infinite, at elements up to 3.403e\+38; use"):
        qlora.quantize_4bit(x)
    assert torch.equal(qlora.dequantize_4bit(qlora.quantize_4bit(x, double_quant=False)), x)


@given(qst.tensors(), qst.formats, qst.blocksizes, qst.scale_formats)
def test_round_trip_equals_the_reference(
    x: Tensor, format: str, blocksize: int, scale: str
) -> None:
    packed, absmax = reference.quantize_4bit(x, format, blocksize)
    codes, nested_absmax, nested_offset = reference.quantize_absmax(absmax, scale)
    if not (nested_absmax + nested_offset).isfinite().all():
        with pytest.raises(ValueError, match=r"would be infinite, .* use double_quant=False"):
            qlora.quantize_4bit(x, format, blocksize, scale_format=scale)
        return
    q = qlora.quantize_4bit(x, format, blocksize, scale_format=scale)
    assert torch.equal(q.packed, packed)
    assert torch.equal(q.absmax, codes)
    assert torch.equal(q.nested_absmax, nested_absmax)
    assert torch.equal(q.nested_offset, nested_offset)
    result = qlora.dequantize_4bit(q)
    assert result.dtype == x.dtype
    assert result.shape == x.shape
    expected = reference.dequantize_4bit(
        packed,
        codes,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        scale,
        list(x.shape),
        x.dtype,
    )
    assert torch.equal(result, expected)


def test_sizes_of_the_paper() -> None:
    """QLoRA, section 3: 4.5 bits without double quantization, 4.127 with it."""
    weight = torch.empty(8192, 22016, device="meta", dtype=torch.bfloat16)
    plain = qlora.quantize_4bit(weight, double_quant=False)
    double = qlora.quantize_4bit(weight)
    assert plain.bits_per_parameter == 4.5
    assert double.bits_per_parameter == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-6)
    assert f"{double.bits_per_parameter:.3f}" == "4.127"
    assert double.nbytes == weight.numel() // 2 + weight.numel() // 64 + weight.numel() // 4096 + 4
    assert double.packed.is_meta


def test_is_frozen_and_moves() -> None:
    q = qlora.quantize_4bit(torch.randn(8, 64))
    with pytest.raises(dataclasses.FrozenInstanceError):
        q.format = "fp4"
    assert q.to("meta").device.type == "meta"
    assert torch.equal(q.to("cpu").packed, q.packed)
    assert qlora.dequantize_4bit(q, torch.float64).dtype == torch.float64


def test_the_input_is_left_alone() -> None:
    weight = torch.randn(8, 64, requires_grad=True)
    before = weight.detach().clone()
    q = qlora.quantize_4bit(weight)
    assert torch.equal(weight, before)
    assert not q.packed.requires_grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 100, 127])
def test_weights_that_are_not_finite_are_refused(bad: float, position: int) -> None:
    weight = torch.randn(2, 64)
    weight.view(-1)[position] = bad
    with pytest.raises(ValueError, match="weight must be finite; got 1 NaN or infinite of 128"):
        qlora.quantize_4bit(weight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"format": "nf3"}, ValueError, "format must be one of nf4.*'nf3'"),
        ({"blocksize": 100}, ValueError, "blocksize must be one of.*100"),
        ({"scale_format": "int8"}, ValueError, "scale_format must be one of.*'int8'"),
    ],
)
def test_unknown_settings_are_refused(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        qlora.quantize_4bit(torch.randn(64), **arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="weight must have one of the dtypes"):
        qlora.quantize_4bit(torch.ones(64).to(dtype))


@given(qst.tensors(), qst.formats, qst.blocksizes, st.sampled_from(["", "dynamic8", "e4m3"]))
def test_its_settings_quantize_another_weight_in_the_same_way(
    x: Tensor, format: str, blocksize: int, scale: str
) -> None:
    scales = {"scale_format": scale} if scale else {"double_quant": False}
    x = x / 2  # within what double quantization can put together again
    q = qlora.quantize_4bit(x, format, blocksize, **scales)
    again = qlora.quantize_4bit(x, **q.settings)
    assert again.settings == q.settings
    assert again.scale_format == scale
    assert torch.equal(again.packed, q.packed)
    assert torch.equal(again.absmax, q.absmax)
