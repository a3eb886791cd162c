"""The CPU path: the reference's results, bit for bit where it promises them, at a useful speed.

Dequantization looks up two weights at a time: a packed byte indexes a table of 256 pairs of fp32, moved as
one 8-byte element. Large weights are done in slabs, which keeps what lies between (the indices, and the
fp32 values of a 16-bit result) small.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.kernels import cpu_adamw, formats, reference

_SLAB = 2**20
"""Weights per slab, a multiple of every block size. Best of 2^17 .. 2^20 on 2 cores."""

_ROWS = 16
"""Rows that a slab's look-ups are laid out in: `gather` spreads rows over threads, a flat look-up runs on
one. Measured on 2 cores, 1536 x 576: 0.14 ms, against 0.21 for `index_select` from the same table, and
0.20 from one of 65,536 quadruples, whose megabyte the caches have to keep."""

quantize_absmax = reference.quantize_absmax
adamw = cpu_adamw.adamw


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`."""
    flat = x.reshape(-1)
    numel, on_device = flat.numel(), {"device": x.device}
    packed = torch.empty(formats.packed_bytes(numel), dtype=torch.uint8, **on_device)
    absmax = torch.empty(formats.num_blocks(numel, blocksize), dtype=torch.float32, **on_device)
    for start in range(0, numel, _SLAB):
        slab = flat[start : start + _SLAB]
        normalized, scales = reference.normalize(reference.to_blocks(slab, blocksize))
        absmax[start // blocksize : (start + _SLAB) // blocksize] = scales
        codes = _encode(normalized.view(-1), format)
        codes[slab.numel() :] = 0  # what fills up the last byte
        slab_bytes = formats.packed_bytes(slab.numel())
        packed[start // 2 : start // 2 + slab_bytes] = reference.pack(codes)[:slab_bytes]
    return packed, absmax


def _encode(normalized: Tensor, format: str) -> Tensor:
    """uint8 codes: a comparison with each threshold, added up.

    Measured for a whole 4096 x 4096 on 2 cores: 54 ms, against 297 with the binary search of `bucketize`.
    """
    rank = torch.zeros(normalized.shape, dtype=torch.uint8, device=normalized.device)
    above = torch.empty_like(rank, dtype=torch.bool)
    for threshold in formats.FORMATS[format].thresholds.tolist():
        rank.add_(torch.gt(normalized, threshold, out=above).view(torch.uint8))
    rank_to_code = formats.FORMATS[format].rank_to_code
    if rank_to_code == tuple(range(16)):
        return rank
    return torch.index_select(formats.rank_to_code(format, rank.device), 0, rank.int())


@cache
def _pairs(format: str) -> Tensor:
    """complex64 [256]: the two fp32 values of each byte, as one opaque 8-byte element."""
    code = torch.arange(256, device="cpu")
    values = formats.codebook(format, torch.device("cpu"))
    return values[torch.stack([code >> 4, code & 15], dim=1)].view(torch.complex64).view(-1)


class _Scratch(threading.local):
    """What lies between, once for each thread: fresh memory costs more than the look-ups, a page fault for each 4 KB."""

    def __init__(self) -> None:
        # What is made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.index = torch.empty(_SLAB // 2, dtype=torch.int64, device="cpu")
            self.values = torch.empty(_SLAB, dtype=torch.float32, device="cpu")


_scratch = _Scratch()


def _decode(packed: Tensor, format: str, out: Tensor) -> None:
    """Write the codebook values of all codes in `packed` to `out`, fp32 [2 * bytes]."""
    rows = _ROWS if packed.numel() % _ROWS == 0 else 1
    index = _scratch.index[: packed.numel()].copy_(packed).view(rows, -1)
    table = _pairs(format).expand(rows, -1)
    torch.gather(table, 1, index, out=out.view(torch.complex64).view(rows, -1))


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    scale_format: str,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    """See `reference.dequantize_4bit`."""
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset, scale_format)
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    flat = out.view(-1)
    in_place = dtype == torch.float32 and flat.numel() % 2 == 0
    for start in range(0, flat.numel(), _SLAB):
        slab = flat[start : start + _SLAB]
        codes = packed[start // 2 : (start + _SLAB) // 2]
        values = slab if in_place else _scratch.values[: 2 * codes.numel()]
        _decode(codes, format, values)
        _scale_blocks_(values[: slab.numel()], absmax[start // blocksize :], blocksize)
        if not in_place:
            slab.copy_(values[: slab.numel()])
    return out


def _scale_blocks_(values: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Multiply each block of `values` by its absmax in place; the last block may be short."""
    rest = values.numel() % blocksize
    if rest:
        values[-rest:].mul_(absmax[values.numel() // blocksize])
        values = values[:-rest]
    blocks = values.view(-1, blocksize)
    blocks.mul_(absmax[: blocks.shape[0], None])


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, scale_format: str
) -> Tensor:
    """See `reference.dequantize_absmax`."""
    table = formats.scale_codebook(scale_format, codes.device)
    absmax = torch.index_select(table, 0, codes.int())
    _scale_blocks_(absmax, nested_absmax, formats.NESTED_BLOCKSIZE)
    return absmax.add_(nested_offset)


def qlora_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> tuple[Tensor, Tensor]:
    """See `reference.qlora_forward`."""
    shape = [lora_b.shape[0], x.shape[1]]
    weight = dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        scale_format,
        shape,
        x.dtype,
    )
    h = lora_project(x, lora_a, rng, dropout)
    return _add_product_(F.linear(x, weight, bias), h, lora_b.mT, scaling), h


def qlora_grad_x(
    grad_y: Tensor,
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    lora_a: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> Tensor:
    """See `reference.qlora_grad_x`."""
    shape = [grad_y.shape[1], lora_a.shape[1]]
    weight = dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        scale_format,
        shape,
        g.dtype,
    )
    grad_x = grad_y @ weight
    if rng is None:
        return _add_product_(grad_x, g, lora_a, scaling)
    return grad_x.add_(_drop(g @ lora_a, rng, dropout), alpha=scaling)


def _add_product_(y: Tensor, left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """y += scaling * left right, in one pass over y.

    A sum that starts at y may round otherwise than a product that is added to it. Over few rows, where the
    maximum of the error is one of few elements, that was seen to break the tolerance rule now and then, and
    there is no time to win: they go the plain way.
    """
    if y.shape[0] < 16:
        return y.add_(left @ right, alpha=scaling)
    return y.addmm_(left, right, alpha=scaling)


def lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """See `reference.lora_project`."""
    return F.linear(_drop(x, rng, dropout), weight)


def lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """See `reference.lora_grad`."""
    return (left.mT @ _drop(right, rng, dropout)).mul_(scaling)


def _drop(x: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    if rng is None:
        return x
    keep = dropout_mask(rng, x.shape[0], x.shape[1], dropout)
    return torch.where(keep, x * (1 / (1 - dropout)), 0)


def dropout_mask(rng: Tensor, m: int, k: int, dropout: float) -> Tensor:
    """See `reference.dropout_mask`. Hashes the elements in int32, whose products wrap as uint32's do."""
    seed, offset = rng.to(torch.int64).unbind()
    call_key = reference.hash_u32(reference.hash_u32(seed) ^ (offset & reference.UINT32))
    row_key = reference.hash_u32(call_key ^ torch.arange(m, device=rng.device)).to(torch.int32)
    x = row_key[:, None] ^ torch.arange(k, dtype=torch.int32, device=rng.device)[None, :]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return (x >> 8).bitwise_and_(0xFFFFFF) >= int(dropout * 2**24)
