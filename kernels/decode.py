"""Device functions that decode 4-bit weights and their double-quantized scales.

    W[row, column] = codebook[code] * absmax[block],     block = (row * k + column) // blocksize

One fp32 product, then one rounding to the output dtype, exactly as `reference.dequantize_4bit`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import formats
from qlora.kernels.primitives import round_to

NESTED_BLOCKSIZE = tl.constexpr(formats.NESTED_BLOCKSIZE)
NESTED_SHIFT = tl.constexpr(formats.NESTED_BLOCKSIZE.bit_length() - 1)


@triton.jit
def load_absmax(block, mask, absmax_ptr, nested_absmax_ptr, nested_offset_ptr, scale_codebook_ptr):
    """The fp32 absmax of each block; read as it is, or decoded if it is double-quantized."""
    absmax = tl.load(absmax_ptr + block, mask=mask, other=0)
    return decode_absmax(
        absmax, block, mask, nested_absmax_ptr, nested_offset_ptr, scale_codebook_ptr
    )


@triton.jit
def decode_absmax(absmax, block, mask, nested_absmax_ptr, nested_offset_ptr, scale_codebook_ptr):
    """The fp32 absmax from what is stored for each block; `mask` is None if all blocks exist.

    QLoRA, section 3: scale_codebook[code] * nested_absmax[block // 256] + nested_offset. The product and the
    sum are rounded one after the other, so kernels that call this are launched with enable_fp_fusion=False.
    """
    if nested_absmax_ptr is not None:
        value = tl.load(scale_codebook_ptr + absmax.to(tl.int32))
        nested_ptrs = nested_absmax_ptr + (block >> NESTED_SHIFT)
        if mask is None:
            nested = tl.load(nested_ptrs)
        else:
            nested = tl.load(nested_ptrs, mask=mask, other=0.0)
        absmax = value * nested + tl.load(nested_offset_ptr)
    return absmax


@triton.jit
def decode_nibbles(packed, codebook, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """codebook[code] of both codes of each byte, the high nibble first: u8 [ROWS, BYTES] to fp32 [ROWS, 2 BYTES].

    The 16 entries lie in shared memory, in 16 banks: a look-up has no bank conflict, whatever the codes. A
    table of pairs, one look-up per byte, takes fewer instructions but collides.
    """
    codes = packed.reshape(ROWS * BYTES).to(tl.int32)
    high = tl.gather(codebook, codes >> 4, 0).reshape(ROWS, BYTES)
    low = tl.gather(codebook, codes & 15, 0).reshape(ROWS, BYTES)
    return tl.join(high, low).reshape(ROWS, 2 * BYTES)


@triton.jit
def load_weight_tile(
    rows,
    row_mask,
    column,
    k,
    row_bytes,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    codebook,
    scale_codebook_ptr,
    dtype: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """W[rows, column : column + COLUMNS] as `dtype` [ROWS, COLUMNS], from a packed W [n, k] with even k.

    `rows` is int64. SCALE_WIDTH neighbouring columns (a power of two, see `scale_width`) share a scale in
    every row, so a row of the tile takes COLUMNS / SCALE_WIDTH scales, or one. Past the end of a row the
    tile holds finite values of no meaning: the other operand must be zero there.
    """
    SCALES: tl.constexpr = COLUMNS // SCALE_WIDTH if COLUMNS > SCALE_WIDTH else 1
    groups = column + tl.arange(0, SCALES) * SCALE_WIDTH
    absmax = load_absmax(
        (rows[:, None] * k + groups[None, :]) // BLOCKSIZE,
        row_mask[:, None] & (groups[None, :] < k),
        absmax_ptr,
        nested_absmax_ptr,
        nested_offset_ptr,
        scale_codebook_ptr,
    )
    byte = column // 2 + tl.arange(0, COLUMNS // 2)
    packed = tl.load(
        packed_ptr + rows[:, None] * row_bytes + byte[None, :],
        mask=row_mask[:, None] & (byte[None, :] < row_bytes),
        other=0,
    )
    values = decode_nibbles(packed, codebook, ROWS, COLUMNS // 2)
    scaled = values.reshape(ROWS, SCALES, COLUMNS // SCALES) * absmax[:, :, None]
    return round_to(scaled.reshape(ROWS, COLUMNS), dtype)


def scale_width(k: int, blocksize: int) -> int:
    """Columns that share a scale in every row: the blocksize, or less where blocks straddle rows.

    Blocks run over the flattened weight, so a block boundary falls on a multiple of the largest power of
    two that divides both k and the blocksize.
    """
    return min(blocksize, k & -k or blocksize)


def weight_arguments(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    scale_format: str,
) -> dict[str, Tensor | None]:
    """The pointers a kernel decodes a weight from, by parameter name; None where not double-quantized."""
    return {
        "packed_ptr": packed.contiguous(),
        "codebook_ptr": formats.codebook(format, packed.device),
        **scale_arguments(absmax, nested_absmax, nested_offset, scale_format),
    }


def scale_arguments(
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    scale_format: str,
) -> dict[str, Tensor | None]:
    """The pointers that scales are decoded from, by parameter name; None where not double-quantized."""
    scale_codebook = None
    if nested_absmax is not None:
        nested_absmax = nested_absmax.contiguous()
        scale_codebook = formats.scale_codebook(scale_format, absmax.device)
    return {
        "absmax_ptr": absmax.contiguous(),
        "nested_absmax_ptr": nested_absmax,
        "nested_offset_ptr": nested_offset,
        "scale_codebook_ptr": scale_codebook,
    }
