"""The adapter's kernels keep to the tolerance rule, in every dtype, layout and split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import lora, reference, tuning
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle
from tests import strategies as qst
from tests.on_device import DEVICES, launch

pytestmark = pytest.mark.parametrize("device", DEVICES)

RNG = torch.tensor([2**33 + 7, 5])


def _normal(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rows + columns + seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


def _check_project(device: str, x: Tensor, weight: Tensor, dropout: float = 0.0) -> None:
    rest = (RNG if dropout else None, dropout)
    actual = launch(device, lora.lora_project, x, weight, *rest)
    oracle = reference.lora_project(x.double(), weight.double(), *rest)
    plain = reference.lora_project(x, weight, *rest)
    assert_close_to_oracle(actual, plain, oracle, FORWARD_FACTOR)


def _check_grad(device: str, left: Tensor, right: Tensor, dropout: float = 0.0) -> None:
    rest = (RNG if dropout else None, 0.7, dropout)
    actual = launch(device, lora.lora_grad, left, right, *rest)
    oracle = reference.lora_grad(left.double(), right.double(), *rest)
    plain = reference.lora_grad(left, right, *rest)
    assert_close_to_oracle(actual, plain, oracle, GRADIENT_FACTOR)


@settings(max_examples=20)
@given(
    st.integers(1, 70),
    st.integers(1, 140),
    st.integers(1, 40),
    qst.dtypes,
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_any_shape(device: str, m: int, k: int, r: int, dtype: torch.dtype, dropout: float) -> None:
    x, weight = _normal(m, k, dtype), _normal(r, k, dtype)
    _check_project(device, x, weight, dropout)
    _check_grad(device, _normal(m, r, dtype, 1), x, dropout)


@pytest.mark.parametrize("dtype", qst.DTYPES)
@pytest.mark.parametrize("r", [1, 16, 17, 256])
def test_ranks(device: str, r: int, dtype: torch.dtype) -> None:
    x, weight, g = _normal(20, 80, dtype), _normal(r, 80, dtype), _normal(20, r, dtype)
    _check_project(device, x, weight, 0.3)
    _check_grad(device, g, x, 0.3)  # the gradient of A
    _check_grad(device, x, g)  # the gradient of B, whose wide operand is the left one


def test_ranks_beyond_one_tile(device: str) -> None:
    _check_project(device, _normal(3, 40, torch.float32), _normal(300, 40, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_split_reductions(device: str, dtype: torch.dtype) -> None:
    """Several partial sums, the last over fewer elements."""
    length = 2 * tuning.SMALLEST_REDUCTION + 9
    _check_project(device, _normal(3, length, dtype), _normal(5, length, dtype), 0.2)
    _check_grad(device, _normal(length, 5, dtype), _normal(length, 40, dtype), 0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_operands(device: str, dtype: torch.dtype) -> None:
    """Transposed and gapped views: g = grad_y B is a projection with the transposed B."""
    _check_project(device, _normal(50, 20, dtype).T, _normal(50, 6, dtype).T, 0.3)
    _check_project(device, _normal(20, 100, dtype)[:, ::2], _normal(6, 50, dtype))
    _check_grad(device, _normal(6, 20, dtype).T, _normal(20, 90, dtype)[:, 1::2], 0.3)


def test_empty_operands(device: str) -> None:
    """No token, or an adapter of rank 0."""
    x = torch.ones(0, 40)
    assert launch(device, lora.lora_project, x, torch.ones(3, 40), None, 0.0).shape == (0, 3)
    grad = launch(device, lora.lora_grad, torch.ones(0, 3), x, None, 1.0, 0.0)
    assert torch.equal(grad, torch.zeros(3, 40))
    x = torch.ones(5, 40)
    assert launch(device, lora.lora_project, x, torch.ones(0, 40), None, 0.0).shape == (5, 0)
    assert launch(device, lora.lora_grad, torch.ones(5, 0), x, None, 1.0, 0.0).shape == (0, 40)


def test_float64_is_left_to_torch(device: str) -> None:
    x, weight = _normal(6, 30, torch.float64), _normal(4, 30, torch.float64)
    actual = launch(device, lora.lora_project, x, weight, RNG, 0.5)
    torch.testing.assert_close(actual, reference.lora_project(x, weight, RNG, 0.5))
    actual = launch(device, lora.lora_grad, weight.T, weight.T, RNG, 0.7, 0.5)
    torch.testing.assert_close(actual, reference.lora_grad(weight.T, weight.T, RNG, 0.7, 0.5))


def test_a_kept_mask_of_zero_dropout_changes_nothing(device: str) -> None:
    x, weight = _normal(6, 30, torch.float32), _normal(4, 30, torch.float32)
    with_rng = launch(device, lora.lora_project, x, weight, RNG, 0.0)
    assert torch.equal(with_rng, launch(device, lora.lora_project, x, weight, None, 0.0))
