"""The adapter's own products on the device: into the rank, and the gradients of A and B.

Skinny products (rank r at most a few hundred) whose floor is one reading of the activations. Each reduces
over a long dimension with few output tiles, so the reduction is split among programs that write fp32
partial sums; these are added in a fixed order, and results do not vary from run to run.

Held to `reference.lora_project` and `reference.lora_grad` by the tolerance rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import reference, tuning
from qlora.kernels.dropout import dropout_arguments, dropout_key, keep_mask
from qlora.kernels.primitives import dot, round_to, to_float32


@triton.jit
def _drop_tile(x, rng_ptr, rows, columns, threshold, keep_scale):
    """dropout(x) for a tile at (rows, columns) of a matrix, rounded to the dtype of x."""
    keep = keep_mask(dropout_key(rng_ptr), rows, columns, threshold)
    return round_to(tl.where(keep, to_float32(x) * keep_scale, 0.0), x.dtype)


@triton.jit(do_not_specialize=["m", "threshold"])
def _lora_project_kernel(
    x_ptr,
    weight_ptr,
    rng_ptr,
    out_ptr,
    m,
    k,
    r,
    reduction,
    stride_xm,
    stride_xk,
    stride_wr,
    stride_wk,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out[s] = dropout(x) weight^T over the s-th part of k (QLoRA, section 3: X L1 of equation 3).

    x [m, k], weight [r, k] to out [splits, m, r]. A program makes [BLOCK_M, BLOCK_R] from `reduction`
    columns of x, a multiple of BLOCK_K.
    """
    split = tl.program_id(2)
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    rank = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask, rank_mask = (row < m)[:, None], (rank < r)[None, :]

    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for start in range(split * reduction, min((split + 1) * reduction, k), BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + row[:, None] * stride_xm + column[None, :].to(tl.int64) * stride_xk,
            mask=row_mask & (column[None, :] < k),
            other=0.0,
        )
        if rng_ptr is not None:
            x = _drop_tile(x, rng_ptr, row[:, None], column[None, :], threshold, keep_scale)
        weight = tl.load(
            weight_ptr + rank[None, :] * stride_wr + column[:, None] * stride_wk,
            mask=rank_mask & (column[:, None] < k),
            other=0.0,
        )
        acc = dot(x, weight, acc)

    out = out_ptr + split.to(tl.int64) * m * r + row[:, None] * r + rank[None, :]
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=row_mask & rank_mask)


def lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """See `reference.lora_project`."""
    if not tuning.has_dot(x.dtype):
        return reference.lora_project(x, weight, rng, dropout)
    (m, k), r = x.shape, weight.shape[0]
    if not r:  # no adapter
        return x.new_empty(m, 0)
    config = tuning.lora_project(r, x.dtype)
    tiles = triton.cdiv(m, config["BLOCK_M"]), triton.cdiv(r, config["BLOCK_R"])
    splits, reduction = tuning.split_reduction(tiles[0] * tiles[1], k, config["BLOCK_K"])
    out = _partial_sums(splits, m, r, x)
    if out.numel():
        threshold, keep_scale = dropout_arguments(dropout)
        with torch.cuda.device_of(x):
            _lora_project_kernel[(*tiles, splits)](
                x,
                weight,
                rng,
                out,
                m,
                k,
                r,
                reduction,
                x.stride(0),
                x.stride(1),
                weight.stride(0),
                weight.stride(1),
                threshold,
                keep_scale,
                **config,
            )
    return _add(out, x.dtype)


@triton.jit(do_not_specialize=["m", "threshold"])
def _lora_grad_kernel(
    wide_ptr,
    narrow_ptr,
    rng_ptr,
    out_ptr,
    m,
    wide,
    narrow,
    reduction,
    stride_wm,
    stride_ww,
    stride_nm,
    stride_nn,
    stride_ow,
    stride_on,
    scaling,
    threshold,
    keep_scale,
    BLOCK_WIDE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """out[s] = scaling * dropout(W)^T N over the s-th part of the m tokens.

    W `wide` [m, wide], N `narrow` [m, narrow] to out [splits, wide, narrow] (strides stride_ow, stride_on).
    The gradient of A^T has W = x, N = g; the gradient of B has W = grad_y, N = h (QLoRA, section 3: the
    derivatives by L1 and L2). The activations are the left operand: after dropout they are in registers.
    """
    split = tl.program_id(2)
    row = tl.program_id(0) * BLOCK_WIDE + tl.arange(0, BLOCK_WIDE)
    column = tl.program_id(1) * BLOCK_NARROW + tl.arange(0, BLOCK_NARROW)
    row_mask, column_mask = (row < wide)[:, None], (column < narrow)[None, :]

    acc = tl.zeros((BLOCK_WIDE, BLOCK_NARROW), tl.float32)
    for start in range(split * reduction, min((split + 1) * reduction, m), BLOCK_M):
        token = (start + tl.arange(0, BLOCK_M)).to(tl.int64)
        left = tl.load(
            wide_ptr + token[None, :] * stride_wm + row[:, None].to(tl.int64) * stride_ww,
            mask=row_mask & (token[None, :] < m),
            other=0.0,
        )
        if rng_ptr is not None:
            left = _drop_tile(left, rng_ptr, token[None, :], row[:, None], threshold, keep_scale)
        right = tl.load(
            narrow_ptr + token[:, None] * stride_nm + column[None, :] * stride_nn,
            mask=column_mask & (token[:, None] < m),
            other=0.0,
        )
        acc = dot(left, right, acc)
    acc *= scaling

    out = out_ptr + split.to(tl.int64) * wide * narrow
    out += row[:, None].to(tl.int64) * stride_ow + column[None, :] * stride_on
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=row_mask & column_mask)


def lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """See `reference.lora_grad`."""
    if not tuning.has_dot(left.dtype):
        return reference.lora_grad(left, right, rng, scaling, dropout)
    m, i, j = left.shape[0], left.shape[1], right.shape[1]
    # Dropout acts on the kernel's wide operand; without it the wider one takes that place.
    left_is_wide = rng is None and i > j
    wide, narrow = (left, right) if left_is_wide else (right, left)
    config = tuning.lora_grad(narrow.shape[1], left.dtype)
    tiles = (
        triton.cdiv(wide.shape[1], config["BLOCK_WIDE"]),
        triton.cdiv(narrow.shape[1], config["BLOCK_NARROW"]),
    )
    splits, reduction = tuning.split_reduction(tiles[0] * tiles[1], m, config["BLOCK_M"])
    out = _partial_sums(splits, i, j, left)
    if out.numel():
        threshold, keep_scale = dropout_arguments(dropout)
        with torch.cuda.device_of(left):
            _lora_grad_kernel[(*tiles, splits)](
                wide,
                narrow,
                rng,
                out,
                m,
                wide.shape[1],
                narrow.shape[1],
                reduction,
                wide.stride(0),
                wide.stride(1),
                narrow.stride(0),
                narrow.stride(1),
                j if left_is_wide else 1,
                1 if left_is_wide else j,
                float(scaling),
                threshold,
                keep_scale,
                **config,
            )
    return _add(out, left.dtype)


def _partial_sums(splits: int, rows: int, columns: int, like: Tensor) -> Tensor:
    """[splits, rows, columns] for a kernel to fill: fp32, or the final dtype if there is nothing to add."""
    dtype = like.dtype if splits == 1 else torch.float32
    return torch.empty(splits, rows, columns, dtype=dtype, device=like.device)


def _add(partial_sums: Tensor, dtype: torch.dtype) -> Tensor:
    return partial_sums[0] if len(partial_sums) == 1 else partial_sums.sum(0).to(dtype)
