"""The tolerance rule itself: what it lets pass and what it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qlora.testing import assert_close_to_oracle, relative_rmse

FACTOR = 2.0


def refused(actual: Tensor, plain: Tensor, oracle: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close_to_oracle(actual, plain, oracle, FACTOR)


@pytest.fixture
def oracle() -> Tensor:
    return torch.randn(50, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_error_may_be_twice_that_of_plain_pytorch(dtype: torch.dtype, oracle: Tensor) -> None:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(50, 40, generator=generator, dtype=torch.float64)
    noise *= 8 * torch.finfo(dtype).eps
    plain = (oracle + noise).to(dtype)
    assert_close_to_oracle(plain, plain, oracle, FACTOR)
    assert_close_to_oracle((oracle + 1.8 * noise).to(dtype), plain, oracle, FACTOR)
    refused((oracle + 2.2 * noise).to(dtype), plain, oracle, "rms error .* exceeds 2.0 x plain")


def test_one_wrong_element_is_seen(oracle: Tensor) -> None:
    plain = (oracle + 1e-4).float()
    actual = plain.clone()
    actual[3, 4] += 4e-4
    refused(actual, plain, oracle, "maximum error")


def test_where_plain_pytorch_is_exact_a_rounding_is_allowed(oracle: Tensor) -> None:
    oracle = oracle.float().double()
    plain = oracle.float()
    assert_close_to_oracle(torch.nextafter(plain, plain + 1), plain, oracle, FACTOR)
    refused(plain * (1 + 8 * torch.finfo(torch.float32).eps), plain, oracle, "rms error")


def test_nan_is_never_close(oracle: Tensor) -> None:
    actual = oracle.float()
    actual[0, 0] = torch.nan
    refused(actual, oracle.float(), oracle, "error nan")


def test_dtype_and_shape_must_agree(oracle: Tensor) -> None:
    plain = oracle.float()
    refused(oracle.half(), plain, oracle, "expected torch.float32 .* got torch.float16")
    refused(plain[:1], plain, oracle, r"expected .*\(50, 40\), got .*\(1, 40\)")


def test_nothing_is_close_to_nothing() -> None:
    empty = torch.empty(0, 3)
    assert_close_to_oracle(empty, empty, empty.double(), FACTOR)


def test_relative_rmse() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_rmse(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert relative_rmse(expected.half(), expected) == 0
