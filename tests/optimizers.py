"""Optimizers to be run and compared: parameters, gradients that follow from the step, contents bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora import buckets, paged
from qlora.kernels import ops
from tests.on_device import compiled_only

SHAPES = ((3, 5), (1000, 3), (), (0,), (1024,), (2, 3, 4, 5), (257,), (2100,))

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, compiled_only])]


def parameters(
    shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_gradients(params: list[Any], step: int, missing: float = 0.0, seed: int = 0) -> None:
    """The same for the same step, wherever the parameters are; some are None."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for p in params:
        scale = 10 ** (2 * torch.rand((), generator=generator).item() - 1)
        grad = scale * torch.randn(p.shape, generator=generator)
        absent = torch.rand((), generator=generator).item() < missing
        p.grad = None if absent else grad.to(p.device, p.dtype)


def run(
    optimizer: torch.optim.Optimizer, steps: range, missing: float = 0.0, seed: int = 0
) -> torch.optim.Optimizer:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        torch.manual_seed(step)
        set_gradients(params, step, missing, seed)
        optimizer.step()
    return optimizer


def contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states, in order, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    named = [tensor for state in states for _, tensor in sorted(state.items())]
    return [tensor.detach().cpu().clone() for tensor in (*params, *named)]


def assert_same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Bit for bit, parameters and states."""
    pairs = list(zip(contents(left), contents(right), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@contextmanager
def small_buckets(size: int) -> Iterator[list[int]]:
    """Buckets of at most `size` bytes; yields how many parameters each kernel call gets."""
    calls: list[int] = []

    def adamw(params: list[Tensor], *arguments: Any) -> None:
        calls.append(len(params))
        ops.adamw(params, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "BUCKET_BYTES", size)
        patch.setattr(paged, "ops", SimpleNamespace(adamw=adamw))
        yield calls
