"""`qlora_linear`: values and gradients by the fp64 oracle, dropout, and what is held between the passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from qlora import QuantizedTensor, dequantize_4bit, qlora_linear, quantize_4bit
from qlora.functional import QLoRALinearFunction
from qlora.kernels import reference
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import strategies as qst

SCALING = 0.5


@dataclass
class Layer:
    """A layer's tensors, and an input."""

    x: Tensor
    q: QuantizedTensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What has a gradient."""
        leaves = (self.x, self.bias, self.lora_a, self.lora_b)
        return tuple(leaf for leaf in leaves if leaf is not None)

    def __call__(self, dropout: float = 0.0) -> Tensor:
        return qlora_linear(self.x, self.q, self.bias, self.lora_a, self.lora_b, SCALING, dropout)

    def plain(self, rng: Tensor | None = None, dropout: float = 0.0) -> Tensor:
        """The same in plain PyTorch on the dequantized weight, in the dtype of x."""
        kept = self.x
        if rng is not None:
            rows = self.x.shape[:-1].numel()
            keep = reference.dropout_mask(rng, rows, self.x.shape[-1], dropout)
            kept = self.x * keep.view_as(self.x) / (1 - dropout)
        # The weight as the layer sees it: rounded to the compute dtype, which for the oracle is not fp64.
        weight = dequantize_4bit(self.q).to(self.x.dtype)
        y = F.linear(self.x, weight, self.bias)
        return y + SCALING * F.linear(F.linear(kept, self.lora_a), self.lora_b)

    def to(self, dtype: torch.dtype) -> Layer:
        """The same values as new leaves; the quantized weight still says what it was rounded to."""
        x, bias, lora_a, lora_b = (
            None if t is None else t.detach().to(dtype).requires_grad_()
            for t in (self.x, self.bias, self.lora_a, self.lora_b)
        )
        return Layer(x, self.q, bias, lora_a, lora_b)


def layer(
    *leading: int,
    n: int = 7,
    k: int = 12,
    rank: int = 3,
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **quantization: Any,
) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    weight_dtype = torch.float32 if dtype == torch.float64 else dtype
    q = quantize_4bit(random(n, k).to(weight_dtype), **{"blocksize": 32} | quantization)
    x, b = random(*leading, k), random(n) if bias else None
    made = Layer(x, q, b, random(rank, k) / k**0.5, random(n, rank))
    return made.to(dtype)


def gradients(y: Tensor, leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """For a gradient of y that is the same on every call."""
    grad_y = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return torch.autograd.grad(y, leaves, grad_y)


def assert_layer_follows_the_oracle(
    made: Layer, y: Tensor, rng: Tensor | None = None, dropout: float = 0.0
) -> None:
    plain, oracle = made.to(made.x.dtype), made.to(torch.float64)
    y_plain, y_oracle = plain.plain(rng, dropout), oracle.plain(rng, dropout)
    assert_close_to_oracle(y, y_plain, y_oracle, FORWARD_FACTOR)
    for actual, usual, exact in zip(
        gradients(y, made.leaves),
        gradients(y_plain, plain.leaves),
        gradients(y_oracle, oracle.leaves),
        strict=True,
    ):
        assert_close_to_oracle(actual, usual, exact, GRADIENT_FACTOR)


# --- Values and gradients ---------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(bias: bool, rank: int, leading: tuple[int, ...], dropout: float) -> None:
    made = layer(*leading, n=5, k=9, rank=rank, bias=bias, dtype=torch.float64)

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        torch.manual_seed(3)
        b, (a_matrix, b_matrix) = (rest[0] if bias else None), rest[-2:]
        return qlora_linear(x, made.q, b, a_matrix, b_matrix, SCALING, dropout)

    assert torch.autograd.gradcheck(function, made.leaves)


@settings(max_examples=40)
@given(
    dtype=qst.dtypes,
    format=qst.formats,
    blocksize=qst.small_blocksizes,
    double_quant=st.booleans(),
    bias=st.booleans(),
    rank=st.integers(1, 17),
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    seed=qst.seeds,
)
def test_values_and_gradients_follow_the_oracle(
    dtype: torch.dtype,
    format: str,
    blocksize: int,
    double_quant: bool,
    bias: bool,
    rank: int,
    m: int,
    n: int,
    k: int,
    seed: int,
) -> None:
    quantization = {"format": format, "blocksize": blocksize, "double_quant": double_quant}
    made = layer(m, n=n, k=k, rank=rank, bias=bias, dtype=dtype, seed=seed, **quantization)
    assert_layer_follows_the_oracle(made, made())


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("shape", [(64, 256, 512, 16), (33, 129, 257, 64), (5, 96, 1000, 256)])
def test_larger_shapes_follow_the_oracle(
    dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    m, n, k, rank = shape
    made = layer(m, n=n, k=k, rank=rank, dtype=dtype, blocksize=64)
    assert_layer_follows_the_oracle(made, made())


def test_without_an_adapter_it_is_the_base() -> None:
    made = layer(4)
    y = qlora_linear(made.x, made.q, made.bias)
    expected = F.linear(made.x, dequantize_4bit(made.q), made.bias)
    assert torch.equal(y, expected)
    grads = zip(
        gradients(y, (made.x, made.bias)), gradients(expected, (made.x, made.bias)), strict=True
    )
    assert all(torch.equal(actual, plain) for actual, plain in grads)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)])
def test_leading_dimensions(leading: tuple[int, ...]) -> None:
    made, plain = layer(*leading), layer(*leading)
    y, expected = made(), plain.plain()
    assert y.shape == (*leading, 7)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(gradients(y, made.leaves), gradients(expected, plain.leaves))


def transposed(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


def strided(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def shifted(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def expanded(x: Tensor) -> Tensor:
    return x[:, :1].expand_as(x)


@pytest.mark.parametrize("lay_out", [transposed, strided, shifted, expanded])
def test_memory_layout_of_x_and_of_its_gradient(lay_out: Callable[[Tensor], Tensor]) -> None:
    made, plain = layer(6, 4), layer(6, 4)
    made.x = lay_out(made.x.detach()).requires_grad_()
    plain.x = made.x.detach().contiguous().requires_grad_()
    y, expected = made(), plain.plain()
    torch.testing.assert_close(y, expected)
    grad_y = lay_out(torch.randn(y.shape))
    torch.testing.assert_close(
        torch.autograd.grad(y, made.leaves, grad_y),
        torch.autograd.grad(expected, plain.leaves, grad_y),
    )


def test_nothing_of_the_caller_is_changed() -> None:
    made = layer(6)
    parts = (made.q.packed, made.q.absmax, made.q.nested_absmax, made.q.nested_offset)
    grad_y = torch.randn(6, 7)
    given_tensors = [*made.leaves, *parts, grad_y]
    before = [tensor.clone() for tensor in given_tensors]
    made(dropout=0.5).backward(grad_y)
    assert all(torch.equal(old, new) for old, new in zip(before, given_tensors, strict=True))


def test_only_what_needs_a_gradient_gets_one() -> None:
    for wanted in range(4):
        made, plain = layer(6), layer(6)
        for i, leaf in enumerate(made.leaves):
            leaf.requires_grad_(i == wanted)
        y = made()
        y.backward(torch.ones_like(y))
        plain().sum().backward()
        for i, (leaf, full) in enumerate(zip(made.leaves, plain.leaves, strict=True)):
            assert (leaf.grad is not None) == (i == wanted)
            if i == wanted:
                torch.testing.assert_close(leaf.grad, full.grad)


def test_a_second_derivative_is_refused() -> None:
    """It is not implemented: better an error than the derivative of a part."""
    made = layer(4)
    (grad_x,) = torch.autograd.grad(made().square().sum(), made.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_x.square().sum().backward()


# --- Dropout ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.9])
def test_dropout_is_the_mask_of_the_reference_in_both_passes(
    dtype: torch.dtype, dropout: float
) -> None:
    made = layer(32, n=24, k=64, rank=4, dtype=dtype)
    rng = torch.tensor([123, 2**31 + 5])
    q = made.q
    scales = (q.absmax, q.nested_absmax, q.nested_offset)
    drawn = (rng, SCALING, dropout, q.format, q.blocksize, q.scale_format)
    adapter = (made.lora_a, made.lora_b)
    y = QLoRALinearFunction.apply(made.x, q.packed, *scales, made.bias, *adapter, *drawn)
    assert_layer_follows_the_oracle(made, y, rng, dropout)


def adapter_mask(dropout: float, m: int = 100, k: int = 200) -> Tensor:
    """What dropout makes of a matrix of ones: the layer reduced to its adapter's input."""
    zero = quantize_4bit(torch.zeros(k, k))
    eye = torch.eye(k)
    return qlora_linear(torch.ones(m, k), zero, None, eye, eye, 1.0, dropout)


@pytest.mark.parametrize("dropout", [0.05, 0.3, 0.75])
def test_dropout_drops_its_share_and_keeps_the_mean(dropout: float) -> None:
    torch.manual_seed(0)
    kept = adapter_mask(dropout)
    deviation = (dropout * (1 - dropout) / kept.numel()) ** 0.5
    assert (kept == 0).double().mean() == pytest.approx(dropout, abs=4 * deviation)
    assert kept.double().mean() == pytest.approx(1, abs=4 * deviation / (1 - dropout))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - dropout)).item()}


def test_dropout_is_drawn_anew_by_torchs_generator() -> None:
    torch.manual_seed(0)
    first, second = adapter_mask(0.5), adapter_mask(0.5)
    torch.manual_seed(0)
    again = adapter_mask(0.5)
    torch.manual_seed(1)
    other = adapter_mask(0.5)
    assert torch.equal(first, again)
    for different in (second, other):
        assert ((different == 0) == (first == 0)).double().mean() == pytest.approx(0.5, abs=0.02)


def test_without_dropout_the_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    layer(4)()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_leaves_the_base_alone() -> None:
    made = layer(8)
    made.lora_b = torch.zeros_like(made.lora_b)
    assert torch.equal(made(dropout=0.9), made())


# --- What is held between the passes ----------------------------------------------------------------


def saved(function: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd holds for backward, each storage once."""
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    y.sum().backward()
    return list(held.values())


def bytes_of(*tensors: Tensor | None) -> int:
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def test_no_tensor_is_held_behind_the_back_of_the_hooks() -> None:
    """As an attribute of the node, where neither offload nor checkpointing would find it."""
    waiting, nodes = [layer(10)(0.5).grad_fn], []
    while waiting:
        node = waiting.pop()
        nodes += [node] if isinstance(node, QLoRALinearFunction._backward_cls) else []
        waiting += [parent for parent, _ in node.next_functions if parent is not None]
    (node,) = nodes
    assert not any(isinstance(value, Tensor) for value in tree_leaves(vars(node)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_only_packed_weights_and_the_adapters_needs_are_saved(
    dtype: torch.dtype, dropout: float
) -> None:
    made = layer(10, n=40, k=96, rank=2, dtype=dtype)
    held = saved(lambda: made(dropout))
    rng_bytes = 16 if dropout else 0
    h_bytes = 10 * 2 * dtype.itemsize
    adapter = (made.x, made.lora_a, made.lora_b)
    assert sum(t.nbytes for t in held) == (made.q.nbytes + bytes_of(*adapter) + h_bytes + rng_bytes)
    assert not any(t.is_floating_point() and t.numel() >= 40 * 96 for t in held)


def test_a_frozen_factor_saves_what_it_would_need() -> None:
    """LoRA-FA trains B alone: then x, by far the largest, is not held. With A alone, h is not."""
    made = layer(100, n=40, k=96, rank=2)
    frozen = (made.q.nbytes, bytes_of(made.lora_a, made.lora_b))
    made.lora_a.requires_grad_(False)
    assert sum(t.nbytes for t in saved(made)) == sum(frozen) + 100 * 2 * 4
    assert made.lora_a.grad is None
    made.lora_a.requires_grad_()
    made.lora_b.requires_grad_(False)
    assert sum(t.nbytes for t in saved(made)) == sum(frozen) + made.x.nbytes
    made.lora_a.requires_grad_(False)
    assert sum(t.nbytes for t in saved(made)) == sum(frozen)


def test_nothing_is_saved_without_a_gradient() -> None:
    made = layer(10)
    held = []
    with torch.no_grad(), saved_tensors_hooks(held.append, lambda tensor: tensor):
        assert not made().requires_grad
    assert not held


def two_layers(x: Tensor, first: Layer, second: Layer, dropout: float) -> Tensor:
    for made in (first, second):
        arguments = (made.q, made.bias, made.lora_a, made.lora_b, SCALING, dropout)
        x = qlora_linear(x, *arguments).tanh()
    return x


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant", "offloaded"])
def test_recomputed_and_offloaded_gradients_are_the_same(how: str, dropout: float) -> None:
    first, second = layer(6, n=12), layer(6, n=12, seed=1)
    leaves = (first.x, *first.leaves[1:], *second.leaves[1:])
    function = partial(two_layers, first=first, second=second, dropout=dropout)
    results = []
    for recompute in (False, True):
        torch.manual_seed(5)
        if not recompute:
            y = function(first.x)
        elif how == "offloaded":
            with save_on_cpu():
                y = function(first.x)
        else:
            y = checkpoint(function, first.x, use_reentrant=how == "reentrant")
        for leaf in leaves:
            leaf.grad = None
        (y * torch.arange(12)).sum().backward()
        results.append((y, *(leaf.grad for leaf in leaves)))
    assert all(torch.equal(plain, other) for plain, other in zip(*results, strict=True))


# --- Dtypes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """As `nn.Linear` does: computed in 16 bits, gradients in the parameters' dtype."""
    made, plain = layer(16, n=24, k=64), layer(16, n=24, k=64)
    with torch.autocast("cpu", dtype=dtype):
        y, y_plain = made(), plain.plain()
    assert y.dtype == dtype
    grads = gradients(y, made.leaves)
    assert {grad.dtype for grad in grads} == {torch.float32}
    rounded = layer(16, n=24, k=64).to(dtype)
    oracle = rounded.to(torch.float64)
    oracle.q = replace(oracle.q, dtype=dtype)  # its weight is rounded to 16 bits as well
    exact = oracle.plain()
    assert_close_to_oracle(y, y_plain, exact, FORWARD_FACTOR)
    for actual, usual, wanted in zip(
        grads, gradients(y_plain, plain.leaves), gradients(exact, oracle.leaves), strict=True
    ):
        assert_close_to_oracle(actual.to(dtype), usual.to(dtype), wanted, GRADIENT_FACTOR)


def test_fp32_factors_follow_a_16_bit_input() -> None:
    made = layer(6)
    made.x = made.x.detach().to(torch.bfloat16).requires_grad_()
    y = made()
    assert y.dtype == torch.bfloat16
    grads = gradients(y, made.leaves)
    assert [grad.dtype for grad in grads] == [torch.bfloat16, *[torch.float32] * 3]


def test_meta_device() -> None:
    made = layer(2, 6)
    parts = [leaf.detach().to("meta") for leaf in made.leaves]
    y = qlora_linear(parts[0], made.q.to("meta"), *parts[1:], SCALING, 0.5)
    assert y.is_meta
    assert y.shape == (2, 6, 7)


# --- Bad arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": torch.ones(3, 13)}, ValueError, r"x must have shape \[..., 12\]; got \(3, 13\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"x must have shape \[..., 12\]; got \(\)"),
        ({"x": torch.ones(3, 12, dtype=torch.int32)}, TypeError, "x must .* got torch.int32"),
        ({"x": torch.ones(3, 12, device="meta")}, ValueError, "x must .* device cpu; got meta"),
        (
            {"q": quantize_4bit(torch.ones(84))},
            ValueError,
            r"q must be a matrix .* got shape \(84,\)",
        ),
        ({"bias": torch.ones(8)}, ValueError, r"bias must have shape \(7,\); got \(8,\)"),
        ({"bias": torch.ones(7, device="meta")}, ValueError, "bias must .* cpu; got meta"),
        ({"lora_a": None}, ValueError, "lora_a and lora_b must be given together"),
        ({"lora_b": None}, ValueError, "lora_a and lora_b must be given together"),
        ({"lora_a": torch.ones(3, 11)}, ValueError, r"lora_a .* \(rank, 12\); got \(3, 11\)"),
        ({"lora_a": torch.ones(12)}, ValueError, r"lora_a .* \(rank, 12\); got \(12,\)"),
        ({"lora_b": torch.ones(8, 3)}, ValueError, r"lora_b .* \(7, 3\); got \(8, 3\)"),
        ({"lora_b": torch.ones(7, 2)}, ValueError, r"lora_b .* \(7, 3\); got \(7, 2\)"),
        ({"lora_b": torch.ones(7, 3, device="meta")}, ValueError, "lora_b .* cpu; got meta"),
        ({"dropout": 1.0}, ValueError, "dropout must be at least 0 and below 1; got 1.0"),
        ({"dropout": -0.5}, ValueError, "dropout must be at least 0 and below 1; got -0.5"),
    ],
)
def test_refuses(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    made = layer(3)
    good = {"x": made.x, "q": made.q, "bias": made.bias}
    good |= {"lora_a": made.lora_a, "lora_b": made.lora_b, "scaling": 1.0, "dropout": 0.0}
    qlora_linear(**good)
    with pytest.raises(error, match=message):
        qlora_linear(**good | changed)


def test_autocast_leaves_fp64_alone() -> None:
    """As `torch.nn.functional.linear` does under it."""
    q = quantize_4bit(torch.randn(8, 64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert qlora_linear(torch.randn(2, 64, dtype=torch.float64), q).dtype == torch.float64
