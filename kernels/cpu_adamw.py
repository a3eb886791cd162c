"""The optimizer's step on a CPU: the reference's results, bit for bit, at a useful speed.

A large parameter is updated in slabs, in place. Small ones that follow each other are updated together, where
calls would take longer than elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.kernels import formats, reference, reference_adamw

_STEP_SLAB = 2**17
"""Elements of a parameter that are updated at a time, whole tiles of state: what lies between fits a cache."""

_RUN = _STEP_SLAB // formats.STATE_TILE
"""Small parameters that are updated together, at most."""

_States = Sequence[tuple[Tensor, Tensor | None, bool]]
"""Of both moments: what holds them, absmax, and whether they have a sign."""

_Places = tuple[Tensor, Tensor, Tensor]
"""Of each element the place in a state; the blocks that are in use; of each element the place in those. int64."""


def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    scalars: Tensor,
    rng: Tensor | None,
) -> None:
    """See `reference_adamw.adamw`."""
    states = ((exp_avg, exp_avg_absmax, True), (exp_avg_sq, exp_avg_sq_absmax, False))
    rows = scalars.tolist()

    def key(index: int) -> object:
        is_small = 0 < params[index].numel() <= formats.STATE_TILE
        if is_small and rng is None and grads[index] is not None:
            return rows[index], index // _RUN
        return index

    start = 0
    for _, group in groupby(range(len(params)), key):
        first, *others = group
        if others:
            run = slice(first, others[-1] + 1)
            _step_small(params[run], grads[run], states, start, rows[first])
        elif grads[first] is not None:
            _step_one(params[first], grads[first], states, start, rows[first], rng, first)
        sizes = (params[index].numel() for index in (first, *others))
        start += sum(map(formats.state_tiles, sizes)) * formats.STATE_TILE


def _step_one(
    param: Tensor,
    grad: Tensor,
    states: _States,
    start: int,
    row: list[float],
    rng: Tensor | None,
    index: int,
) -> None:
    """In slabs. The parameter's state begins at `start`, and it is number `index` for its random bits."""
    dense = param.contiguous()
    flat, flat_grad = dense.view(-1), grad.reshape(-1)
    for first in range(0, param.numel(), _STEP_SLAB):
        slab = slice(first, first + _STEP_SLAB)
        p, g = flat[slab], flat_grad[slab].float()
        moments = [_read_state(*state, start + first, p.numel()) for state in states]
        stepped = _step_(p.float(), g, *moments, row)
        p.copy_(reference_adamw.round_parameter(stepped, p.dtype, rng, index, first))
        for values, state in zip(moments, states, strict=True):
            _write_state(values, *state, start + first)
    if dense is not param:
        param.copy_(dense)


def _step_small(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: _States,
    start: int,
    row: list[float],
) -> None:
    """All at once, end to end: parameters of a tile at most, whose calls would take longer than their elements.

    Their states begin at `start`.
    """
    sizes = tuple(param.numel() for param in params)
    places = _places(sizes)
    p, g = (torch.cat([t.reshape(-1) for t in tensors]).float() for tensors in (params, grads))
    moments = [_gather_state(*state, start, places) for state in states]
    stepped = _step_(p, g, *moments, row).to(params[0].dtype)
    for values, state in zip(moments, states, strict=True):
        _scatter_state(values, *state, start, places)
    shaped = [x.view(t.shape) for x, t in zip(stepped.split(sizes), params, strict=True)]
    torch._foreach_copy_(params, shaped)


def _step_(p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: list[float]) -> Tensor:
    """`reference_adamw.step` with the same roundings; p, m and v in place. Returns p."""
    decay, weight1, beta2, weight2, step_size, root2, eps = scalars
    change = torch.sub(g, m).mul_(weight1)
    m.add_(change)
    v.mul_(beta2).add_(torch.mul(g, weight2, out=change).mul_(g))
    # numpy's root is correctly rounded, unlike torch's.
    root = torch.from_numpy(np.sqrt(v.numpy(), out=change.numpy()))
    update = torch.mul(m, step_size).div_(root.div_(root2).add_(eps))
    return p.mul_(decay).sub_(update)


def _read_state(
    held: Tensor, absmax: Tensor | None, signed: bool, start: int, numel: int
) -> Tensor:
    """fp32 [numel]: a view of an fp32 state, or what its codes stand for."""
    held = held[start : start + numel]
    if absmax is None:
        return held
    values = torch.index_select(formats.state_codebook(signed, held.device), 0, held.int())
    whole, absmax = numel // formats.STATE_BLOCKSIZE, absmax[start // formats.STATE_BLOCKSIZE :]
    rest = whole * formats.STATE_BLOCKSIZE
    values[:rest].view(-1, formats.STATE_BLOCKSIZE).mul_(absmax[:whole, None])
    values[rest:].mul_(absmax[whole : whole + 1])
    return values


def _write_state(
    values: Tensor, held: Tensor, absmax: Tensor | None, signed: bool, start: int
) -> None:
    """The inverse of `_read_state`; the view of an fp32 state has been written already."""
    if absmax is None:
        return
    blocks = reference.to_blocks(values, formats.STATE_BLOCKSIZE)
    normalized, scales = reference.normalize(blocks)
    block = start // formats.STATE_BLOCKSIZE
    absmax[block : block + len(scales)] = scales
    codes = _state_codes(normalized.view(-1)[: values.numel()], signed)
    held[start : start + values.numel()] = codes


def _state_codes(normalized: Tensor, signed: bool) -> Tensor:
    """uint8 codes by two look-ups and a comparison, see `formats.state_cell`."""
    ranks = formats.state_cell_ranks(signed, normalized.device)
    code = torch.index_select(ranks, 0, formats.state_cell(normalized, signed))
    thresholds = F.pad(formats.state_thresholds(signed, normalized.device), (0, 1), value=torch.inf)
    code += normalized > torch.index_select(thresholds, 0, code.int())
    return code.masked_fill_(normalized.isnan(), 0)


@lru_cache(maxsize=64)
def _places(sizes: tuple[int, ...]) -> _Places:
    """For parameters of these sizes, a tile at most."""
    counts = np.array(sizes, dtype=np.int64)
    tile = np.repeat(np.arange(len(sizes)), counts)
    element = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    place = tile * formats.STATE_TILE + element
    used, number = np.unique(place // formats.STATE_BLOCKSIZE, return_inverse=True)
    within = number * formats.STATE_BLOCKSIZE + place % formats.STATE_BLOCKSIZE
    return torch.from_numpy(place), torch.from_numpy(used), torch.from_numpy(within)


def _gather_state(
    held: Tensor,
    absmax: Tensor | None,
    signed: bool,
    start: int,
    places: _Places,
) -> Tensor:
    """As `_read_state`, of many parameters."""
    place = places[0] + start
    values = torch.index_select(held, 0, place)
    if absmax is None:
        return values
    values = torch.index_select(formats.state_codebook(signed, held.device), 0, values.int())
    return values.mul_(torch.index_select(absmax, 0, place // formats.STATE_BLOCKSIZE))


def _scatter_state(
    values: Tensor,
    held: Tensor,
    absmax: Tensor | None,
    signed: bool,
    start: int,
    places: _Places,
) -> None:
    """The inverse of `_gather_state`."""
    place, used, within = places
    if absmax is not None:
        blocks = values.new_zeros(len(used), formats.STATE_BLOCKSIZE)
        blocks.view(-1)[within] = values
        normalized, scales = reference.normalize(blocks)
        absmax[used + start // formats.STATE_BLOCKSIZE] = scales
        values = _state_codes(normalized.view(-1)[within], signed)
    held[place + start] = values
