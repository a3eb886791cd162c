"""The CPU path is the reference, bit for bit, at every size where it takes another way."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import cpu, reference
from qlora.kernels.formats import FORMATS
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import strategies as qst


@given(
    qst.tensors(),
    qst.formats,
    qst.blocksizes,
    qst.dtypes,
    st.sampled_from(["", "dynamic8", "e4m3"]),
)
def test_dequantize_equals_the_reference(
    x: Tensor, format: str, blocksize: int, dtype: torch.dtype, scale_format: str
) -> None:
    packed, scales = reference.quantize_4bit(x, format, blocksize)
    scales = (
        reference.quantize_absmax(scales, scale_format) if scale_format else (scales, None, None)
    )
    arguments = (packed, *scales, format, blocksize, scale_format, list(x.shape), dtype)
    expected = reference.dequantize_4bit(*arguments)
    assert torch.equal(cpu.dequantize_4bit(*arguments), expected)


@given(qst.tensors(), qst.formats, qst.blocksizes)
def test_quantize_equals_the_reference(x: Tensor, format: str, blocksize: int) -> None:
    packed, absmax = cpu.quantize_4bit(x, format, blocksize)
    expected_packed, expected_absmax = reference.quantize_4bit(x, format, blocksize)
    assert torch.equal(packed, expected_packed)
    assert torch.equal(absmax, expected_absmax)


@pytest.mark.parametrize("extra", [0, 1, 3, 64, 4097])
@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_quantize_across_slabs(extra: int, format: str) -> None:
    x = torch.randn(cpu._SLAB + extra, generator=torch.Generator().manual_seed(extra))
    for actual, expected in zip(
        cpu.quantize_4bit(x, format, 64), reference.quantize_4bit(x, format, 64), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("extra", [0, 1, 2, 3, 64, 65, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dequantize_across_slabs(extra: int, dtype: torch.dtype) -> None:
    """Sizes just beyond a slab, where the last slab is short."""
    x = torch.randn(cpu._SLAB + extra, generator=torch.Generator().manual_seed(extra))
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    arguments = (packed, absmax, None, None, "nf4", 64, "", list(x.shape), dtype)
    assert torch.equal(cpu.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_does_not_hang_on_torchs_default_dtype(
    default: torch.dtype, dtype: torch.dtype
) -> None:
    x = torch.randn(641)
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    scales = reference.quantize_absmax(absmax, "dynamic8")
    arguments = (packed, *scales, "nf4", 64, "dynamic8", [641], dtype)
    expected = reference.dequantize_4bit(*arguments)
    torch.set_default_dtype(default)
    try:
        assert torch.equal(cpu.dequantize_4bit(*arguments), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_dequantize_reads_unaligned_bytes() -> None:
    """A packed weight that starts at an odd byte of its storage, as in a memory-mapped file."""
    x = torch.randn(640)
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    shifted = torch.cat([packed.new_zeros(1), packed])[1:]
    arguments = (absmax, None, None, "nf4", 64, "", [640], torch.float32)
    assert torch.equal(
        cpu.dequantize_4bit(shifted, *arguments), reference.dequantize_4bit(packed, *arguments)
    )


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_byte_decodes(format: str) -> None:
    packed = torch.arange(256, dtype=torch.uint8).repeat_interleave(2)[1:]
    arguments = (packed, torch.rand(16), None, None, format, 64, "", [1022], torch.float32)
    assert torch.equal(cpu.dequantize_4bit(*arguments), reference.dequantize_4bit(*arguments))


@given(st.integers(0, 1100), qst.scale_formats, qst.seeds)
def test_dequantize_absmax_equals_the_reference(blocks: int, name: str, seed: int) -> None:
    absmax = torch.randn(blocks, generator=torch.Generator().manual_seed(seed)).abs()
    scales = reference.quantize_absmax(absmax, name)
    expected = reference.dequantize_absmax(*scales, name)
    assert torch.equal(cpu.dequantize_absmax(*scales, name), expected)


@given(
    qst.seeds,
    qst.seeds,
    st.integers(0, 40),
    st.integers(0, 70),
    st.sampled_from([0.0, 0.05, 0.5, 0.99]),
)
def test_dropout_mask_equals_the_reference(
    seed: int, offset: int, m: int, k: int, p: float
) -> None:
    rng = torch.tensor([seed, offset])
    assert torch.equal(cpu.dropout_mask(rng, m, k, p), reference.dropout_mask(rng, m, k, p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("m", "n", "k", "r"),
    [
        (1, 1, 1, 1),
        (5, 33, 70, 4),
        (17, 64, 128, 16),
        (3, 9, 64, 0),
        (3, 5, 1000, 64),
        (4, 5, 1000, 64),
        (1, 5, 1000, 256),
    ],
)
def test_layer_keeps_to_the_tolerance_rule(dtype, dropout, m, n, k, r) -> None:
    generator = torch.Generator().manual_seed(m + n)
    weight = torch.randn(n, k, generator=generator)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 64)
    quantized = (packed, *reference.quantize_absmax(absmax, "dynamic8"))
    shapes = ((m, k), (n,), (r, k), (n, r), (m, n))
    x, bias, lora_a, lora_b, grad_y = (
        torch.randn(s, generator=generator).to(dtype) for s in shapes
    )
    rng = torch.tensor([1, 2]) if dropout else None
    settings = (rng, 0.5, dropout, "nf4", 64, "dynamic8")

    def run(module, *tensors: Tensor) -> list[Tensor]:
        x, bias, lora_a, lora_b, grad_y = tensors
        y, h = module.qlora_forward(x, *quantized, bias, lora_a, lora_b, *settings)
        g = module.lora_project(grad_y, lora_b.T, None, 0.0)
        grad_x = module.qlora_grad_x(grad_y, g, *quantized, lora_a, *settings)
        grad_a = module.lora_grad(g, x, rng, 0.5, dropout)
        grad_b = module.lora_grad(grad_y, h, None, 0.5, 0.0)
        return [y, grad_x, grad_a, grad_b]

    tensors = (x, bias, lora_a, lora_b, grad_y)
    # The oracle multiplies in fp64 with the weight as it is in `dtype`: that cast is not the kernel's error.
    oracle = run(_Rounded(dtype), *(tensor.double() for tensor in tensors))
    factors = [FORWARD_FACTOR] + [GRADIENT_FACTOR] * 3
    for actual, plain, exact, factor in zip(
        run(cpu, *tensors), run(reference, *tensors), oracle, factors, strict=True
    ):
        assert_close_to_oracle(actual, plain, exact, factor)


class _Rounded:
    """The reference in fp64 over a weight that was rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __getattr__(self, name: str):
        def call(*arguments):
            dequantize = reference.dequantize_4bit

            def rounded(*args):
                return dequantize(*args[:-1], self.dtype).to(args[-1])

            reference.dequantize_4bit = rounded
            try:
                return getattr(reference, name)(*arguments)
            finally:
                reference.dequantize_4bit = dequantize

        return call


# --- What lies between is kept ----------------------------------------------------------------------


def _weight(seed: int) -> tuple[tuple, Tensor]:
    """Arguments of dequantize_4bit for a weight of more than one slab, and the result."""
    x = torch.randn(2**20 + 96, generator=torch.Generator().manual_seed(seed))
    packed, absmax = reference.quantize_4bit(x, "nf4", 64)
    arguments = (packed, absmax, None, None, "nf4", 64, "", [x.numel()], torch.bfloat16)
    return arguments, reference.dequantize_4bit(*arguments)


def test_threads_do_not_share_scratch() -> None:
    weights = [_weight(seed) for seed in range(4)]

    def decode(weight: tuple[tuple, Tensor]) -> bool:
        arguments, expected = weight
        return all(torch.equal(cpu.dequantize_4bit(*arguments), expected) for _ in range(8))

    with ThreadPoolExecutor(len(weights)) as pool:
        assert all(pool.map(decode, weights))


def test_scratch_made_in_inference_mode_serves_outside_of_it() -> None:
    arguments, expected = _weight(0)

    def decode_within_and_without() -> Tensor:
        with torch.inference_mode():
            cpu.dequantize_4bit(*arguments)
        return cpu.dequantize_4bit(*arguments)

    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(decode_within_and_without).result(), expected)
