"""The device's dropout mask is the reference's, bit for bit."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.kernels import reference
from qlora.kernels.dropout import dropout_arguments, dropout_key, keep_mask
from tests.on_device import DEVICES


@triton.jit
def _mask_kernel(
    rng_ptr, out_ptr, threshold, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows = row + tl.arange(0, ROWS)[:, None]
    columns = column + tl.arange(0, COLUMNS)[None, :]
    keep = keep_mask(dropout_key(rng_ptr), rows, columns, threshold)
    out = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(out_ptr + out, keep.to(tl.int8))


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40)
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(0, 0.999),
    st.integers(0, 200),
    st.integers(0, 200),
)
def test_mask(device: str, seed: int, offset: int, dropout: float, row: int, column: int) -> None:
    """Of a tile anywhere in the matrix, for any seed and offset."""
    rng = torch.tensor([seed, offset])
    out = torch.full((4, 32), -1, dtype=torch.int8, device=device)
    threshold, _ = dropout_arguments(dropout)
    _mask_kernel[(1,)](rng.to(device), out, threshold, row, column, ROWS=4, COLUMNS=32)
    expected = reference.dropout_mask(rng, row + 4, column + 32, dropout)[row:, column:]
    assert torch.equal(out.cpu(), expected.to(torch.int8))
