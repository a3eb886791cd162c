"""The CPU path: the reference's results, bit for bit where it promises them, at a useful speed.

Dequantization looks up four weights at a time: two packed bytes index a table of 65,536 quadruples of
fp32, moved as one 16-byte element. Large weights are done in slabs that stay in cache, which also keeps the
fp32 intermediate of a 16-bit result small.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.kernels import formats, reference

_SLAB = 2**20
"""Weights per slab, a multiple of every block size. Measured best of 2^16 .. 2^20 on 2 cores: 1.7x over one
pass in fp32, 3.3x in bf16 (4096 x 4096)."""

quantize_4bit = reference.quantize_4bit
quantize_absmax = reference.quantize_absmax


@cache
def _quadruples(format: str) -> Tensor:
    """complex128 [65536]: the four fp32 values of each pair of bytes, as one opaque 16-byte element."""
    pairs = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.uint8).view(-1, 2)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=2).view(-1, 4)
    values = formats.codebook(format, torch.device("cpu"))[codes.long()]
    return values.view(torch.complex128).view(-1)


def _byte_pairs(packed: Tensor) -> Tensor:
    """uint16 view of the packed bytes, filled up to an even count and aligned."""
    if packed.numel() % 2:
        packed = F.pad(packed, (0, 1))
    elif packed.storage_offset() % 2:
        packed = packed.clone()
    return packed.view(torch.uint16)


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
    out = torch.empty(shape, dtype=dtype)
    flat, pairs, table = out.view(-1), _byte_pairs(packed), _quadruples(format)
    for start in range(0, flat.numel(), _SLAB):
        slab = flat[start : start + _SLAB]
        index = pairs[start // 4 : (start + _SLAB) // 4].int()
        values = torch.index_select(table, 0, index).view(torch.float32)[: slab.numel()]
        _scale_blocks_(values, absmax[start // blocksize :], blocksize)
        slab.copy_(values)
    return out


def _scale_blocks_(values: Tensor, absmax: Tensor, blocksize: int) -> None:
    """Multiply each block of `values` by its absmax in place; the last block may be short."""
    blocks, rest = divmod(values.numel(), blocksize)
    values[: blocks * blocksize].view(blocks, blocksize).mul_(absmax[:blocks, None])
    if rest:
        values[-rest:].mul_(absmax[blocks])


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
    return F.linear(x, weight, bias).addmm_(h, lora_b.mT, alpha=scaling), h


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
        return grad_x.addmm_(g, lora_a, alpha=scaling)
    return grad_x.add_(_drop(g @ lora_a, rng, dropout), alpha=scaling)


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
    row_key = reference.hash_u32(call_key ^ torch.arange(m)).to(torch.int32)
    x = row_key[:, None] ^ torch.arange(k, dtype=torch.int32)[None, :]
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - 2**32
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return (x >> 8).bitwise_and_(0xFFFFFF) >= int(dropout * 2**24)
