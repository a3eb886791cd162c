"""Steps of the paged optimizer beside regular ones, on random parameters and gradients."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector
from torch.optim import AdamW, Optimizer

from qlora import PagedAdamW
from qlora.recipe import TrainConfig
from qlora.testing import relative_rmse

SEED = 0
_RECIPE = TrainConfig()
ADAM = {
    "lr": _RECIPE.learning_rate,
    "betas": (_RECIPE.beta1, _RECIPE.beta2),
    "eps": _RECIPE.epsilon,
    "weight_decay": _RECIPE.weight_decay,
}
"""Guanaco's."""
_REGULAR = partial(PagedAdamW, paged=False)


def compare(sizes: list[torch.Size], steps: int, device: torch.device) -> dict[str, Any]:
    """AdamW with paged states, with regular ones, torch's, and torch's in fp64, on the same gradients.

    They run one after the other: parameters, gradients and states of one are on the device at a time.

    Returns:
        identical: whether paged and regular states gave the same parameters, to the bit.
        errors: of "ours" and "torch", the relative RMSE of what the steps changed, against fp64.
    """
    start = parameters_to_vector(_parameters(sizes, device)).detach().cpu()
    paged, regular, torchs = (
        _trained(make, sizes, steps, device) for make in (PagedAdamW, _REGULAR, AdamW)
    )
    change = _trained(AdamW, sizes, steps, device, torch.float64) - start
    return {
        "identical": torch.equal(paged, regular),
        "errors": {
            name: relative_rmse(found.double() - start, change)
            for name, found in {"ours": paged, "torch": torchs}.items()
        },
    }


def _trained(
    make: Callable[..., Optimizer],
    sizes: list[torch.Size],
    steps: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """All parameters after the steps, as a vector on the CPU."""
    parameters = _parameters(sizes, device, dtype)
    optimizer = make(parameters, **ADAM)
    for step in range(steps):
        _take_gradients(parameters, step)
        optimizer.step()
        if isinstance(optimizer, PagedAdamW):
            optimizer.evict()
    return parameters_to_vector(parameters).detach().cpu()


def _parameters(
    sizes: list[torch.Size], device: torch.device, dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    return [nn.Parameter(drawn.to(dtype)) for drawn in _normal(sizes, SEED, device)]


def _take_gradients(parameters: list[nn.Parameter], step: int) -> None:
    sizes, device = [parameter.shape for parameter in parameters], parameters[0].device
    for parameter, drawn in zip(parameters, _normal(sizes, SEED + 1 + step, device), strict=True):
        parameter.grad = drawn.to(parameter.dtype)


def _normal(sizes: list[torch.Size], seed: int, device: torch.device) -> Iterator[Tensor]:
    """Random tensors in fp32."""
    generator = torch.Generator(device).manual_seed(seed)
    for size in sizes:
        yield 0.02 * torch.randn(size, generator=generator, device=device)


def on_gpu(sizes: list[torch.Size], rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds of steps with paged and with regular states, in turns, and whether evicted states make room."""
    optimizers: dict[str, PagedAdamW] = {}
    for name, make in (("paged", PagedAdamW), ("regular", _REGULAR)):
        parameters = _parameters(sizes, device)
        _take_gradients(parameters, step=0)
        optimizers[name] = make(parameters, **ADAM)
        optimizers[name].step()  # makes the states
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            optimizer.step()
            torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return {"seconds": seconds, "makes_room": _makes_room(optimizers["paged"])}


def _makes_room(optimizer: PagedAdamW) -> bool:
    """Whether torch gets half of the evicted states' bytes beyond what the driver counts as free.

    Half, as the driver never hands out the last of it; and it counts emptied pages as taken until somebody
    allocates, so there is no free memory to be read.
    """
    optimizer.evict()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    wanted = torch.cuda.mem_get_info()[0] + optimizer.state_bytes // 2
    try:
        torch.empty(wanted, dtype=torch.uint8, device="cuda").fill_(1)
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True
