"""The layer's forward for a few tokens: the weight is read once, and hardly anything else matters.

Generating text multiplies one token, or a handful, with every weight. The floor is the time it takes to read
the packed weight, and what stands in the way are the instructions that decode it, so three things differ from
`fused_linear`:

- Codes are looked up in registers, as 16-bit values (`lookup`), and go into the tensor cores unscaled. A scale
  multiplies the product of a block, in place of each weight of it.
- A program makes a few rows of W x^T, from whole rows of W; its warps share out k.
- A thread's 16 bytes of W are, as they come from memory, its operand of the tensor cores: the order of the
  columns within a tile is chosen so, and x is read in the same order. Threads exchange nothing but sums.

The codebook is rounded where the other kernels round the scaled weight: results are as near to the exact product
as theirs, and not the same.

A warp takes tiles of 128 columns in four *runs* of 32. Its lane 4 i + t holds the t-th run (four words, 16 bytes)
of row i of W, of row i + 8, ..., and the t-th run of column i of x^T. Within a tile the columns are multiplied
in the order [word, half of a word, run, code]. Where blocks of scales are shorter than a tile, a token has several
columns in x^T, one for each block, which hold its elements in that block and zeros elsewhere: so the sums of the
blocks come out apart, each to be multiplied by its scale.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import tuning
from qlora.kernels.decode import decode_absmax, scale_arguments, scale_width
from qlora.kernels.lookup import load_table, look_up, lookup_table, rounded_codebook, uses_ptx
from qlora.kernels.primitives import dot, round_to, to_float32

TILE_K = 128
"""Columns of W in a warp's tile."""

_TILE_K = tl.constexpr(TILE_K)


@triton.jit
def _stack(parts, COUNT: tl.constexpr):
    """1, 2, 4 or 8 equal tensors [a, b] as [a, b, COUNT]."""
    if COUNT == 1:
        stacked = parts[0].expand_dims(2)
    elif COUNT == 2:
        stacked = tl.join(parts[0], parts[1])
    elif COUNT == 4:
        joined = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[3]))
        stacked = joined.reshape(parts[0].shape[0], parts[0].shape[1], 4)
    else:
        even = _stack((parts[0], parts[2], parts[4], parts[6]), 4)
        odd = _stack((parts[1], parts[3], parts[5], parts[7]), 4)
        joined = tl.join(even, odd)
        stacked = joined.reshape(parts[0].shape[0], parts[0].shape[1], 8)
    return stacked


@triton.jit
def _load_words(words_ptr, row, first, n, k, GROUPS: tl.constexpr):
    """Words of the tiles that begin at column `first`, int32 [8 WARPS, 16, GROUPS]: 16 bytes a thread and group.

    `row` is the first group's; rows past the end repeat the last one. Columns past the end are zeros.
    """
    run = tl.arange(0, 16)[None, :] // 4
    word = (first // 8)[:, None] + run * 4 + tl.arange(0, 16)[None, :] % 4
    inside = first[:, None] + run * 32 < k  # of a run all words or none: loads stay 16 bytes wide
    words = ()
    for group in tl.static_range(GROUPS):
        start = tl.minimum(row + group * 8, n - 1) * (k // 32) * 4
        words = words + (tl.load(words_ptr + start[:, None] + word, mask=inside, other=0),)
    return _stack(words, GROUPS)


@triton.jit
def _load_columns(x_ptr, column, first, block, m, k, offset, BLOCKS: tl.constexpr):
    """8 columns of x^T a warp, [8 WARPS, 32]: of each of the four runs the eight elements from `offset` on.

    `block` is the block [1, 32] that a run lies in, counted from where the columns of a token begin.
    """
    run = tl.arange(0, 32)[None, :] // 8
    token = column // BLOCKS
    inside = (token < m)[:, None] & ((column % BLOCKS)[:, None] == block)
    element = first[:, None] + run * 32 + offset + tl.arange(0, 32)[None, :] % 8
    inside &= first[:, None] + run * 32 < k
    return tl.load(x_ptr + (token * k)[:, None] + element, mask=inside, other=0.0)


@triton.jit
def _load_scales(
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    scale_codebook_ptr,
    first_row,
    first,
    n,
    k,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """The scales of a thread's sums, fp32 [8 WARPS, 4, 2 GROUPS]: `first` [32 WARPS] is where its tiles begin.

    Thread 4 i + t of a warp holds the sums of row i of each group, columns 2 t and 2 t + 1 of x^T.
    """
    thread = tl.arange(0, 32 * WARPS)
    row, column = first_row + thread // 4 % 8, thread % 4 * 2
    scales = ()
    for part in tl.static_range(2 * GROUPS):
        # Past the ends the last row, the last block: sums there are zeros, or are not stored.
        width = tl.minimum(first // WIDTH + (column + part % 2) % BLOCKS, k // WIDTH - 1)
        block = tl.minimum(row + part // 2 * 8, n - 1) * (k // WIDTH) + width
        block = block // (BLOCKSIZE // WIDTH)
        scale = decode_absmax(
            tl.load(absmax_ptr + block),
            block,
            None,
            nested_absmax_ptr,
            nested_offset_ptr,
            scale_codebook_ptr,
        )
        scales = scales + (scale.reshape(8 * WARPS, 4),)
    return _stack(scales, 2 * GROUPS)


@triton.jit
def _low_rank(
    h_ptr,
    lora_b_ptr,
    row,
    m,
    n,
    r,
    stride_bn,
    stride_br,
    BLOCKS: tl.constexpr,
    WARPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """B h^T in parts, fp32 [WARPS, ROWS, COLUMNS]: each warp takes 16 ranks. It is in a token's first column."""
    column = tl.arange(0, COLUMNS)[None, None, :]
    acc = tl.zeros((WARPS, ROWS, COLUMNS), tl.float32)
    for start in range(0, r, WARPS * 16):
        rank = start + tl.arange(0, WARPS)[:, None] * 16 + tl.arange(0, 16)[None, :]
        inside = rank < r
        factor = tl.load(
            lora_b_ptr + row[None, :, None] * stride_bn + rank[:, None, :] * stride_br,
            mask=(row < n)[None, :, None] & inside[:, None, :],
            other=0.0,
        )
        h = tl.load(
            h_ptr + column // BLOCKS * r + rank[:, :, None],
            mask=(column < m * BLOCKS) & (column % BLOCKS == 0) & inside[:, :, None],
            other=0.0,
        )
        acc = dot(factor, h, acc)
    return acc


@triton.jit(do_not_specialize=["m"])
def _few_tokens_kernel(
    x_ptr,
    words_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    table_ptr,
    scale_codebook_ptr,
    bias_ptr,
    h_ptr,
    lora_b_ptr,
    y_ptr,
    m,
    n,
    k,
    r,
    stride_bn,
    stride_br,
    scaling,
    unit,
    BLOCKSIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    ROW_GROUPS: tl.constexpr,
    COLUMN_GROUPS: tl.constexpr,
    WARPS: tl.constexpr,
    PTX: tl.constexpr,
):
    """y = x W^T + bias + scaling * h B^T (QLoRA, section 3, equation 5), for 8 COLUMN_GROUPS / BLOCKS tokens at most.

    x [m, k], W [n, k] as int32 words of eight codes, h [m, r], lora_b B [n, r] to y [m, n]. BLOCKS blocks of
    scales share a tile of 128 columns. A program makes 8 ROW_GROUPS rows of y^T.
    """
    ROWS: tl.constexpr = 8 * ROW_GROUPS
    COLUMNS: tl.constexpr = 8 * COLUMN_GROUPS
    BLOCKS: tl.constexpr = TILES * _TILE_K // WIDTH
    TOKENS: tl.constexpr = COLUMNS // BLOCKS
    dtype = x_ptr.dtype.element_ty
    thread = tl.arange(0, 8 * WARPS)
    index, warp = thread % 8, thread // 8
    run_block = tl.arange(0, 32)[None, :] // 8 * 32 // WIDTH
    first_row = tl.program_id(0) * ROWS
    row, token = first_row + tl.arange(0, ROWS), tl.arange(0, TOKENS)
    table = load_table(table_ptr, thread[:, None, None])

    acc = _low_rank(
        h_ptr, lora_b_ptr, row, m, n, r, stride_bn, stride_br, BLOCKS, WARPS, ROWS, COLUMNS
    )
    acc *= scaling / unit
    for start in range(0, k, WARPS * TILES * _TILE_K):
        product = tl.zeros((WARPS, ROWS, COLUMNS), tl.float32)
        for tile in tl.static_range(TILES):
            first = start + (warp * TILES + tile) * _TILE_K
            block = tile * (_TILE_K // WIDTH) + run_block
            words = _load_words(words_ptr, first_row + index, first, n, k, ROW_GROUPS)
            columns = ()
            for group in tl.static_range(COLUMN_GROUPS):
                parts = (
                    _load_columns(x_ptr, group * 8 + index, first, block, m, k, 0, BLOCKS),
                    _load_columns(x_ptr, group * 8 + index, first, block, m, k, 8, BLOCKS),
                    _load_columns(x_ptr, group * 8 + index, first, block, m, k, 16, BLOCKS),
                    _load_columns(x_ptr, group * 8 + index, first, block, m, k, 24, BLOCKS),
                )
                columns = columns + (_stack(parts, 4).reshape(8 * WARPS, _TILE_K),)
            x = _stack(columns, COLUMN_GROUPS)
            # [warp, i, run, half, code, word, group], reordered
            x = x.reshape(WARPS, 8, 4, 2, 4, 4, COLUMN_GROUPS).permute(0, 5, 3, 2, 4, 6, 1)
            weight = look_up(words, table, dtype, PTX)
            # [warp, i, run, word, group, half, code], reordered
            weight = weight.reshape(WARPS, 8, 4, 4, ROW_GROUPS, 2, 4).permute(0, 4, 1, 3, 5, 2, 6)
            product = dot(
                weight.reshape(WARPS, ROWS, _TILE_K), x.reshape(WARPS, _TILE_K, COLUMNS), product
            )
        scale = _load_scales(
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            scale_codebook_ptr,
            first_row,
            start + tl.arange(0, 32 * WARPS) // 32 * (TILES * _TILE_K),
            n,
            k,
            BLOCKSIZE,
            BLOCKS,
            WIDTH,
            ROW_GROUPS,
            WARPS,
        )
        # [warp, i, pair of columns, group, column], reordered
        scale = scale.reshape(WARPS, 8, 4, ROW_GROUPS, 2).permute(0, 3, 1, 2, 4)
        scale = scale.reshape(WARPS, ROWS, 1, 8).broadcast_to(WARPS, ROWS, COLUMN_GROUPS, 8)
        acc += product * scale.reshape(WARPS, ROWS, COLUMNS)

    y = tl.sum(tl.sum(acc, 0).reshape(ROWS, TOKENS, BLOCKS), 2) * unit
    if bias_ptr is not None:
        y += to_float32(tl.load(bias_ptr + row, mask=row < n, other=0.0))[:, None]
    tl.store(
        y_ptr + token[None, :] * n + row[:, None],
        round_to(y, y_ptr.dtype.element_ty),
        mask=(token < m)[None, :] & (row < n)[:, None],
    )


def forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    scaling: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> Tensor:
    """y of `reference.qlora_forward`, from its h. `fits` says which layers and how many tokens."""
    (m, k), (n, r) = x.shape, lora_b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    width = _width(k, blocksize)
    config = tuning.few_tokens(m, TILE_K // width)
    with torch.cuda.device_of(x):
        _few_tokens_kernel[(triton.cdiv(n, 8 * config["ROW_GROUPS"]),)](
            x.contiguous(),
            packed.contiguous().view(torch.int32),
            table_ptr=lookup_table(format, x.dtype, x.device),
            **scale_arguments(absmax, nested_absmax, nested_offset, scale_format),
            bias_ptr=None if bias is None else bias.contiguous(),
            h_ptr=h,
            lora_b_ptr=lora_b,
            y_ptr=y,
            m=m,
            n=n,
            k=k,
            r=r,
            stride_bn=lora_b.stride(0),
            stride_br=lora_b.stride(1),
            scaling=float(scaling),
            unit=1 / rounded_codebook(format, x.dtype)[1],
            BLOCKSIZE=blocksize,
            WIDTH=width,
            WARPS=config["num_warps"],
            PTX=uses_ptx(),
            enable_fp_fusion=False,
            **config,
        )
    return y


def _width(k: int, blocksize: int) -> int:
    """Columns that share a scale in every row, and at most a tile."""
    return min(scale_width(k, blocksize), TILE_K)


def fits(x: Tensor, packed: Tensor, blocksize: int) -> bool:
    """Whether the kernel serves these tokens and this weight.

    It computes in 16 bits, takes rows of whole runs, aligned to the 16 bytes of a load, and so many tokens as
    `tuning.few_tokens` has columns for: 16, or 8 in blocks of 32. Its offsets have 32 bits.
    """
    m, k = x.shape
    n = 2 * packed.numel() // k if k else 0
    return (
        x.dtype in (torch.float16, torch.bfloat16)
        and k > 0
        and k % 32 == 0
        and packed.storage_offset() % 16 == 0
        and packed.numel() < 2**33  # in words
        and m * max(n, k) < 2**31
        and tuning.few_tokens(m, TILE_K // _width(k, blocksize)) is not None
    )
