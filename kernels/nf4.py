"""4-bit quantization and dequantization on the device, for any 16-entry codebook.

Held bit for bit to `reference.quantize_4bit` and `reference.dequantize_4bit`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import formats, tuning
from qlora.kernels.decode import decode_nibbles, load_absmax, weight_arguments
from qlora.kernels.primitives import elements_left, normalize, round_to, saturate, to_float32

CELLS = tl.constexpr(formats.CELLS)


@triton.jit
def _rank(normalized, cell_ranks_ptr, thresholds_ptr):
    """The number of thresholds strictly below each of `normalized` [size]: int32, see `formats.Format.cell_ranks`.

    Two look-ups in shared memory without bank conflicts: 128 bytes, then 16 fp32, lie in 32 and 16 banks.
    The cell is the bit pattern of a subnormal float, multiples of 2^-149, so it comes out of the product as
    an integer. The comparison is the sign of a difference. Both keep work off the integer pipe, which is half
    as wide. A product fused into the difference would change it: launch with enable_fp_fusion=False.
    """
    cell_ranks = tl.load(cell_ranks_ptr + tl.arange(0, CELLS))
    thresholds = tl.load(
        thresholds_ptr + tl.arange(0, 16), mask=tl.arange(0, 16) < 15, other=float("inf")
    )
    cell = saturate(tl.fma(normalized, 0.5, 0.5)) * ((CELLS - 1) * 2.0**-149)
    base = tl.gather(cell_ranks, cell.to(tl.int32, bitcast=True), 0).to(tl.int32)
    difference = tl.gather(thresholds, base, 0) - normalized
    return base + (difference.to(tl.uint32, bitcast=True) >> 31).to(tl.int32)


@triton.jit
def _pack(ranks, code_bytes_ptr, GROUPS: tl.constexpr):
    """Eight ranks [8 GROUPS] to the codes of a word, four bytes, the first in the low one: int32 [GROUPS].

    Small integers are subnormal floats, and fp32 adds and multiplies them exactly: b = 16 high + low and
    256 b1 + b0 are one instruction each, and not an integer one.
    """
    small = ranks.to(tl.float32, bitcast=True).reshape(GROUPS, 2, 2, 2)
    high, low = tl.split(small)
    byte = tl.fma(high, 16.0, low)
    if code_bytes_ptr is not None:
        code_bytes = tl.load(code_bytes_ptr + tl.arange(0, 256))
        index = byte.to(tl.int32, bitcast=True).reshape(GROUPS * 4)
        codes = tl.gather(code_bytes, index, 0).to(tl.uint32)
        byte = codes.to(tl.float32, bitcast=True).reshape(GROUPS, 2, 2)
    first, second = tl.split(byte)
    lower, upper = tl.split(tl.fma(second, 256.0, first))
    return upper.to(tl.int32, bitcast=True) << 16 | lower.to(tl.int32, bitcast=True)


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    cell_ranks_ptr,
    thresholds_ptr,
    code_bytes_ptr,
    words_ptr,
    absmax_ptr,
    numel,
    words,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """code = nearest(x / absmax) in a 16-entry codebook, two codes a byte (QLoRA, section 2, equation 1).

    x [numel] to eight codes a word, int32 [words], and absmax fp32 [ceil(numel / BLOCKSIZE)]. Past the end x is
    taken for zeros. A program takes TILE elements as [PARTS, TILE / BLOCKSIZE, BLOCKSIZE / PARTS]: a thread has
    all parts of its blocks, so that fewer threads share a block and reduce, divide and shuffle for it.
    """
    ROWS: tl.constexpr = TILE // BLOCKSIZE
    WIDTH: tl.constexpr = BLOCKSIZE // PARTS
    tile = tl.program_id(0).to(tl.int64)
    part_row = tl.arange(0, PARTS * ROWS)
    run = part_row % ROWS * BLOCKSIZE + part_row // ROWS * WIDTH
    element = run[:, None] + tl.arange(0, WIDTH)[None, :]
    left = elements_left(numel, tile, TILE)
    x = tl.load(x_ptr + tile * TILE + element, mask=element < left, other=0.0)

    normalized, absmax = normalize(to_float32(x).reshape(PARTS, ROWS, WIDTH))
    ranks = _rank(normalized.reshape(TILE), cell_ranks_ptr, thresholds_ptr)
    packed = _pack(ranks, code_bytes_ptr, TILE // 8)
    packed = packed.reshape(PARTS, ROWS, WIDTH // 8).permute(1, 0, 2).reshape(TILE // 8)

    word = tl.arange(0, TILE // 8)
    words_left = elements_left(words, tile, TILE // 8)
    tl.store(words_ptr + tile * (TILE // 8) + word, packed, mask=word < words_left)
    rows = tl.arange(0, ROWS)
    tl.store(absmax_ptr + tile * ROWS + rows, absmax, mask=rows * BLOCKSIZE < left)


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`."""
    x = x.contiguous()
    numel, blocks = x.numel(), formats.num_blocks(x.numel(), blocksize)
    # The kernel writes whole words; the bytes beyond the last code are not part of the result.
    words = torch.empty(triton.cdiv(numel, 8), dtype=torch.int32, device=x.device)
    packed = words.view(torch.uint8)[: formats.packed_bytes(numel)]
    absmax = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if numel:
        config = tuning.quantize_4bit(blocksize)
        with torch.cuda.device_of(x):
            _quantize_4bit_kernel[(triton.cdiv(numel, config["TILE"]),)](
                x,
                formats.cell_ranks(format, x.device),
                formats.thresholds(format, x.device),
                formats.code_bytes(format, x.device),
                words,
                absmax,
                numel,
                words.numel(),
                BLOCKSIZE=blocksize,
                enable_fp_fusion=False,
                **config,
            )
    if numel % 2:
        packed[-1:] &= 0xF0  # the low nibble that an odd count leaves over
    return packed, absmax


@triton.jit
def _dequantize_4bit_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    out_ptr,
    numel,
    packed_bytes,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = codebook[code] * absmax (QLoRA, section 2, equation 2, and section 3 for a double-quantized absmax).

    packed u8 [packed_bytes], absmax [blocks] to out [numel]. A program makes TILE elements as
    [TILE / BLOCKSIZE, BLOCKSIZE], with one decoded scale a row.
    """
    ROWS: tl.constexpr = TILE // BLOCKSIZE
    BYTES: tl.constexpr = BLOCKSIZE // 2
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    left = elements_left(numel, tile, TILE)
    absmax = load_absmax(
        tile * ROWS + rows,
        rows * BLOCKSIZE < left,
        absmax_ptr,
        nested_absmax_ptr,
        nested_offset_ptr,
        scale_codebook_ptr,
    )
    byte = rows[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    bytes_left = elements_left(packed_bytes, tile, TILE // 2)
    packed = tl.load(packed_ptr + tile * (TILE // 2) + byte, mask=byte < bytes_left, other=0)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    values = decode_nibbles(packed, codebook, ROWS, BYTES) * absmax[:, None]

    element = rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    out = round_to(values, out_ptr.dtype.element_ty)
    tl.store(out_ptr + tile * TILE + element, out, mask=element < left)


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
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    numel = out.numel()
    if numel:
        config = tuning.blockwise(tuning.DEQUANTIZE_4BIT, blocksize)
        with torch.cuda.device_of(packed):
            _dequantize_4bit_kernel[(triton.cdiv(numel, config["TILE"]),)](
                **weight_arguments(
                    packed, absmax, nested_absmax, nested_offset, format, scale_format
                ),
                out_ptr=out,
                numel=numel,
                packed_bytes=packed.numel(),
                BLOCKSIZE=blocksize,
                enable_fp_fusion=False,
                **config,
            )
    return out
