"""The forward for a few tokens: held to its own specification closely, and to the tolerance rule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from qlora.kernels import few_tokens, reference, tuning
from qlora.kernels.formats import BLOCKSIZES, FORMATS, scale_codebook
from qlora.kernels.lookup import lookup_table, rounded_codebook
from qlora.testing import FORWARD_FACTOR, assert_close_to_oracle
from tests import strategies as qst
from tests.on_device import DEVICES, assert_identical, interpreted_only, launch

HALF_DTYPES = (torch.float16, torch.bfloat16)

every_device = pytest.mark.parametrize("device", DEVICES)


@dataclass(frozen=True)
class Layer:
    """A layer's shape and settings, and what it is given; tensors are drawn from the seed."""

    m: int = 3
    n: int = 40
    k: int = 416
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    format: str = "nf4"
    blocksize: int = 64
    scale_format: str = "dynamic8"
    bias: bool = True
    scaling: float = 0.7
    seed: int = 0

    def normal(self, name: str, *shape: int) -> Tensor:
        """fp32; each name has numbers of its own."""
        generator = torch.Generator().manual_seed(self.seed + sum(map(ord, name)))
        return torch.randn(shape, generator=generator)

    def drawn(self) -> Inputs:
        """x, W and B of size 1, h of the size that x A^T has."""
        packed, scales = self.quantized(self.normal("weight", self.n, self.k))
        return Inputs(
            self,
            x=self.normal("x", self.m, self.k).to(self.dtype),
            packed=packed,
            scales=scales,
            bias=self.normal("bias", self.n).to(self.dtype) if self.bias else None,
            h=self.normal("h", self.m, self.r).to(self.dtype),
            lora_b=self.normal("b", self.n, self.r).to(self.dtype),
        )

    def quantized(self, weight: Tensor) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        packed, absmax = reference.quantize_4bit(weight, self.format, self.blocksize)
        if not self.scale_format:
            return packed, (absmax, None, None)
        return packed, reference.quantize_absmax(absmax, self.scale_format)


@dataclass(frozen=True)
class Inputs:
    """A layer's tensors; h is the adapter's share that the caller has computed."""

    layer: Layer
    x: Tensor
    packed: Tensor
    scales: tuple[Tensor | None, ...]
    bias: Tensor | None
    h: Tensor
    lora_b: Tensor

    @property
    def kind(self) -> tuple[str, int, str]:
        return self.layer.format, self.layer.blocksize, self.layer.scale_format

    def run(self, device: str) -> Tensor:
        assert few_tokens.fits(self.x, self.packed, self.layer.blocksize)
        tensors = (self.x, self.packed, *self.scales, self.bias, self.h, self.lora_b)
        return launch(device, few_tokens.forward, *tensors, self.layer.scaling, *self.kind)

    def weight(self, codebook: Tensor) -> Tensor:
        """codebook [16] of each code, times absmax as fp32 decodes it; fp64 [n, k]."""
        absmax, *nested = self.scales
        if nested[0] is not None:
            absmax = reference.dequantize_absmax(absmax, *nested, self.layer.scale_format)
        codes = torch.stack([self.packed >> 4, self.packed & 15], dim=1).view(-1).long()
        scales = absmax.double().repeat_interleave(self.layer.blocksize)[: len(codes)]
        return (codebook.double()[codes] * scales).view(self.layer.n, self.layer.k)

    def product(self, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """(y, the sum of its terms' magnitudes) in fp64."""
        operands = (self.x.double(), weight, h.double(), self.lora_b.double())
        bias = torch.zeros(()) if self.bias is None else self.bias

        def combine(x: Tensor, w: Tensor, h: Tensor, b: Tensor, scaling: float) -> Tensor:
            return x @ w.T + scaling * (h @ b.T)

        y = combine(*operands, self.layer.scaling) + bias
        magnitudes = combine(*(o.abs() for o in operands), abs(self.layer.scaling))
        return y, magnitudes + bias.abs()


def assert_meets_specification(y: Tensor, inputs: Inputs) -> None:
    """y is the product with codebook16[code] / factor * absmax, plus the adapter and the bias.

    Products of 16-bit values are exact in fp32. A term goes through no more than 128 sums within its block and
    tile (r / 8 for the adapter's), one for each step of 1024 columns, and those of 8 warps and 8 blocks;
    scale, scaling and unit add 8 roundings. Each is off by 2^-24 of what is no larger than the sum of all terms'
    magnitudes. (Tensor cores cut where others round, but sum 16 terms at once.) Then y is rounded once.
    """
    layer = inputs.layer
    codebook, factor = rounded_codebook(layer.format, layer.dtype)
    expected, magnitude = inputs.product(inputs.weight(codebook.double() / factor), inputs.h)
    bound = (200 + layer.r / 8 + layer.k / 1024) * 2**-24 * magnitude
    info = torch.finfo(layer.dtype)
    half_ulp = info.eps / 2 * (expected.abs() + bound).clamp(min=info.smallest_normal)
    error = (y.double() - expected).abs()
    assert y.dtype == layer.dtype
    assert y.shape == expected.shape
    assert (error <= bound + half_ulp).all(), (error / (bound + half_ulp)).max()


def check(device: str, inputs: Inputs) -> None:
    assert_meets_specification(inputs.run(device), inputs)


# --- Its own specification --------------------------------------------------------------------------


def most_tokens(k: int, blocksize: int) -> int:
    """What is left of 16 tokens where blocks of scales within a tile take columns: 32 in all."""
    width = min(blocksize, k & -k, 128)
    return min(16, 32 * width // 128)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    k, blocksize = 32 * draw(st.integers(1, 93)), draw(qst.blocksizes)
    return Layer(
        m=draw(st.integers(1, most_tokens(k, blocksize))),
        n=draw(st.integers(1, 70)),
        k=k,
        r=draw(st.integers(0, 40)),
        dtype=draw(st.sampled_from(HALF_DTYPES)),
        format=draw(qst.formats),
        blocksize=blocksize,
        scale_format=draw(st.sampled_from(["", "dynamic8", "e4m3"])),
        bias=draw(st.booleans()),
        scaling=draw(st.sampled_from([0.25, 0.7, 2.0, -1.0])),
        seed=draw(st.integers(0, 1000)),
    )


@every_device
@settings(max_examples=16)
@given(layers())
def test_any_layer(device: str, layer: Layer) -> None:
    check(device, layer.drawn())


CHOICES = [
    *((m, 512) for m in (1, 2, 3, 4, 5, 8, 9, 16)),
    *((m, 64) for m in (1, 3, 16)),
    *((m, 32) for m in (1, 2, 8)),
]
"""(tokens, blocksize): columns that tokens leave over take blocks within a tile, then further tiles."""


@every_device
@pytest.mark.parametrize(("m", "blocksize"), CHOICES)
def test_every_choice(device: str, m: int, blocksize: int) -> None:
    """k ends within a step, whatever its width, and where blocks are short within a tile."""
    k = 1024 + 320 if blocksize < 128 else 4096 + 1024 + 384
    check(device, Layer(m=m, n=17, k=k, blocksize=blocksize).drawn())


def test_every_choice_is_reached() -> None:
    found = [tuning.few_tokens(m, max(128 // blocksize, 1)) for m, blocksize in CHOICES]
    for _, config in tuning.FEW_TOKENS:
        assert any(config.items() <= choice.items() for choice in found)
    assert {choice["TILES"] for choice in found} == {1, 2, 4}


@every_device
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocks_that_straddle_rows(device: str, blocksize: int) -> None:
    """Rows of 160 columns: blocks of 64 and more begin and end anywhere in a row."""
    check(device, Layer(m=2, n=33, k=160, blocksize=blocksize).drawn())


@every_device
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_every_format(device: str, format: str) -> None:
    for dtype in HALF_DTYPES:
        check(device, Layer(n=16, k=128, format=format, dtype=dtype).drawn())


@every_device
@pytest.mark.parametrize("r", [0, 1, 16, 17, 128, 129, 300])
def test_ranks(device: str, r: int) -> None:
    """A rank of several steps of 8 warps with 16 each, and none."""
    check(device, Layer(n=16, k=64, r=r).drawn())


# --- The tolerance rule -----------------------------------------------------------------------------


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("m", "n", "k"), [(16, 32, 512), (16, 32, 4096), (4, 128, 1024)])
def test_the_tolerance_rule(device: str, m: int, n: int, k: int, dtype: torch.dtype) -> None:
    """Against the weight as it is stored, not rounded."""
    assert_keeps_the_rule(device, Layer(m=m, n=n, k=k, dtype=dtype, r=16).drawn())


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("m", "n", "blocksize"), [(8, 64, 32), (16, 32, 64), (16, 32, 256)])
def test_the_tolerance_rule_for_inputs_of_one_sign(
    device: str, m: int, n: int, blocksize: int, dtype: torch.dtype
) -> None:
    """Over which the errors of a codebook add up, if they have a mean."""
    layer = Layer(m=m, n=n, k=4096, r=0, dtype=dtype, blocksize=blocksize, bias=False)
    inputs = layer.drawn()
    assert_keeps_the_rule(device, replace(inputs, x=inputs.x.abs()))


@every_device
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("heavy", ["Laplace", "Student's t"])
def test_the_tolerance_rule_for_weights_with_heavy_tails(
    device: str, heavy: str, dtype: torch.dtype
) -> None:
    """Where the codes of small values are more frequent than in normal weights; inputs of one sign again."""
    layer = Layer(m=16, n=32, k=4096, r=0, dtype=dtype, blocksize=64, bias=False)
    normal, other = layer.normal("weight", 32, 4096), layer.normal("other", 3, 32, 4096)
    if heavy == "Laplace":
        weight = normal * other[:2].square().sum(0).sqrt()
    else:
        weight = normal / other.square().mean(0).sqrt()  # three degrees of freedom
    packed, scales = layer.quantized(weight)
    inputs = layer.drawn()
    inputs = replace(inputs, x=inputs.x.abs(), packed=packed, scales=scales)
    assert_keeps_the_rule(device, inputs)


@every_device
def test_the_tolerance_rule_for_one_token(device: str) -> None:
    assert_keeps_the_rule(device, Layer(m=1, n=512, k=512, r=16, blocksize=32).drawn())


def assert_keeps_the_rule(device: str, inputs: Inputs) -> None:
    layer, weight = inputs.layer, (inputs.packed, *inputs.scales, inputs.bias)
    lora_a = (layer.normal("a", layer.r, layer.k) / layer.k**0.5).to(layer.dtype)
    rest = (None, layer.scaling, 0.0, *inputs.kind)
    plain_y, plain_h = reference.qlora_forward(inputs.x, *weight, lora_a, inputs.lora_b, *rest)
    y = replace(inputs, h=plain_h).run(device)
    codebook = torch.tensor(FORMATS[layer.format].values)
    oracle, _ = inputs.product(inputs.weight(codebook), inputs.x.double() @ lora_a.double().T)
    assert_close_to_oracle(y, plain_y, oracle, FORWARD_FACTOR)


# --- Corners ----------------------------------------------------------------------------------------


@every_device
def test_strided_operands(device: str) -> None:
    """They give what contiguous ones give."""
    inputs = Layer(m=4, n=16, k=160).drawn()
    x, lora_b = inputs.x, inputs.lora_b
    expected = inputs.run(device)
    shifted = torch.cat([x.new_zeros(1), x.view(-1)])[1:].view(x.shape)
    for view in (x.T.contiguous().T, x.repeat_interleave(2, dim=1)[:, ::2], shifted):
        assert_identical(replace(inputs, x=view).run(device), expected)
    for view in (lora_b.T.contiguous().T, lora_b.repeat_interleave(2, dim=1)[:, ::2]):
        assert_identical(replace(inputs, lora_b=view).run(device), expected)
    bias = inputs.bias.repeat_interleave(2)[::2]
    scales = tuple(s if s.dim() == 0 else s.repeat_interleave(2)[::2] for s in inputs.scales)
    packed = torch.cat([inputs.packed[:16], inputs.packed])[16:]
    strided = replace(inputs, bias=bias, scales=scales, packed=packed)
    assert_identical(strided.run(device), expected)


@every_device
@pytest.mark.parametrize(
    ("dtype", "size_x", "size_weight"),
    [
        (torch.float16, 60000, 1e-3),
        (torch.float16, 1e-3, 60000),  # a scale beyond fp16 serves as well
        (torch.float16, 1e-3, 1e5),
        (torch.float16, 1e-6, 1e-2),  # x and y are subnormal
        (torch.bfloat16, 1e33, 1e-3),
        (torch.bfloat16, 1e-3, 1e33),
        (torch.bfloat16, 1e-30, 1e-4),
        (torch.bfloat16, 1e-4, 1e-30),
    ],
)
def test_magnitudes(device: str, dtype: torch.dtype, size_x: float, size_weight: float) -> None:
    """Nothing overflows on the way to a finite y, nor does it vanish."""
    layer = Layer(n=16, dtype=dtype, bias=False, r=0)
    weight = layer.normal("weight", layer.n, layer.k).clamp(-1, 1) * size_weight
    packed, scales = layer.quantized(weight)
    x = (layer.normal("x", layer.m, layer.k).clamp(-1, 1) * size_x).to(dtype)
    inputs = replace(layer.drawn(), x=x, packed=packed, scales=scales)
    assert inputs.run(device).isfinite().all()
    check(device, inputs)


@every_device
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("blocksize", [32, 4096])
def test_what_is_not_finite_stays_in_its_token(device: str, bad: float, blocksize: int) -> None:
    inputs = Layer(m=4, n=16, blocksize=blocksize).drawn()
    expected = inputs.run(device)
    x = inputs.x.clone()
    x[2, 300] = bad
    spoiled = replace(inputs, x=x)
    oracle, _ = spoiled.product(inputs.weight(torch.tensor(FORMATS["nf4"].values)), inputs.h)
    expected[2] = oracle[2].to(expected.dtype)
    actual = spoiled.run(device)
    assert not actual[2].isfinite().any()
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@every_device
@pytest.mark.parametrize("scale_format", ["", "dynamic8"])
def test_zero_blocks(device: str, scale_format: str) -> None:
    layer = Layer(scale_format=scale_format)
    weight = layer.normal("weight", layer.n, layer.k)
    weight[:, 64:192] = 0
    weight[20:] = 0
    packed, scales = layer.quantized(weight)
    check(device, replace(layer.drawn(), packed=packed, scales=scales))
    only_zeros, scales = layer.quantized(torch.zeros_like(weight))
    bare = replace(layer, bias=False, r=0).drawn()
    assert replace(bare, packed=only_zeros, scales=scales).run(device).eq(0).all()


@every_device
@pytest.mark.parametrize("n", [0, 1, 7, 9, 16])
def test_rows_around_a_program(device: str, n: int) -> None:
    check(device, Layer(n=n).drawn())


@interpreted_only
@pytest.mark.parametrize(("m", "n", "k"), [(1, 3, 32), (3, 17, 160), (2, 9, 1152), (5, 8, 192)])
def test_nothing_is_read_beyond_the_ends(m: int, n: int, k: int) -> None:
    """Every address that is loaded from lies in an input or in a table."""
    inputs = Layer(m=m, n=n, k=k, r=17, blocksize=32).drawn()
    cpu = torch.device("cpu")
    tables = lookup_table("nf4", torch.bfloat16, cpu), scale_codebook("dynamic8", cpu)
    tensors = (inputs.x, inputs.packed, *inputs.scales, inputs.bias, inputs.h, inputs.lora_b)
    ends = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in (*tensors, *tables)]
    load = InterpreterBuilder.create_masked_load

    def check_and_load(self: InterpreterBuilder, addresses: Any, mask: Any, *rest: Any) -> Any:
        loaded = addresses.data[mask.data]
        inside = sum((loaded >= start) & (loaded < end) for start, end in ends)
        assert inside.all()
        return load(self, addresses, mask, *rest)

    with mock.patch.object(InterpreterBuilder, "create_masked_load", check_and_load):
        check("cpu", inputs)


@every_device
def test_inputs_are_not_written(device: str) -> None:
    inputs = Layer().drawn()
    tensors = (inputs.x, inputs.packed, *inputs.scales, inputs.bias, inputs.h, inputs.lora_b)
    before = tuple(tensor.clone() for tensor in tensors)
    inputs.run(device)
    assert_identical(tensors, before)


# --- Which layers, and how --------------------------------------------------------------------------


def _fits(m: int, k: int, blocksize: int = 64, dtype: torch.dtype = torch.bfloat16) -> bool:
    x, packed = torch.empty(m, k, dtype=dtype), torch.empty(8 * k // 2, dtype=torch.uint8)
    return few_tokens.fits(x, packed, blocksize)


def test_layers_that_do_not_fit() -> None:
    assert _fits(1, 64)
    assert _fits(16, 64, dtype=torch.float16)
    assert not any(_fits(1, 64, dtype=dtype) for dtype in (torch.float32, torch.float64))
    assert not _fits(0, 64)
    assert not _fits(1, 0)
    assert not _fits(17, 64)
    assert not any(_fits(1, k) for k in (16, 31, 33, 48))
    packed = torch.empty(128, dtype=torch.uint8)
    x = torch.empty(1, 64, dtype=torch.bfloat16)
    assert few_tokens.fits(x, packed[32:64], 64)
    assert not few_tokens.fits(x, packed[8:40], 64)
    assert not few_tokens.fits(x, packed[1:33], 64)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("k", [32, 96, 64, 192, 128, 4096])
def test_tokens_that_fit(k: int, blocksize: int) -> None:
    most = most_tokens(k, blocksize)
    assert [_fits(m, k, blocksize) for m in range(20)] == [0 < m <= most for m in range(20)]


def test_offsets_in_words_have_32_bits() -> None:
    x = torch.empty(1, 2**20, dtype=torch.bfloat16, device="meta")
    for rows, fit in ((2**14 - 1, True), (2**14, False)):
        packed = torch.empty(rows * 2**19, dtype=torch.uint8, device="meta")
        assert few_tokens.fits(x, packed, 64) == fit
