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
from qlora.kernels.primitives import count_below, normalize, round_to, to_float32


@triton.jit
def _quantize_4bit_kernel(
    x_ptr,
    thresholds_ptr,
    rank_to_code_ptr,
    packed_ptr,
    absmax_ptr,
    numel,
    packed_bytes,
    blocks,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """code = nearest(x / absmax) in a 16-entry codebook, two codes a byte (QLoRA, section 2, equation 1).

    x [numel] to packed u8 [packed_bytes] and absmax fp32 [blocks]. A program takes TILE elements as
    [TILE / BLOCKSIZE, BLOCKSIZE]. The low nibble that an odd count leaves over is 0.
    """
    ROWS: tl.constexpr = TILE // BLOCKSIZE
    start = tl.program_id(0).to(tl.int64) * TILE
    rows = tl.arange(0, ROWS)
    element = start + rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    inside = element < numel
    x = to_float32(tl.load(x_ptr + element, mask=inside, other=0.0))

    normalized, absmax = normalize(x)
    codes = tl.load(rank_to_code_ptr + count_below(normalized, thresholds_ptr, 4))
    codes = tl.where(inside, codes, 0)
    high, low = tl.split(codes.reshape(ROWS, BLOCKSIZE // 2, 2))

    byte = start // 2 + rows[:, None] * (BLOCKSIZE // 2) + tl.arange(0, BLOCKSIZE // 2)[None, :]
    tl.store(packed_ptr + byte, high << 4 | low, mask=byte < packed_bytes)
    block = start // BLOCKSIZE + rows
    tl.store(absmax_ptr + block, absmax, mask=block < blocks)


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """See `reference.quantize_4bit`."""
    x = x.contiguous()
    numel, blocks = x.numel(), formats.num_blocks(x.numel(), blocksize)
    packed = torch.empty(formats.packed_bytes(numel), dtype=torch.uint8, device=x.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=x.device)
    if numel:
        config = tuning.blockwise(tuning.QUANTIZE_4BIT, blocksize)
        with torch.cuda.device_of(x):
            _quantize_4bit_kernel[(triton.cdiv(numel, config["TILE"]),)](
                x,
                formats.thresholds(format, x.device),
                formats.rank_to_code(format, x.device),
                packed,
                absmax,
                numel,
                packed.numel(),
                blocks,
                BLOCKSIZE=blocksize,
                **config,
            )
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
    blocks,
    BLOCKSIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """out = codebook[code] * absmax (QLoRA, section 2, equation 2, and section 3 for a double-quantized absmax).

    packed u8 [packed_bytes], absmax [blocks] to out [numel]. A program makes TILE elements as
    [TILE / BLOCKSIZE, BLOCKSIZE], with one decoded scale a row.
    """
    ROWS: tl.constexpr = TILE // BLOCKSIZE
    BYTES: tl.constexpr = BLOCKSIZE // 2
    start = tl.program_id(0).to(tl.int64) * TILE
    rows = tl.arange(0, ROWS)
    block = start // BLOCKSIZE + rows
    absmax = load_absmax(
        block,
        block < blocks,
        absmax_ptr,
        nested_absmax_ptr,
        nested_offset_ptr,
        scale_codebook_ptr,
    )
    byte = start // 2 + rows[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    packed = tl.load(packed_ptr + byte, mask=byte < packed_bytes, other=0)
    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    values = decode_nibbles(packed, codebook, ROWS, BYTES) * absmax[:, None]

    element = start + rows[:, None] * BLOCKSIZE + tl.arange(0, BLOCKSIZE)[None, :]
    tl.store(out_ptr + element, round_to(values, out_ptr.dtype.element_ty), mask=element < numel)


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
                blocks=absmax.numel(),
                BLOCKSIZE=blocksize,
                enable_fp_fusion=False,
                **config,
            )
    return out
