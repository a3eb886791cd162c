"""The layer for many tokens: decode a slab of the weight, and leave its product to cuBLAS.

With thousands of tokens the products are all that counts, and decoding is a few per cent of them however it is done;
what must not be is a buffer as large as the weight. A slab is a run of whole rows of W in the forward, and of whole
columns in the input gradient, so that each element of the result comes from one product of cuBLAS:

    forward      y[:, slab]      = x W[slab]^T       + (scaling * h B[slab]^T + bias[slab])
    grad_x       grad_x[:, slab] = grad_y W[:, slab] + scaling * dropout'(g A[:, slab])

cuBLAS writes the product, and a kernel adds the adapter's summand to it.

Held to `reference.qlora_forward` and `reference.qlora_grad_x` by the tolerance rule.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import tuning
from qlora.kernels.decode import load_weight_tile, scale_width, weight_arguments
from qlora.kernels.dropout import dropout_arguments, dropout_key, keep_mask
from qlora.kernels.primitives import low_rank_tile, round_to, to_float32


@triton.jit
def _dequantize_slab_kernel(
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    out_ptr,
    k,
    row_bytes,
    first_row,
    first_run,
    rows,
    columns,
    BLOCKSIZE: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = W[first_row : first_row + rows, 32 first_run : 32 first_run + columns] for a packed W [n, k].

    A program makes [BLOCK_N, BLOCK_K] (QLoRA, section 3, equation 6). Runs of 32 columns are 16 bytes, a load.
    """
    tiles = tl.cdiv(columns, BLOCK_K)
    row = (tl.program_id(0) // tiles * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    start = tl.program_id(0) % tiles * BLOCK_K
    weight = load_weight_tile(
        first_row + row,
        row < rows,
        first_run * 32 + start,
        k,
        row_bytes,
        packed_ptr,
        absmax_ptr,
        nested_absmax_ptr,
        nested_offset_ptr,
        tl.load(codebook_ptr + tl.arange(0, 16)),
        scale_codebook_ptr,
        out_ptr.dtype.element_ty,
        BLOCKSIZE,
        SCALE_WIDTH,
        BLOCK_N,
        BLOCK_K,
    )
    column = start + tl.arange(0, BLOCK_K)
    tl.store(
        out_ptr + row[:, None] * columns + column[None, :],
        weight,
        mask=(row < rows)[:, None] & (column < columns)[None, :],
    )


@triton.jit(do_not_specialize=["m", "threshold"])
def _adapter_kernel(
    left_ptr,
    right_ptr,
    bias_ptr,
    rng_ptr,
    out_ptr,
    m,
    width,
    r,
    first_column,
    stride_lm,
    stride_lr,
    stride_rr,
    stride_rw,
    stride_om,
    scaling,
    threshold,
    keep_scale,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out += scaling * dropout'(left right) + bias (QLoRA, section 3, equation 5: the second summand, either way).

    left [m, r], right [r, width], bias [width] or None to out [m, width], whose columns are `first_column` and on
    of the matrix that the dropout mask belongs to. A program makes [BLOCK_M, BLOCK_W].
    """
    tiles = tl.cdiv(width, BLOCK_W)
    token = (tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tl.program_id(0) % tiles * BLOCK_W + tl.arange(0, BLOCK_W)
    token_mask, column_mask = (token < m)[:, None], (column < width)[None, :]
    acc = low_rank_tile(
        left_ptr + token[:, None] * stride_lm,
        stride_lr,
        token_mask,
        right_ptr + column[None, :].to(tl.int64) * stride_rw,
        stride_rr,
        column_mask,
        r,
        BLOCK_M,
        BLOCK_W,
        BLOCK_R,
    )
    acc *= scaling
    if rng_ptr is not None:
        key = dropout_key(rng_ptr)
        keep = keep_mask(key, token[:, None], first_column + column[None, :], threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)
    if bias_ptr is not None:
        acc += to_float32(tl.load(bias_ptr + column, mask=column < width, other=0.0))[None, :]
    out_ptrs = out_ptr + token[:, None] * stride_om + column[None, :]
    inside = token_mask & column_mask
    acc += to_float32(tl.load(out_ptrs, mask=inside, other=0.0))
    tl.store(out_ptrs, round_to(acc, out_ptr.dtype.element_ty), mask=inside)


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
    """y [m, n] of `reference.qlora_forward`, from its h; k is even."""
    (m, k), n = x.shape, lora_b.shape[0]
    x = _for_cublas(x)
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    weight = weight_arguments(packed, absmax, nested_absmax, nested_offset, format, scale_format)
    buffer, slabs = _slabs(n, k, x)
    for first, rows in slabs:
        slab = _dequantize(weight, k, blocksize, first, 0, buffer[: rows * k].view(rows, k))
        part = slice(first, first + rows)
        torch.mm(x, slab.mT, out=y[:, part])
        bias_part = None if bias is None else bias[part]
        _add_adapter(y[:, part], h, lora_b[part].mT, bias_part, None, scaling, 0.0, first)
    return y


def grad_x(
    grad_y: Tensor,
    g: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    lora_a: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> Tensor:
    """See `reference.qlora_grad_x`; k is even."""
    (m, n), k = grad_y.shape, lora_a.shape[1]
    grad_y = _for_cublas(grad_y)
    out = torch.empty(m, k, dtype=grad_y.dtype, device=grad_y.device)
    weight = weight_arguments(packed, absmax, nested_absmax, nested_offset, format, scale_format)
    buffer, slabs = _slabs(k, n, grad_y)
    for first, columns in slabs:
        slab = buffer[: n * columns].view(n, columns)
        slab = _dequantize(weight, k, blocksize, 0, first, slab)
        part = slice(first, first + columns)
        torch.mm(grad_y, slab, out=out[:, part])
        _add_adapter(out[:, part], g, lora_a[:, part], None, rng, scaling, dropout, first)
    return out


def _slabs(size: int, length: int, like: Tensor) -> tuple[Tensor, Iterator[tuple[int, int]]]:
    """A buffer for one slab, and (first, count) of each, for `size` rows or columns of `length` elements."""
    count = min(tuning.slab_size(length, like.dtype), size)
    buffer = torch.empty(count * length, dtype=like.dtype, device=like.device)
    return buffer, ((first, min(count, size - first)) for first in range(0, size, count or 1))


def _dequantize(
    weight: dict[str, Tensor | None],
    k: int,
    blocksize: int,
    first_row: int,
    first_column: int,
    out: Tensor,
) -> Tensor:
    """The part of a weight that begins at (first_row, first_column), decoded into `out` [rows, columns].

    `first_column` is a multiple of 32.
    """
    rows, columns = out.shape
    config = tuning.DEQUANTIZE_SLAB
    tiles = triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(columns, config["BLOCK_K"])
    with torch.cuda.device_of(out):
        _dequantize_slab_kernel[(tiles,)](
            **weight,
            out_ptr=out,
            k=k,
            row_bytes=k // 2,
            first_row=first_row,
            first_run=first_column // 32,
            rows=rows,
            columns=columns,
            BLOCKSIZE=blocksize,
            SCALE_WIDTH=scale_width(k, blocksize),
            enable_fp_fusion=False,
            **config,
        )
    return out


def _add_adapter(
    out: Tensor,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    first_column: int,
) -> None:
    """out += scaling * dropout'(left right) + bias, for columns `first_column` and on of the layer's result."""
    (m, width), r = out.shape, left.shape[1]
    if not r and bias is None:
        return
    config = tuning.adapter(r, out.dtype)
    tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(width, config["BLOCK_W"])
    threshold, keep_scale = dropout_arguments(dropout)
    with torch.cuda.device_of(out):
        _adapter_kernel[(tiles,)](
            left,
            right,
            None if bias is None else bias.contiguous(),
            rng,
            out,
            m,
            width,
            r,
            first_column,
            left.stride(0),
            left.stride(1),
            right.stride(0),
            right.stride(1),
            out.stride(0),
            float(scaling),
            threshold,
            keep_scale,
            **config,
        )


def _for_cublas(matrix: Tensor) -> Tensor:
    """The matrix with a stride of 1, which torch would otherwise copy for each slab anew."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()
