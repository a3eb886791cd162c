"""Every launch configuration and every choice by shape, named per kernel. Data, as far as possible.

Tile sizes are powers of two. None of these figures is timed yet: they are the configurations that compile
without spills for sm_80 and sm_90 and leave room in registers and shared memory (see NOTES.md).
"""

from __future__ import annotations

import torch

Config = dict[str, int]
"""Keyword arguments of a launch: tile sizes, num_warps, num_stages."""

# --- Block-wise kernels: TILE elements a program, and at least one block --------------------------------

QUANTIZE_4BIT: Config = {"TILE": 8192, "PARTS": 4, "num_warps": 8}
DEQUANTIZE_4BIT: Config = {"TILE": 8192, "num_warps": 4}
QUANTIZE_ABSMAX: Config = {"ROWS": 4, "num_warps": 4}
DEQUANTIZE_ABSMAX: Config = {"TILE": 2048, "num_warps": 4}
ADAMW: Config = {"num_warps": 4}  # its tile is `formats.STATE_TILE`


def blockwise(config: Config, blocksize: int) -> Config:
    """The configuration with a tile of at least one block."""
    return config | {"TILE": max(config["TILE"], blocksize)}


def quantize_4bit(blocksize: int) -> Config:
    """Configuration of 4-bit quantization. A part of a block has at least 16 elements, whole sectors of memory."""
    config = blockwise(QUANTIZE_4BIT, blocksize)
    return config | {"PARTS": min(config["PARTS"], blocksize // 16)}


# --- Matrix kernels: by the number of tokens m and by the operands' width -----------------------------

ANY = 2**62
"""Above every m."""

_TILED_BY_M = tuple[tuple[int, Config], ...]
"""(largest m, configuration), ascending; the first row that fits is taken."""

QLORA_FORWARD: _TILED_BY_M = (
    (16, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}),
    (64, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
    (ANY, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}),
)
QLORA_FORWARD_FP32: _TILED_BY_M = (
    (16, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}),
    (ANY, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}),
)
QLORA_GRAD_X: _TILED_BY_M = (
    (16, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}),
    (64, {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}),
    (ANY, {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128, "num_warps": 8, "num_stages": 3}),
)
QLORA_GRAD_X_FP32: _TILED_BY_M = (
    (16, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}),
    (ANY, {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2}),
)
LORA_PROJECT: Config = {"BLOCK_M": 64, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
LORA_PROJECT_FP32: Config = {"BLOCK_M": 32, "BLOCK_K": 32, "num_warps": 8, "num_stages": 2}
LORA_GRAD: Config = {"BLOCK_WIDE": 64, "BLOCK_M": 64, "num_warps": 8, "num_stages": 3}
LORA_GRAD_FP32: Config = {"BLOCK_WIDE": 32, "BLOCK_M": 32, "num_warps": 8, "num_stages": 2}

FEW_TOKENS: _TILED_BY_M = (
    (4, {"ROW_GROUPS": 2, "COLUMN_GROUPS": 1, "num_warps": 8, "num_stages": 1}),
    (8, {"ROW_GROUPS": 2, "COLUMN_GROUPS": 2, "num_warps": 8, "num_stages": 1}),
    (16, {"ROW_GROUPS": 2, "COLUMN_GROUPS": 4, "num_warps": 8, "num_stages": 1}),
)
"""By tokens; see `few_tokens`. More go through `qlora_forward`."""

MANY_TOKENS = 1024
"""Tokens from which on a layer goes through `many_tokens`."""

SLAB_BYTES = 32 * 2**20
"""Of the weight that is decoded at a time for many tokens: within the second-level cache of an H100 (50 MB)."""

SLAB_MULTIPLE = 256
"""Rows or columns of a slab are a multiple of this where they fit: the larger side of cuBLAS' tiles."""

DEQUANTIZE_SLAB: Config = {"BLOCK_N": 32, "BLOCK_K": 256, "num_warps": 4}
ADAPTER: Config = {"BLOCK_M": 64, "BLOCK_W": 128, "num_warps": 8, "num_stages": 2}
ADAPTER_FP32: Config = {"BLOCK_M": 32, "BLOCK_W": 64, "num_warps": 8, "num_stages": 2}

GROUP_M = 8
"""Tiles of tokens that share a tile of weight in the second-level cache before the next one is read."""

LARGEST_RANK_TILE = 64
"""Ranks per step of the adapter's summand in the layer's kernels."""

LARGEST_SKINNY_TILE = 256
"""Ranks per program in the adapter's own kernels: all of them, so that activations are read once."""

PROGRAMS = 264
"""Programs that a split reduction aims at: two per multiprocessor of an H100."""

SMALLEST_REDUCTION = 512
"""Elements below which a reduction is not split further."""


def can_fuse(k: int, dtype: torch.dtype) -> bool:
    """Whether the fused kernels serve this weight: rows begin at a whole byte, and Triton has a dot.

    Otherwise the weight is dequantized and multiplied by torch.
    """
    return k % 2 == 0 and has_dot(dtype)


def has_dot(dtype: torch.dtype) -> bool:
    """Whether the matrix kernels compute in this dtype; fp64 is left to torch."""
    return dtype in (torch.float16, torch.bfloat16, torch.float32)


def qlora_forward(m: int, r: int, dtype: torch.dtype) -> Config:
    """Configuration of the fused forward kernel."""
    table = QLORA_FORWARD_FP32 if dtype == torch.float32 else QLORA_FORWARD
    return _by_tokens(table, m) | {"BLOCK_R": _rank_tile(r, LARGEST_RANK_TILE), "GROUP_M": GROUP_M}


def qlora_grad_x(m: int, r: int, dtype: torch.dtype) -> Config:
    """Configuration of the fused input-gradient kernel."""
    table = QLORA_GRAD_X_FP32 if dtype == torch.float32 else QLORA_GRAD_X
    return _by_tokens(table, m) | {"BLOCK_R": _rank_tile(r, LARGEST_RANK_TILE), "GROUP_M": GROUP_M}


def few_tokens(m: int, blocks: int) -> Config | None:
    """Configuration of the forward kernel for a few tokens, None if it is not for so many.

    `blocks` of scales share a tile of 128 columns, and a token needs a column of x^T for each. Columns that are left
    over let a warp take several tiles at once.
    """
    for most, config in FEW_TOKENS:
        tiles = 8 * config["COLUMN_GROUPS"] // (blocks * (1 << (m - 1).bit_length()))
        if 0 < m <= most and tiles:
            return config | {"TILES": min(tiles, 4)}
    return None


def slab_size(length: int, dtype: torch.dtype) -> int:
    """Rows or columns in a slab, if each has `length` elements; a multiple of 32 at least."""
    fitting = SLAB_BYTES // (max(length, 1) * dtype.itemsize)
    multiple = SLAB_MULTIPLE if fitting >= SLAB_MULTIPLE else 32
    return max(fitting // multiple, 1) * multiple


def adapter(r: int, dtype: torch.dtype) -> Config:
    """Configuration of the adapter's summand for many tokens."""
    config = ADAPTER_FP32 if dtype == torch.float32 else ADAPTER
    return config | {"BLOCK_R": _rank_tile(r, LARGEST_RANK_TILE)}


def lora_project(r: int, dtype: torch.dtype) -> Config:
    """Configuration of the projection onto the rank."""
    config = LORA_PROJECT_FP32 if dtype == torch.float32 else LORA_PROJECT
    return config | {"BLOCK_R": _rank_tile(r, LARGEST_SKINNY_TILE)}


def lora_grad(narrow: int, dtype: torch.dtype) -> Config:
    """Configuration of the adapter's gradients; `narrow` is the width of the narrower operand."""
    config = LORA_GRAD_FP32 if dtype == torch.float32 else LORA_GRAD
    return config | {"BLOCK_NARROW": _rank_tile(narrow, LARGEST_SKINNY_TILE)}


def split_reduction(tiles: int, length: int, step: int) -> tuple[int, int]:
    """(splits, elements per split, a multiple of `step`) for a reduction that has few output tiles."""
    wanted = min(PROGRAMS // max(tiles, 1), length // SMALLEST_REDUCTION)
    per_split = -(-length // max(wanted, 1) // step) * step
    per_split = max(per_split, step)
    return max(-(-length // per_split), 1), per_split


def _by_tokens(table: _TILED_BY_M, m: int) -> Config:
    return next(config for largest_m, config in table if m <= largest_m)


def _rank_tile(rank: int, largest: int) -> int:
    """The power of two that holds `rank`, at least 16 (the smallest product of the tensor cores)."""
    return min(max(16, 1 << (rank - 1).bit_length()), largest)
