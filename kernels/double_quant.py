"""Double quantization on the device: the 8-bit scales, both ways (QLoRA, section 3).

Held bit for bit to `reference.quantize_absmax` and `reference.dequantize_absmax`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import formats, tuning
from qlora.kernels.decode import NESTED_BLOCKSIZE, load_absmax
from qlora.kernels.primitives import count_below, normalize


@triton.jit
def _quantize_absmax_kernel(
    absmax_ptr,
    offset_ptr,
    thresholds_ptr,
    codes_ptr,
    nested_absmax_ptr,
    blocks,
    nested_blocks,
    ROWS: tl.constexpr,
):
    """code = nearest((absmax - offset) / nested_absmax) in a 256-entry codebook.

    absmax fp32 [blocks] to codes u8 [blocks] and nested_absmax fp32 [nested_blocks]. A program takes ROWS
    nested blocks of 256; past the end a nested block is filled up with zeros.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = row[None, :, None] * NESTED_BLOCKSIZE + tl.arange(0, NESTED_BLOCKSIZE)[None, None, :]
    inside = block < blocks
    absmax = tl.load(absmax_ptr + block, mask=inside, other=0.0)
    centred = tl.where(inside, absmax - tl.load(offset_ptr), 0.0)

    normalized, nested_absmax = normalize(centred)
    codes = count_below(normalized, thresholds_ptr, 8)
    tl.store(codes_ptr + block, codes.to(tl.uint8), mask=inside)
    tl.store(nested_absmax_ptr + row, nested_absmax, mask=row < nested_blocks)


def quantize_absmax(absmax: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.quantize_absmax`."""
    absmax = absmax.contiguous()
    blocks, device = absmax.numel(), absmax.device
    nested_blocks = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
    codes = torch.empty(absmax.shape, dtype=torch.uint8, device=device)
    nested_absmax = torch.empty(nested_blocks, dtype=torch.float32, device=device)
    if not blocks:
        return codes, nested_absmax, absmax.new_zeros(())
    offset = absmax.double().mean().float()
    config = tuning.QUANTIZE_ABSMAX
    with torch.cuda.device_of(absmax):
        _quantize_absmax_kernel[(triton.cdiv(nested_blocks, config["ROWS"]),)](
            absmax,
            offset,
            formats.scale_thresholds(scale_format, device),
            codes,
            nested_absmax,
            blocks,
            nested_blocks,
            **config,
        )
    return codes, nested_absmax, offset


@triton.jit
def _dequantize_absmax_kernel(
    codes_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    scale_codebook_ptr,
    absmax_ptr,
    blocks,
    TILE: tl.constexpr,
):
    """absmax = scale_codebook[code] * nested_absmax + nested_offset: codes u8 [blocks] to absmax fp32 [blocks]."""
    block = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = block < blocks
    absmax = load_absmax(
        block, inside, codes_ptr, nested_absmax_ptr, nested_offset_ptr, scale_codebook_ptr
    )
    tl.store(absmax_ptr + block, absmax, mask=inside)


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, scale_format: str
) -> Tensor:
    """See `reference.dequantize_absmax`."""
    absmax = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    blocks = codes.numel()
    if blocks:
        config = tuning.DEQUANTIZE_ABSMAX
        with torch.cuda.device_of(codes):
            _dequantize_absmax_kernel[(triton.cdiv(blocks, config["TILE"]),)](
                codes.contiguous(),
                nested_absmax.contiguous(),
                nested_offset,
                formats.scale_codebook(scale_format, codes.device),
                absmax,
                blocks,
                enable_fp_fusion=False,
                **config,
            )
    return absmax
