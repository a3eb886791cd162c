"""A step of AdamW on the device: one launch for all parameters, their state in 32 or in 8 bits.

Held bit for bit to `reference_adamw.adamw`. A program takes one tile of STATE_TILE elements of one parameter.
Where it finds them is in two tables: a list of work, made once for each list of sizes, and a row for each
parameter with its addresses and scalars, which is copied to the device at each step.

The states may lie in unified memory: to the kernel that is memory like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import formats, tuning
from qlora.kernels.dropout import hash_u32
from qlora.kernels.primitives import normalize, round_to, to_float32
from qlora.kernels.reference_adamw import SCALARS, parameter_key

TILE = tl.constexpr(formats.STATE_TILE)
BLOCKSIZE = tl.constexpr(formats.STATE_BLOCKSIZE)
CELLS = tl.constexpr(formats.STATE_CELLS)

# A row of the table: int64 addresses of a parameter and of its gradient (0 if it has none), its elements and its
# key for rounding, then the scalars in fp32; 64 bytes in all.
ROW = tl.constexpr(8)
FIRST_SCALAR = tl.constexpr(8)  # in fp32 numbers from the row's beginning

TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _load_state(codes_ptr, absmax_ptr, codebook_ptr, tile, element, inside):
    """A moment of the tile in fp32 [TILE], zero past the parameter's end: codebook[code] * absmax, or as it is."""
    state = tl.load(codes_ptr + tile * TILE + element, mask=inside, other=0)
    if absmax_ptr is not None:
        BLOCKS: tl.constexpr = TILE // BLOCKSIZE
        codebook = tl.load(codebook_ptr + tl.arange(0, 256))
        absmax = tl.load(absmax_ptr + tile * BLOCKS + tl.arange(0, BLOCKS))
        values = tl.gather(codebook, state.to(tl.int32), 0).reshape(BLOCKS, BLOCKSIZE)
        state = tl.where(inside, (values * absmax[:, None]).reshape(TILE), 0.0)
    return state


@triton.jit
def _rank(normalized, cell_ranks_ptr, thresholds_ptr, SIGNED: tl.constexpr):
    """The number of thresholds strictly below each of `normalized` [TILE], 0 for a NaN: int32.

    Two look-ups and one comparison, see `formats.state_cell`.
    """
    HALF: tl.constexpr = CELLS // 2 if SIGNED else CELLS
    SHIFT: tl.constexpr = 17 if SIGNED else 16
    cell_ranks = tl.load(cell_ranks_ptr + tl.arange(0, CELLS))
    index = tl.arange(0, 256)
    thresholds = tl.load(thresholds_ptr + index, mask=index < 255, other=float("inf"))
    bits = normalized.to(tl.int32, bitcast=True)
    magnitude = ((bits & 0x7FFFFFFF) >> SHIFT) - (96 << 23 >> SHIFT)
    cell = tl.minimum(tl.maximum(magnitude, 0), HALF - 1)
    if SIGNED:
        cell = HALF + tl.where(bits < 0, -1 - cell, cell)
    base = tl.gather(cell_ranks, cell, 0).to(tl.int32)
    rank = base + (normalized > tl.gather(thresholds, base, 0)).to(tl.int32)
    return tl.where(normalized == normalized, rank, 0)


@triton.jit
def _store_state(
    state,
    codes_ptr,
    absmax_ptr,
    cell_ranks_ptr,
    thresholds_ptr,
    tile,
    element,
    inside,
    left,
    SIGNED: tl.constexpr,
):
    """The inverse of `_load_state`; `left` elements of the tile, TILE at most, are the parameter's."""
    if absmax_ptr is not None:
        BLOCKS: tl.constexpr = TILE // BLOCKSIZE
        # Past the end everything was zero, and the moments still are.
        normalized, absmax = normalize(state.reshape(1, BLOCKS, BLOCKSIZE))
        block = tl.arange(0, BLOCKS)
        tl.store(absmax_ptr + tile * BLOCKS + block, absmax, mask=block * BLOCKSIZE < left)
        rank = _rank(normalized.reshape(TILE), cell_ranks_ptr, thresholds_ptr, SIGNED)
        state = rank.to(tl.uint8)
    tl.store(codes_ptr + tile * TILE + element, state, mask=inside)


@triton.jit
def _round_at_random(p, key, element):
    """fp32 p to one of its two neighbours in bf16, see `reference_adamw.round_parameter`."""
    random = hash_u32(key.to(tl.uint32) ^ element.to(tl.uint32)) >> 16
    upper = (p.to(tl.uint32, bitcast=True) + random) >> 16
    upper = tl.where(p == p, upper, 0x7FC0)  # a NaN that is added to may turn into a number
    return upper.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _adamw_kernel(
    table_ptr,
    work_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_absmax_ptr,
    exp_avg_sq_absmax_ptr,
    codebook_ptr,
    codebook_sq_ptr,
    cell_ranks_ptr,
    cell_ranks_sq_ptr,
    thresholds_ptr,
    thresholds_sq_ptr,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """m += (1 - beta1)(g - m); v = beta2 v + (1 - beta2) g^2; p = decay p - step_size m / (sqrt(v) / root2 + eps).

    Loshchilov & Hutter 2019, algorithm 2. table int64 [n, ROW]; work int32 [tiles, 2], the number of a
    parameter and of a tile within it; states [tiles * TILE]. ALIGNED: addresses and sizes of all parameters
    and gradients are multiples of 16.
    """
    tile = tl.program_id(0).to(tl.int64)
    row_ptr = table_ptr + tl.load(work_ptr + tile * 2).to(tl.int64) * ROW
    number = tl.load(work_ptr + tile * 2 + 1).to(tl.int64)
    grad_address = tl.load(row_ptr + 1)
    if grad_address == 0:
        return
    param_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
    numel = tl.load(row_ptr + 2)
    if ALIGNED:
        param_ptr, grad_ptr = tl.multiple_of(param_ptr, 16), tl.multiple_of(grad_ptr, 16)
        numel = tl.multiple_of(numel, 16)
    scalars_ptr = row_ptr.to(tl.pointer_type(tl.float32), bitcast=True) + FIRST_SCALAR
    decay, weight1 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
    beta2, weight2 = tl.load(scalars_ptr + 2), tl.load(scalars_ptr + 3)
    step_size, root2 = tl.load(scalars_ptr + 4), tl.load(scalars_ptr + 5)
    eps = tl.load(scalars_ptr + 6)

    first = number * TILE
    left = tl.minimum(tl.maximum(numel - first, 0), TILE).to(tl.int32)
    element = tl.arange(0, TILE)
    inside = element < left
    p = to_float32(tl.load(param_ptr + first + element, mask=inside, other=0.0))
    g = to_float32(tl.load(grad_ptr + first + element, mask=inside, other=0.0))
    m = _load_state(exp_avg_ptr, exp_avg_absmax_ptr, codebook_ptr, tile, element, inside)
    v = _load_state(exp_avg_sq_ptr, exp_avg_sq_absmax_ptr, codebook_sq_ptr, tile, element, inside)

    p = p * decay
    m = m + weight1 * (g - m)
    v = beta2 * v + (weight2 * g) * g
    root = tl.math.div_rn(tl.sqrt_rn(v), tl.broadcast_to(root2, (TILE,)))
    p = p - tl.math.div_rn(step_size * m, root + eps)

    if STOCHASTIC:
        rounded = _round_at_random(p, tl.load(row_ptr + 3), first + element)
    else:
        rounded = round_to(p, DTYPE)
    tl.store(param_ptr + first + element, rounded, mask=inside)
    _store_state(
        m,
        exp_avg_ptr,
        exp_avg_absmax_ptr,
        cell_ranks_ptr,
        thresholds_ptr,
        tile,
        element,
        inside,
        left,
        True,
    )
    _store_state(
        v,
        exp_avg_sq_ptr,
        exp_avg_sq_absmax_ptr,
        cell_ranks_sq_ptr,
        thresholds_sq_ptr,
        tile,
        element,
        inside,
        left,
        False,
    )


# --- Launch -----------------------------------------------------------------------------------------


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
    device, dtype = exp_avg.device, params[0].dtype
    work = _work(tuple(param.numel() for param in params), device)
    pairs = zip(params, grads, strict=True)
    written = [param for param, grad in pairs if grad is not None and param.numel()]
    if not written:
        return
    # What has gaps is updated in a copy. The copies live until the launch, which is all that is needed on a stream.
    dense_grads = [None if grad is None else grad.contiguous() for grad in grads]
    dense_params = [
        param if grad is None else param.contiguous()
        for param, grad in zip(params, grads, strict=True)
    ]
    table = _table(dense_params, dense_grads, scalars, rng)
    with torch.cuda.device_of(exp_avg):
        _adamw_kernel[(len(work),)](
            _to_device(table, device),
            work,
            exp_avg,
            exp_avg_sq,
            exp_avg_absmax,
            exp_avg_sq_absmax,
            *_state_tables(device, exp_avg_absmax is not None),
            DTYPE=TRITON_DTYPES[dtype],
            ALIGNED=not (table[:, :3] & 15).any(),
            STOCHASTIC=rng is not None and dtype == torch.bfloat16,
            enable_fp_fusion=False,
            **tuning.ADAMW,
        )
    for param, dense in zip(params, dense_params, strict=True):
        if dense is not param:
            param.copy_(dense)
    # The kernel writes behind autograd's back.
    states = (exp_avg, exp_avg_sq, exp_avg_absmax, exp_avg_sq_absmax)
    written += [state for state in states if state is not None]
    torch.autograd.graph.increment_version(written)


@lru_cache(maxsize=64)
def _work(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """int32 [tiles, 2]: for each tile the number of its parameter, and its own number within that."""
    counts = np.array([formats.state_tiles(size) for size in sizes], dtype=np.int64)
    param = np.repeat(np.arange(len(sizes)), counts)
    tile = np.arange(len(param)) - np.repeat(counts.cumsum() - counts, counts)
    return torch.from_numpy(np.stack([param, tile], axis=1).astype(np.int32)).to(device)


def _table(
    params: Sequence[Tensor], grads: Sequence[Tensor | None], scalars: Tensor, rng: Tensor | None
) -> np.ndarray:
    """int64 [n, ROW], see there."""
    table = np.zeros((len(params), ROW.value), dtype=np.int64)
    table[:, 0] = [param.data_ptr() for param in params]
    table[:, 1] = [0 if grad is None else grad.data_ptr() for grad in grads]
    table[:, 2] = [param.numel() for param in params]
    if rng is not None:
        table[:, 3] = parameter_key(rng, torch.arange(len(params), device="cpu")).numpy()
    first = FIRST_SCALAR.value
    table.view(np.float32)[:, first : first + len(SCALARS)] = scalars.numpy()
    return table


def _to_device(table: np.ndarray, device: torch.device) -> Tensor:
    """Copied without waiting, from pinned memory that torch keeps until the copy is done."""
    source = torch.from_numpy(table)
    if device.type == "cuda":
        source = source.pin_memory()
    return source.to(device, non_blocking=True)


def _state_tables(device: torch.device, quantized: bool) -> list[Tensor | None]:
    """Codebooks, ranks by cell, and thresholds, each of the first and of the second moment; None for fp32 states."""
    tables = (formats.state_codebook, formats.state_cell_ranks, formats.state_thresholds)
    return [
        table(signed, device) if quantized else None for table in tables for signed in (True, False)
    ]
