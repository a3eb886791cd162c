"""The fused kernels keep to the tolerance rule: any shape, dtype, format, scale, layout and rank."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import fused_linear, reference
from qlora.kernels.formats import BLOCKSIZES, FORMATS
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import strategies as qst
from tests.on_device import DEVICES, assert_identical, launch

pytestmark = pytest.mark.parametrize("device", DEVICES)


@dataclass(frozen=True)
class Layer:
    """A layer's shape and settings; its tensors are drawn from the seed."""

    m: int = 20
    n: int = 70
    k: int = 96
    r: int = 8
    dtype: torch.dtype = torch.bfloat16
    format: str = "nf4"
    blocksize: int = 32
    scale_format: str = "dynamic8"
    dropout: float = 0.0
    bias: bool = True
    scaling: float = 0.7
    seed: int = 0

    def normal(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + sum(shape))
        return torch.randn(shape, generator=generator).to(self.dtype)

    @property
    def settings(self) -> tuple[float, float, str, int, str]:
        return self.scaling, self.dropout, self.format, self.blocksize, self.scale_format

    @property
    def rng(self) -> Tensor | None:
        return torch.tensor([self.seed, 3]) if self.dropout else None

    def quantized(self) -> tuple[Tensor | None, ...]:
        packed, absmax = reference.quantize_4bit(
            self.normal(self.n, self.k), self.format, self.blocksize
        )
        if not self.scale_format:
            return packed, absmax, None, None
        return packed, *reference.quantize_absmax(absmax, self.scale_format)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A, scaled so that its product is of the size of x, and B."""
        lora_a = (self.normal(self.r, self.k) / self.k**0.5).to(self.dtype)
        return lora_a, self.normal(self.n, self.r)

    def weight64(self, quantized: tuple[Tensor | None, ...]) -> Tensor:
        """The dequantized weight in the layer's dtype, as fp64."""
        kind = (self.format, self.blocksize, self.scale_format)
        shape = [self.n, self.k]
        return reference.dequantize_4bit(*quantized, *kind, shape, self.dtype).double()


def _check_forward(device: str, layer: Layer, x: Tensor | None = None) -> None:
    x = layer.normal(layer.m, layer.k) if x is None else x
    bias = layer.normal(layer.n) if layer.bias else None
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    arguments = (x, *quantized, bias, lora_a, lora_b, layer.rng, *layer.settings)
    y, h = launch(device, fused_linear.qlora_forward, *arguments)

    plain_y, plain_h = reference.qlora_forward(*arguments)
    oracle_h = reference.lora_project(x.double(), lora_a.double(), layer.rng, layer.dropout)
    oracle_y = F.linear(
        x.double(), layer.weight64(quantized), bias.double() if layer.bias else None
    )
    oracle_y += layer.scaling * F.linear(oracle_h, lora_b.double())
    assert_close_to_oracle(h, plain_h, oracle_h, FORWARD_FACTOR)
    assert_close_to_oracle(y, plain_y, oracle_y, FORWARD_FACTOR)


def _check_grad_x(
    device: str, layer: Layer, grad_y: Tensor | None = None, g: Tensor | None = None
) -> None:
    grad_y = layer.normal(layer.m, layer.n) if grad_y is None else grad_y
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    g = grad_y @ lora_b if g is None else g
    arguments = (grad_y, g, *quantized, lora_a, layer.rng, *layer.settings)
    grad_x = launch(device, fused_linear.qlora_grad_x, *arguments)

    low_rank = g.double() @ lora_a.double()
    if layer.dropout:
        keep = reference.dropout_mask(layer.rng, layer.m, layer.k, layer.dropout)
        low_rank = low_rank * keep / (1 - layer.dropout)
    oracle = grad_y.double() @ layer.weight64(quantized) + layer.scaling * low_rank
    assert_close_to_oracle(grad_x, reference.qlora_grad_x(*arguments), oracle, GRADIENT_FACTOR)


def _check(device: str, layer: Layer) -> None:
    _check_forward(device, layer)
    _check_grad_x(device, layer)


@settings(max_examples=25)
@given(
    st.builds(
        Layer,
        m=st.integers(1, 40),
        n=st.integers(1, 80),
        k=st.integers(1, 140),
        r=st.integers(0, 20),
        dtype=qst.dtypes,
        format=qst.formats,
        blocksize=qst.small_blocksizes,
        scale_format=st.sampled_from(["", "dynamic8", "e4m3"]),
        dropout=st.sampled_from([0.0, 0.1, 0.8]),
        bias=st.booleans(),
        scaling=st.sampled_from([0.25, 0.7, 2.0]),
        seed=st.integers(0, 1000),
    )
)
def test_any_layer(device: str, layer: Layer) -> None:
    _check(device, layer)


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("m", [1, 65, 130])
def test_every_configuration(device: str, m: int, dtype: torch.dtype) -> None:
    """One row of the tables in tuning.py each, with tiles that end short in every direction."""
    _check(device, Layer(m=m, n=130, k=136, dtype=dtype, blocksize=64, dropout=0.3))


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("scale_format", ["", "dynamic8", "e4m3"])
def test_every_format(device: str, format: str, scale_format: str) -> None:
    _check(device, Layer(m=3, format=format, scale_format=scale_format))


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("k", [96, 256])
def test_blocks_that_straddle_rows(device: str, blocksize: int, k: int) -> None:
    """Rows shorter than a block, blocks that begin anywhere in a row, and rows of whole blocks."""
    _check(device, Layer(m=3, n=40, k=k, blocksize=blocksize))


@pytest.mark.parametrize("r", [0, 1, 16, 17, 64, 65, 256])
def test_ranks(device: str, r: int) -> None:
    _check(device, Layer(m=3, n=40, k=64, r=r, dropout=0.4 if r % 2 else 0.0))


@pytest.mark.parametrize("dtype", qst.DTYPES)
def test_odd_rows_are_dequantized_first(device: str, dtype: torch.dtype) -> None:
    """An odd k has no fused path: rows begin in the middle of a byte."""
    _check(device, Layer(m=3, n=7, k=51, dtype=dtype, dropout=0.4))
    _check(device, Layer(m=3, n=7, k=51, dtype=dtype))


def test_float64_is_dequantized_first(device: str) -> None:
    layer = Layer(m=3, n=7, k=52, dtype=torch.float64, dropout=0.4)
    x, grad_y = layer.normal(3, 52), layer.normal(3, 7)
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    arguments = (x, *quantized, None, lora_a, lora_b, layer.rng, *layer.settings)
    torch.testing.assert_close(
        launch(device, fused_linear.qlora_forward, *arguments), reference.qlora_forward(*arguments)
    )
    arguments = (grad_y, grad_y @ lora_b, *quantized, lora_a, layer.rng, *layer.settings)
    torch.testing.assert_close(
        launch(device, fused_linear.qlora_grad_x, *arguments), reference.qlora_grad_x(*arguments)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(device: str, dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype, dropout=0.2)
    _check_forward(device, layer, layer.normal(layer.k, layer.m).T)
    _check_forward(device, layer, layer.normal(layer.m, 2 * layer.k)[:, ::2])
    _check_forward(device, layer, layer.normal(1, layer.k).expand(layer.m, layer.k))
    _check_grad_x(device, layer, layer.normal(layer.n, layer.m).T, layer.normal(layer.r, layer.m).T)
    _check_grad_x(device, layer, layer.normal(layer.m, layer.n + 5)[:, 5:])


def test_strided_parameters(device: str) -> None:
    """Transposed factors and an expanded bias give what contiguous ones give."""
    layer = Layer()
    x, grad_y = layer.normal(layer.m, layer.k), layer.normal(layer.m, layer.n)
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    strided = tuple(factor.T.contiguous().T for factor in (lora_a, lora_b))
    bias = layer.normal(1).expand(layer.n)

    def forward(bias: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        arguments = (x, *quantized, bias, *factors, None, *layer.settings)
        return launch(device, fused_linear.qlora_forward, *arguments)

    assert_identical(forward(bias, strided), forward(bias.contiguous(), (lora_a, lora_b)))
    grads = (
        launch(
            device,
            fused_linear.qlora_grad_x,
            *(grad_y, grad_y @ lora_b, *quantized, a, None, *layer.settings),
        )
        for a in (lora_a, strided[0])
    )
    assert_identical(*grads)


@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 64), (3, 0, 64), (3, 40, 0)])
def test_empty_operands(device: str, m: int, n: int, k: int) -> None:
    _check(device, Layer(m=m, n=n, k=k))


def test_inputs_are_not_written(device: str) -> None:
    layer = Layer(dropout=0.5)
    bias, x = layer.normal(layer.n), layer.normal(layer.m, layer.k)
    tensors = (x, *layer.quantized(), bias, *layer.factors(), layer.rng)
    before = tuple(tensor.clone() for tensor in tensors)
    launch(device, fused_linear.qlora_forward, *tensors, *layer.settings)
    assert_identical(tensors, before)


def test_a_result_does_not_depend_on_its_tile(device: str) -> None:
    """The rows of a batch are the results of its parts, dropout's mask aside: no tile reads another's."""
    layer = replace(Layer(), m=40)
    x, quantized = layer.normal(layer.m, layer.k), layer.quantized()
    rest = (None, *layer.factors(), None, *layer.settings)
    whole, _ = launch(device, fused_linear.qlora_forward, x, *quantized, *rest)
    part, _ = launch(device, fused_linear.qlora_forward, x[30:], *quantized, *rest)
    torch.testing.assert_close(whole[30:], part)
