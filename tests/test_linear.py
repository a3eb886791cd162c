"""The layer keeps to the tolerance rule in one pass and in slabs: any shape, dtype, format, scale, layout and rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import ModuleType
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import few_tokens, fused_linear, linear, lora, many_tokens, reference, tuning
from qlora.kernels.formats import BLOCKSIZES, FORMATS
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import strategies as qst
from tests.on_device import DEVICES, assert_identical, launch

on_devices = pytest.mark.parametrize("device", DEVICES)
kernels = pytest.mark.parametrize("kernel", [fused_linear, many_tokens], ids=["fused", "many"])


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


def _forward(
    device: str,
    kernel: ModuleType,
    layer: Layer,
    x: Tensor,
    quantized: tuple,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
) -> tuple[Tensor, Tensor]:
    """y and h; in slabs of 32 rows where the kernel takes slabs."""
    if kernel is linear:
        arguments = (x, *quantized, bias, lora_a, lora_b, layer.rng, *layer.settings)
        return launch(device, linear.qlora_forward, *arguments)
    h = launch(device, lora.lora_project, x, lora_a, layer.rng, layer.dropout)
    kind = (layer.format, layer.blocksize, layer.scale_format)
    arguments = (x, *quantized, bias, h, lora_b, layer.scaling, *kind)
    with mock.patch.multiple(tuning, SLAB_BYTES=1, SLAB_MULTIPLE=32):
        return launch(device, kernel.forward, *arguments), h


def _grad_x(device: str, kernel: ModuleType, *arguments: object) -> Tensor:
    function = linear.qlora_grad_x if kernel is linear else kernel.grad_x
    with mock.patch.multiple(tuning, SLAB_BYTES=1, SLAB_MULTIPLE=32):
        return launch(device, function, *arguments)


def _check_forward(device: str, kernel: ModuleType, layer: Layer, x: Tensor | None = None) -> None:
    x = layer.normal(layer.m, layer.k) if x is None else x
    bias = layer.normal(layer.n) if layer.bias else None
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    y, h = _forward(device, kernel, layer, x, quantized, bias, lora_a, lora_b)

    arguments = (x, *quantized, bias, lora_a, lora_b, layer.rng, *layer.settings)
    plain_y, plain_h = reference.qlora_forward(*arguments)
    oracle_h = reference.lora_project(x.double(), lora_a.double(), layer.rng, layer.dropout)
    oracle_y = F.linear(
        x.double(), layer.weight64(quantized), bias.double() if layer.bias else None
    )
    oracle_y += layer.scaling * F.linear(oracle_h, lora_b.double())
    assert_close_to_oracle(h, plain_h, oracle_h, FORWARD_FACTOR)
    assert_close_to_oracle(y, plain_y, oracle_y, FORWARD_FACTOR)


def _check_grad_x(
    device: str,
    kernel: ModuleType,
    layer: Layer,
    grad_y: Tensor | None = None,
    g: Tensor | None = None,
) -> None:
    grad_y = layer.normal(layer.m, layer.n) if grad_y is None else grad_y
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    g = grad_y @ lora_b if g is None else g
    arguments = (grad_y, g, *quantized, lora_a, layer.rng, *layer.settings)
    grad_x = _grad_x(device, kernel, *arguments)

    low_rank = g.double() @ lora_a.double()
    if layer.dropout:
        keep = reference.dropout_mask(layer.rng, layer.m, layer.k, layer.dropout)
        low_rank = low_rank * keep / (1 - layer.dropout)
    oracle = grad_y.double() @ layer.weight64(quantized) + layer.scaling * low_rank
    assert_close_to_oracle(grad_x, reference.qlora_grad_x(*arguments), oracle, GRADIENT_FACTOR)


def _check(device: str, kernel: ModuleType, layer: Layer) -> None:
    _check_forward(device, kernel, layer)
    _check_grad_x(device, kernel, layer)


@on_devices
@kernels
@settings(max_examples=25)
@given(
    st.builds(
        Layer,
        m=st.integers(1, 40),
        n=st.integers(1, 80),
        k=st.integers(1, 70).map(lambda half: 2 * half),
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
def test_any_layer(device: str, kernel: ModuleType, layer: Layer) -> None:
    _check(device, kernel, layer)


@on_devices
@kernels
@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("m", [1, 65, 130])
def test_every_configuration(device: str, kernel: ModuleType, m: int, dtype: torch.dtype) -> None:
    """One row of the tables in tuning.py each, with tiles that end short in every direction."""
    _check(device, kernel, Layer(m=m, n=130, k=136, dtype=dtype, blocksize=64, dropout=0.3))


@on_devices
@kernels
@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("scale_format", ["", "dynamic8", "e4m3"])
def test_every_format(device: str, kernel: ModuleType, format: str, scale_format: str) -> None:
    _check(device, kernel, Layer(m=3, format=format, scale_format=scale_format))


@on_devices
@kernels
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("k", [96, 256])
def test_blocks_that_straddle_rows(device: str, kernel: ModuleType, blocksize: int, k: int) -> None:
    """Rows shorter than a block, blocks that begin anywhere in a row, and rows of whole blocks."""
    _check(device, kernel, Layer(m=3, n=40, k=k, blocksize=blocksize))


@on_devices
@kernels
@pytest.mark.parametrize("r", [0, 1, 16, 17, 64, 65, 256])
def test_ranks(device: str, kernel: ModuleType, r: int) -> None:
    _check(device, kernel, Layer(m=3, n=40, k=64, r=r, dropout=0.4 if r % 2 else 0.0))


@on_devices
@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(device: str, kernel: ModuleType, dtype: torch.dtype) -> None:
    layer = Layer(dtype=dtype, dropout=0.2)
    _check_forward(device, kernel, layer, layer.normal(layer.k, layer.m).T)
    _check_forward(device, kernel, layer, layer.normal(layer.m, 2 * layer.k)[:, ::2])
    _check_forward(device, kernel, layer, layer.normal(1, layer.k).expand(layer.m, layer.k))
    _check_grad_x(
        device, kernel, layer, layer.normal(layer.n, layer.m).T, layer.normal(layer.r, layer.m).T
    )
    _check_grad_x(device, kernel, layer, layer.normal(layer.m, layer.n + 5)[:, 5:])


@on_devices
@kernels
def test_strided_parameters(device: str, kernel: ModuleType) -> None:
    """Transposed factors and an expanded bias give what contiguous ones give."""
    layer = Layer()
    x, grad_y = layer.normal(layer.m, layer.k), layer.normal(layer.m, layer.n)
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    strided = tuple(factor.T.contiguous().T for factor in (lora_a, lora_b))
    bias = layer.normal(1).expand(layer.n)

    def forward(bias: Tensor, factors: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return _forward(device, kernel, layer, x, quantized, bias, *factors)

    assert_identical(forward(bias, strided), forward(bias.contiguous(), (lora_a, lora_b)))
    grads = (
        _grad_x(
            device,
            kernel,
            *(grad_y, grad_y @ lora_b, *quantized, a, None, *layer.settings),
        )
        for a in (lora_a, strided[0])
    )
    assert_identical(*grads)


@on_devices
@kernels
@pytest.mark.parametrize(("m", "n", "k"), [(0, 40, 64), (3, 0, 64), (3, 40, 0)])
def test_empty_operands(device: str, kernel: ModuleType, m: int, n: int, k: int) -> None:
    _check(device, kernel, Layer(m=m, n=n, k=k))


@on_devices
@kernels
def test_inputs_are_not_written(device: str, kernel: ModuleType) -> None:
    layer = Layer(dropout=0.5)
    bias, x = layer.normal(layer.n), layer.normal(layer.m, layer.k)
    quantized, factors, rng = layer.quantized(), layer.factors(), layer.rng
    tensors = (x, *quantized, bias, *factors, rng)
    before = tuple(tensor.clone() for tensor in tensors)
    _forward(device, kernel, layer, x, quantized, bias, *factors)
    grad_y, g = layer.normal(layer.m, layer.n), layer.normal(layer.m, layer.r)
    _grad_x(device, kernel, grad_y, g, *quantized, factors[0], rng, *layer.settings)
    assert_identical(tensors, before)


@on_devices
@kernels
def test_a_result_does_not_depend_on_its_tile(device: str, kernel: ModuleType) -> None:
    """The rows of a batch are the results of its parts, dropout's mask aside: no tile reads another's."""
    layer = replace(Layer(), m=40)
    x, quantized = layer.normal(layer.m, layer.k), layer.quantized()
    rest = (quantized, None, *layer.factors())
    whole, _ = _forward(device, kernel, layer, x, *rest)
    part, _ = _forward(device, kernel, layer, x[30:], *rest)
    torch.testing.assert_close(whole[30:], part)


# --- Which kernel -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("m", "k", "dtype", "kernel"),
    [
        (1, 64, torch.bfloat16, few_tokens),
        (16, 64, torch.float16, few_tokens),
        (17, 64, torch.bfloat16, fused_linear),
        (1, 64, torch.float32, fused_linear),
        (1, 62, torch.bfloat16, fused_linear),
        (0, 64, torch.bfloat16, fused_linear),
        (1023, 64, torch.bfloat16, fused_linear),
        (1024, 64, torch.bfloat16, many_tokens),
        (1024, 62, torch.float32, many_tokens),
    ],
)
def test_the_kernel_is_chosen_by_tokens(
    m: int, k: int, dtype: torch.dtype, kernel: ModuleType
) -> None:
    layer = Layer(m=m, n=32, k=k, dtype=dtype, blocksize=64)
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    empty = torch.empty(m, layer.n, dtype=dtype)
    with mock.patch.object(linear, "lora_project"), mock.patch.object(kernel, "forward") as chosen:
        arguments = (torch.empty(m, k, dtype=dtype), *quantized, None, lora_a, lora_b)
        linear.qlora_forward(*arguments, None, *layer.settings)
    chosen.assert_called_once()
    if kernel is not few_tokens:
        with mock.patch.object(kernel, "grad_x") as chosen:
            g = torch.empty(m, layer.r, dtype=dtype)
            linear.qlora_grad_x(empty, g, *quantized, lora_a, None, *layer.settings)
        chosen.assert_called_once()


@on_devices
@pytest.mark.parametrize("m", [2, 40, 72])
def test_every_kernel_gets_what_it_is_called_with(device: str, m: int) -> None:
    """Few, some and many tokens, with everything that a layer can have."""
    dtype = torch.bfloat16 if m == 2 else torch.float32
    layer = Layer(m=m, n=200, k=256, dtype=dtype, blocksize=64, dropout=0.3)
    with mock.patch.object(tuning, "MANY_TOKENS", 64):
        _check(device, linear, layer)


@on_devices
@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_odd_rows_are_dequantized_first(device: str, dropout: float, dtype: torch.dtype) -> None:
    """They begin in the middle of a byte, for which there is no kernel."""
    _check(device, linear, Layer(m=3, n=7, k=51, dtype=dtype, dropout=dropout))


@on_devices
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_float64_is_dequantized_first(device: str, dropout: float) -> None:
    layer = Layer(m=3, n=7, k=52, dtype=torch.float64, dropout=dropout)
    x, grad_y = layer.normal(3, 52), layer.normal(3, 7)
    quantized, (lora_a, lora_b) = layer.quantized(), layer.factors()
    forward = (x, *quantized, layer.normal(7), lora_a, lora_b, layer.rng, *layer.settings)
    backward = (grad_y, grad_y @ lora_b, *quantized, lora_a, layer.rng, *layer.settings)
    torch.testing.assert_close(
        launch(device, linear.qlora_forward, *forward), reference.qlora_forward(*forward)
    )
    torch.testing.assert_close(
        launch(device, linear.qlora_grad_x, *backward), reference.qlora_grad_x(*backward)
    )
