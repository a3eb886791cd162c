"""The choices by shape hold what the kernels rely on."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora.kernels import tuning
from qlora.kernels.decode import scale_width
from qlora.kernels.formats import BLOCKSIZES

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.sampled_from([16, 32, 64, 128]))
def test_splits_cover_the_reduction(tiles: int, length: int, step: int) -> None:
    splits, per_split = tuning.split_reduction(tiles, length, step)
    assert per_split % step == 0
    assert (splits - 1) * per_split < max(length, 1) <= splits * per_split
    assert splits == 1 or splits * tiles <= tuning.PROGRAMS


@given(st.integers(1, 100_000), st.sampled_from(BLOCKSIZES), st.integers(0, 1000))
def test_columns_of_one_group_share_a_block(k: int, blocksize: int, row: int) -> None:
    width = scale_width(k, blocksize)
    assert math.log2(width).is_integer()
    first = row * k + width * (row % max(k // width, 1))
    assert first // blocksize == (first + width - 1) // blocksize


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 16, 17, 64, 65, 10**7])
@pytest.mark.parametrize("r", [0, 1, 16, 17, 256, 300])
def test_tiles_are_powers_of_two(m: int, r: int, dtype: torch.dtype) -> None:
    configs = (
        tuning.qlora_forward(m, r, dtype),
        tuning.qlora_grad_x(m, r, dtype),
        tuning.lora_project(r, dtype),
        tuning.lora_grad(r, dtype),
    )
    for config in configs:
        tiles = [size for name, size in config.items() if name.startswith("BLOCK")]
        assert all(size >= 16 and size & (size - 1) == 0 for size in tiles)


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_a_tile_holds_whole_blocks(blocksize: int) -> None:
    for config in (tuning.QUANTIZE_4BIT, tuning.DEQUANTIZE_4BIT):
        assert tuning.blockwise(config, blocksize)["TILE"] % blocksize == 0
    assert blocksize // tuning.quantize_4bit(blocksize)["PARTS"] >= 16


def test_what_has_a_fused_path() -> None:
    assert tuning.can_fuse(64, torch.bfloat16)
    assert not tuning.can_fuse(63, torch.bfloat16)
    assert not tuning.can_fuse(64, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("length", [1, 64, 4096, 28672, 128256, 256000])
def test_a_slab_stays_within_its_bytes(length: int, dtype: torch.dtype) -> None:
    size = tuning.slab_size(length, dtype)
    assert size > 0
    assert size % 32 == 0
    assert size == 32 or size * length * dtype.itemsize <= tuning.SLAB_BYTES
    assert size * length * dtype.itemsize <= 2**26
