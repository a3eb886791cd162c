"""A step of AdamW for the adapters of a whole model: hundreds of small tensors, with their gradients and state.

Timed as `optimizer.step()` is called, Python included: what it prepares for each step is part of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.clocks import Call
from benchmarks.decoder_cases import LLAMA3_8B
from benchmarks.harness import Case, Contender
from benchmarks.inputs import OURS
from benchmarks.kernel_cases import COPY
from benchmarks.step_cases import SMOLLM2
from qlora.paged import PagedAdamW

RANK = 64
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 0.1
UNPAGED, EIGHT_BITS = "not paged", "8 bits"
FUSED, FOREACH = "torch fused", "torch foreach"
MODELS = {
    "cpu": ("SmolLM2-135M", SMOLLM2),
    "cuda": ("Llama 3 8B", LLAMA3_8B | {"num_hidden_layers": 32}),
}
TARGETS = {UNPAGED: 0.95, FUSED: 1.0, COPY: 0.80}
"""On a GPU, the least ratio of a contender's time to ours, which is paged and in 32 bits."""

_QUICK_LAYERS = 1
_BYTES_MOVED = 28
"""Of an element in fp32: the gradient is read; the parameter and both moments are read and written."""


def optimizer_cases(device: torch.device, quick: bool) -> list[Case]:
    """One case; the adapters are in fp32 in every recipe. With `quick`, those of a single layer."""
    model, config = MODELS[device.type]
    layers = _QUICK_LAYERS if quick else int(config["num_hidden_layers"])
    shapes = [*adapter_shapes(config, RANK)] * layers
    moved = _BYTES_MOVED * sum(rows * columns for rows, columns in shapes)
    on_gpu = device.type == "cuda"
    cut = f" cut to {layers} layer{'s' * (layers > 1)}" if quick else ""
    case = Case(
        group="adamw",
        name=f"adapters of {model}{cut}, rank {RANK}, float32",
        parameters={"model": model, "layers": layers, "rank": RANK, "dtype": "float32"},
        inputs=partial(OptimizerInputs, device, shapes),
        contenders=(*_contenders(on_gpu), _copy_of(moved)),
        targets=TARGETS if on_gpu and not quick else {},
        device=device,
        bytes_moved=moved,
        gradients=False,
    )
    return [case]


def adapter_shapes(config: Mapping[str, float], rank: int) -> Iterator[tuple[int, int]]:
    """[r, k] and [n, r] of each linear layer in a decoder layer: attention, then the three of its MLP."""
    hidden, wide = int(config["hidden_size"]), int(config["intermediate_size"])
    narrow = hidden * int(config["num_key_value_heads"]) // int(config["num_attention_heads"])
    attention = [(hidden, hidden), (narrow, hidden), (narrow, hidden), (hidden, hidden)]
    for n, k in (*attention, (wide, hidden), (wide, hidden), (hidden, wide)):
        yield rank, k
        yield n, rank


class OptimizerInputs:
    """Parameters and gradients; each contender trains a copy."""

    def __init__(self, device: torch.device, shapes: list[tuple[int, int]], seed: int) -> None:
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        self.device = device
        self.params = [normal(shape) for shape in shapes]
        self.grads = [normal(shape).mul_(0.01) for shape in shapes]

    @cached_property
    def first_step(self) -> list[Tensor]:
        """The parameters after the first step, in fp64: m / (1 - beta1) is the gradient, v / (1 - beta2) its square."""
        pairs = zip(self.params, self.grads, strict=True)
        return [
            p.double() * (1 - LEARNING_RATE * WEIGHT_DECAY)
            - LEARNING_RATE * g.double() / (g.double().abs() + 1e-8)
            for p, g in pairs
        ]


def _contenders(on_gpu: bool) -> Iterator[Contender]:
    yield _contender(OURS, PagedAdamW)
    if on_gpu:  # without one nothing is paged
        yield _contender(UNPAGED, partial(PagedAdamW, paged=False))
    yield _contender(EIGHT_BITS, partial(PagedAdamW, bits=8))
    yield _contender(FUSED, partial(torch.optim.AdamW, fused=True))
    yield _contender(FOREACH, partial(torch.optim.AdamW, foreach=True))
    if on_gpu:
        for name in ("AdamW8bit", "PagedAdamW"):
            make = partial(_bitsandbytes, name)
            yield _contender(f"bitsandbytes {name}", make, peers.BITSANDBYTES)


def _contender(
    name: str, make: Callable[..., torch.optim.Optimizer], requires: tuple[str, ...] = ()
) -> Contender:
    def prepare(inputs: OptimizerInputs) -> Call:
        params = [nn.Parameter(p.clone()) for p in inputs.params]
        for param, grad in zip(params, inputs.grads, strict=True):
            param.grad = grad
        optimizer = make(params, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def call() -> list[Tensor]:
            optimizer.step()
            return params

        return call

    return Contender(name, prepare, _check, requires)


def _bitsandbytes(name: str, *args: object, **kwargs: object) -> torch.optim.Optimizer:
    with peers.quiet():
        from bitsandbytes import optim

        return getattr(optim, name)(*args, **kwargs)


def _check(inputs: OptimizerInputs, params: list[Tensor]) -> None:
    """The first step moves each element by the learning rate, nearly; it may miss by a thousandth of that.

    And by two roundings of the parameter. Whatever the bits of the state, it is quantized after the step.
    """
    for param, before, expected in zip(params, inputs.params, inputs.first_step, strict=True):
        allowed = 1e-3 * LEARNING_RATE + 2 * torch.finfo(torch.float32).eps * before.abs().double()
        error = (param.double() - expected).abs() - allowed
        if not (error <= 0).all():
            raise AssertionError(f"error {error.max():.3e} above what is allowed")


def _copy_of(moved: int) -> Contender:
    """A copy that reads and writes this many bytes together."""

    def prepare(inputs: OptimizerInputs) -> Call:
        source = torch.ones(moved // 2, dtype=torch.uint8, device=inputs.device)
        return partial(torch.empty_like(source).copy_, source)

    return Contender(COPY, prepare, None)
