"""Steps of the optimizer to be taken by one implementation and by another: arguments, copies and comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import formats
from qlora.kernels.reference_adamw import adamw_scalars
from tests import strategies as qst

HYPERPARAMETERS = (2e-3, 0.9, 0.999, 1e-8, 0.01)
"""lr, beta1, beta2, eps and weight decay, the arguments of `adamw_scalars` before the step."""


@dataclass
class Step:
    """The arguments of `adamw`, by name."""

    params: list[Tensor]
    grads: list[Tensor | None]
    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None
    exp_avg_sq_absmax: Tensor | None
    scalars: Tensor
    rng: Tensor | None

    def arguments(self) -> list:
        return [getattr(self, field.name) for field in fields(self)]

    def updated(self) -> list[Tensor]:
        """What a step writes."""
        states = (self.exp_avg, self.exp_avg_sq, self.exp_avg_absmax, self.exp_avg_sq_absmax)
        return [*self.params, *(state for state in states if state is not None)]

    def on(self, device: str) -> Step:
        """A copy on a device, but for what belongs on the CPU; strides and gaps are kept."""

        def copy(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            base = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).clone()
            strided = (value.shape, value.stride(), value.storage_offset())
            return base.to(device).as_strided(*strided)

        params, grads, *states, scalars, rng = self.arguments()
        lists = ([copy(p) for p in params], [copy(g) for g in grads])
        return Step(*lists, *map(copy, states), scalars, rng)


def new_state(tiles: int, bits: int) -> list[Tensor | None]:
    """Fresh state of so many tiles: exp_avg, exp_avg_sq and their absmax."""
    elements = tiles * formats.STATE_TILE
    if bits == 32:
        return [torch.zeros(elements), torch.zeros(elements), None, None]
    codes = [
        torch.full((elements,), formats.state_zero_code(signed), dtype=torch.uint8)
        for signed in (True, False)
    ]
    return [*codes, *(torch.zeros(elements // formats.STATE_BLOCKSIZE) for _ in range(2))]


def step_of(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    bits: int = 32,
    rng: Tensor | None = None,
    step: int = 1,
) -> Step:
    """A step from fresh state."""
    tiles = sum(formats.state_tiles(p.numel()) for p in params)
    scalars = torch.tensor([adamw_scalars(*HYPERPARAMETERS, step)] * len(params)).view(-1, 7)
    return Step(list(params), list(grads), *new_state(tiles, bits), scalars, rng)


def assert_same_step(actual: Step, expected: Step) -> None:
    """Bit for bit, also where neither may write; a NaN equals a NaN, -0 equals +0."""
    for one, other in zip(actual.updated(), expected.updated(), strict=True):
        # Of the whole storage: what lies between the elements of a parameter is to be left alone too.
        flat = [
            torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage()).cpu()
            for t in (one, other)
        ]
        torch.testing.assert_close(*flat, rtol=0, atol=0, equal_nan=True)


# --- Hypothesis -------------------------------------------------------------------------------------

_SIZES = (0, 1, 2, 15, 16, 255, 256, 257, 1023, 1024, 1025, 2064, 3000)
_MAGNITUDES = (0.0, 1e-42, 1e-22, 1e-6, 1.0, 1e4, 1e19, 1e30, 3e38)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """Up to five parameters of awkward sizes, gradients of any finite magnitude, and state in any condition.

    Parameters lie in one buffer with gaps of NaN, or none of them aligned; what is left of their states' last
    tiles is NaN, or any code.
    """
    dtype, bits = draw(qst.dtypes), draw(st.sampled_from([32, 8]))
    generator = torch.Generator().manual_seed(draw(qst.seeds))
    sizes = draw(st.lists(st.sampled_from(_SIZES), max_size=5))
    gap = draw(st.sampled_from([16, 3]))
    params = _with_gaps(sizes, gap, dtype, generator)
    grads = [_gradient(draw, size, dtype, generator) for size in sizes]
    stochastic = dtype != torch.float16 and draw(st.booleans())
    rng = torch.tensor([draw(qst.seeds), draw(qst.seeds)]) if stochastic else None
    step = step_of(params, grads, bits, rng)
    rows = [
        adamw_scalars(
            draw(st.sampled_from([0.0, 1e-6, 2e-4, 1e-2, 1.0])),
            draw(st.sampled_from([0.0, 0.9, 0.95])),
            draw(st.sampled_from([0.0, 0.95, 0.999])),
            draw(st.sampled_from([1e-8, 1e-6, 1e-15])),
            draw(st.sampled_from([0.0, 0.01, 0.5])),
            draw(st.sampled_from([1, 2, 1000, 10**6])),
        )
        for _ in sizes
    ]
    step.scalars = torch.tensor(rows).view(-1, 7)
    _fill_states(step, sizes, draw(st.sampled_from(_MAGNITUDES[:6])), generator)
    return step


def _with_gaps(
    sizes: Sequence[int], gap: int, dtype: torch.dtype, generator: torch.Generator
) -> list[Tensor]:
    params, start = [], gap
    buffer = torch.full((gap + sum(size + gap + 16 for size in sizes),), torch.nan, dtype=dtype)
    for size in sizes:
        param = buffer[start : start + size]
        params.append(param.copy_(torch.randn(size, generator=generator)))
        start += -(-size // gap) * gap + gap
    return params


def _gradient(
    draw: st.DrawFn, size: int, dtype: torch.dtype, generator: torch.Generator
) -> Tensor | None:
    """Of one magnitude, of as many as there are, or none at all."""
    kind = draw(st.sampled_from(["none", "mixed", *_MAGNITUDES]))
    if kind == "none":
        return None
    scale = torch.tensor(_MAGNITUDES if kind == "mixed" else [kind], dtype=torch.float64)
    chosen = torch.randint(len(scale), (size,), generator=generator)
    values = torch.randn(size, generator=generator, dtype=torch.float64) * scale[chosen]
    largest = torch.finfo(dtype).max
    return values.clamp(-largest, largest).to(dtype)


def _fill_states(
    step: Step, sizes: Sequence[int], scale: float, generator: torch.Generator
) -> None:
    """As after some steps; one block of codes in four has an absmax of zero, as after none."""
    states = {"exp_avg": step.exp_avg, "exp_avg_sq": step.exp_avg_sq}
    for state in states.values():
        if state.dtype == torch.uint8:
            state.random_(256, generator=generator)
            continue
        state.fill_(torch.nan)
        start = 0
        for size in sizes:
            part = state[start : start + size]
            part.copy_(torch.randn(size, generator=generator) * scale)
            start += formats.state_tiles(size) * formats.STATE_TILE
    if step.exp_avg_sq.dtype != torch.uint8:
        step.exp_avg_sq.square_()
        return
    for absmax in (step.exp_avg_absmax, step.exp_avg_sq_absmax):
        absmax.copy_(torch.rand(absmax.shape, generator=generator) * scale)
        absmax[torch.rand(absmax.shape, generator=generator) < 0.25] = 0
