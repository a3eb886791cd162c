"""Hypothesis strategies for tensors that are hard on a quantizer."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels.formats import BLOCKSIZES, FORMATS, SCALE_FORMATS

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

formats = st.sampled_from(sorted(FORMATS))
scale_formats = st.sampled_from(sorted(SCALE_FORMATS))
blocksizes = st.sampled_from(BLOCKSIZES)
small_blocksizes = st.sampled_from(BLOCKSIZES[:3])
dtypes = st.sampled_from(DTYPES)
seeds = st.integers(0, 2**31 - 1)

# Element counts around the borders of bytes, quadruples and blocks.
numels = st.one_of(
    st.sampled_from([0, 1, 2, 3, 4, 5, 31, 32, 33, 63, 64, 65, 127, 129, 255, 257, 4097]),
    st.integers(0, 700),
)


def _normal(x: Tensor) -> Tensor:
    return x


def _with_zero_blocks(x: Tensor) -> Tensor:
    x[: x.numel() // 2] = 0
    return x


def _signed_zeros(x: Tensor) -> Tensor:
    return torch.where(x > 1, x, torch.copysign(torch.zeros_like(x), x))


def _huge(x: Tensor) -> Tensor:
    return x / x.abs().max().clamp(min=1e-3)  # times the dtype's largest value, below


def _outlier(x: Tensor) -> Tensor:
    x[:1] = 1000
    return x


def _constant(x: Tensor) -> Tensor:
    return torch.full_like(x, -0.3)


@st.composite
def tensors(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Tensor:
    """A finite tensor of 0 to 4097 elements in one of several shapes of distribution and magnitude."""
    dtype = dtype or draw(dtypes)
    generator = torch.Generator().manual_seed(draw(seeds))
    x = torch.randn(draw(numels), generator=generator)
    kind = draw(
        st.sampled_from([_normal, _with_zero_blocks, _signed_zeros, _huge, _outlier, _constant])
    )
    x = kind(x) if x.numel() else x
    info = torch.finfo(dtype)
    if kind is _huge:
        return (x.double() * info.max).clamp(info.min, info.max).to(dtype)
    # From the smallest subnormals up to ordinary weights.
    scale = draw(
        st.sampled_from([1.0, 0.02, 1e-4, info.tiny, 16 * info.smallest_normal * info.eps])
    )
    return (x.double() * scale).clamp(info.min, info.max).to(dtype)
