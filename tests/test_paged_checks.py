"""What PagedAdamW refuses, in words that name it, and before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qlora.paged import PagedAdamW
from tests.optimizers import contents, parameters, run


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be at least 0 and finite; got -1\.0"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0 and finite; got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be one number; got a tensor of shape \(2,\)"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got 'fast'"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be at least 0 and below 1; got 1\.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers"),
        ({"amsgrad": True}, ValueError, "amsgrad must be False"),
        ({"bits": 4}, ValueError, "bits must be 32 or 8; got 4"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PagedAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"maximize": True}, ValueError, "maximize must be False"),
        ({"differentiable": True}, ValueError, "differentiable must be False"),
        (
            {"params": torch.zeros(2, dtype=torch.float64)},
            TypeError,
            r"params\[0\] .* torch\.float64",
        ),
        ({"params": torch.zeros(2, dtype=torch.complex64)}, TypeError, r"got torch\.complex64"),
        ({"params": torch.zeros(2, device="meta")}, ValueError, "on the CPU or a GPU; got meta"),
        ({"params": torch.zeros(2).to_sparse()}, TypeError, r"must be dense; got .*sparse"),
        (
            {"params": torch.zeros(2, dtype=torch.float16)},
            TypeError,
            "stochastic_rounding is for bf",
        ),
    ],
)
def test_a_group_that_is_refused_is_not_added(
    group: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = PagedAdamW(parameters(), stochastic_rounding=True)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": torch.zeros(2)} | group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_named_twice_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="params must not name a parameter twice"):
        PagedAdamW([p, p])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table = torch.nn.Embedding(4, 3, sparse=True)
    other = torch.nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = PagedAdamW([other, table.weight])
    with pytest.raises(TypeError, match="the gradient of parameter 1 must be dense; got layout"):
        optimizer.step()
    assert not other.any()
    assert not optimizer.state


@pytest.mark.parametrize(
    ("shape", "dtype", "device"),
    [
        ((12,), torch.float32, "cpu"),  # of as many tiles
        ((3, 4), torch.bfloat16, "cpu"),
        pytest.param((3, 4), torch.float32, "cuda:0", marks=pytest.mark.gpu),
    ],
)
def test_a_parameter_that_became_another_is_refused(
    shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    optimizer = run(PagedAdamW(parameters([(2,), (3, 4)])), range(1))
    first, second = optimizer.param_groups[0]["params"]
    second.grad = None
    second.data = torch.zeros(shape, dtype=dtype, device=device)
    kept = contents(optimizer)[0]
    then, now = f"{(3, 4)}, {torch.float32}, cpu", f"{shape}, {dtype}, {device}"
    with pytest.raises(ValueError, match=r"^parameter 1 must keep the shape, dtype and") as refused:
        optimizer.step()
    assert str(refused.value).endswith(f"when its state was made, {then}; got {now}")
    assert torch.equal(first, kept)
