"""The layer in one pass: 4-bit decode, matrix product and adapter in one kernel each way.

Both kernels compute the product transposed, with the decoded weight as the *left* operand: Hopper's wgmma
takes its left operand straight from registers, where decoding leaves it. So a program's accumulator is
[weight rows, tokens], and the adapter's product is its first summand:

    forward       y^T      = W x^T        + scaling * B h^T                h = dropout(x) A^T
    grad_x        grad_x^T = W^T grad_y^T + scaling * dropout'(A^T g^T)    g = grad_y B

Held to `reference.qlora_forward` and `reference.qlora_grad_x` by the tolerance rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qlora.kernels import tuning
from qlora.kernels.decode import load_weight_tile, scale_width, weight_arguments
from qlora.kernels.dropout import dropout_arguments, dropout_key, keep_mask
from qlora.kernels.primitives import dot, low_rank_tile, round_to, to_float32


@triton.jit(do_not_specialize=["m"])
def _qlora_forward_kernel(
    x_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    bias_ptr,
    h_ptr,
    lora_b_ptr,
    y_ptr,
    m,
    n,
    k,
    r,
    row_bytes,
    stride_xm,
    stride_xk,
    stride_bn,
    stride_br,
    scaling,
    BLOCKSIZE: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y = x W^T + bias + scaling * h B^T (QLoRA, section 3, equation 5).

    x [m, k], packed W [n, k], bias [n] or None, h [m, r], lora_b B [n, r] to y [m, n]. A program makes
    y^T [BLOCK_N, BLOCK_M].
    """
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(pid // tiles_n, pid % tiles_n, tiles_m, tiles_n, GROUP_M)
    token = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    row = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    token_mask, row_mask = (token < m)[None, :], row < n

    acc = low_rank_tile(
        lora_b_ptr + row[:, None] * stride_bn,
        stride_br,
        row_mask[:, None],
        h_ptr + token[None, :] * r,
        1,
        token_mask,
        r,
        BLOCK_N,
        BLOCK_M,
        BLOCK_R,
    )
    acc *= scaling

    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_ptr + token[None, :] * stride_xm + column[:, None].to(tl.int64) * stride_xk,
            mask=token_mask & (column[:, None] < k),
            other=0.0,
        )
        weight = load_weight_tile(
            row,
            row_mask,
            start,
            k,
            row_bytes,
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            codebook,
            scale_codebook_ptr,
            x_ptr.dtype.element_ty,
            BLOCKSIZE,
            SCALE_WIDTH,
            BLOCK_N,
            BLOCK_K,
        )
        acc = dot(weight, x, acc)

    if bias_ptr is not None:
        acc += to_float32(tl.load(bias_ptr + row, mask=row_mask, other=0.0))[:, None]
    tl.store(
        y_ptr + token[None, :] * n + row[:, None],
        round_to(acc, y_ptr.dtype.element_ty),
        mask=token_mask & row_mask[:, None],
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
    """y [m, n] of `reference.qlora_forward`, from its h; k is even."""
    (m, k), (n, r) = x.shape, lora_b.shape
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    if y.numel():
        config = tuning.qlora_forward(m, r, x.dtype)
        tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(n, config["BLOCK_N"])
        with torch.cuda.device_of(x):
            _qlora_forward_kernel[(tiles,)](
                x,
                **weight_arguments(
                    packed, absmax, nested_absmax, nested_offset, format, scale_format
                ),
                bias_ptr=None if bias is None else bias.contiguous(),
                h_ptr=h,
                lora_b_ptr=lora_b,
                y_ptr=y,
                m=m,
                n=n,
                k=k,
                r=r,
                row_bytes=k // 2,
                stride_xm=x.stride(0),
                stride_xk=x.stride(1),
                stride_bn=lora_b.stride(0),
                stride_br=lora_b.stride(1),
                scaling=float(scaling),
                BLOCKSIZE=blocksize,
                SCALE_WIDTH=scale_width(k, blocksize),
                enable_fp_fusion=False,
                **config,
            )
    return y


@triton.jit(do_not_specialize=["m", "threshold"])
def _qlora_grad_x_kernel(
    grad_y_ptr,
    packed_ptr,
    absmax_ptr,
    nested_absmax_ptr,
    nested_offset_ptr,
    codebook_ptr,
    scale_codebook_ptr,
    g_ptr,
    lora_a_ptr,
    rng_ptr,
    grad_x_ptr,
    m,
    n,
    k,
    r,
    row_bytes,
    stride_ym,
    stride_yn,
    stride_gm,
    stride_gr,
    stride_ar,
    stride_ak,
    scaling,
    threshold,
    keep_scale,
    BLOCKSIZE: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_x = grad_y W + scaling * dropout'(g A) (QLoRA, section 3, the gradient of equation 5).

    grad_y [m, n], packed W [n, k], g [m, r], lora_a A [r, k] to grad_x [m, k]. A program makes
    grad_x^T [BLOCK_K, BLOCK_M]. The mask is recomputed and applied before the base's product is added, so
    that dropout needs no accumulator of its own.
    """
    tiles_m, tiles_k = tl.cdiv(m, BLOCK_M), tl.cdiv(k, BLOCK_K)
    pid = tl.program_id(0)
    tile_m, tile_k = tl.swizzle2d(pid // tiles_k, pid % tiles_k, tiles_m, tiles_k, GROUP_M)
    token = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    token_mask, column_mask = (token < m)[None, :], (column < k)[:, None]

    acc = low_rank_tile(
        lora_a_ptr + column[:, None] * stride_ak,
        stride_ar,
        column_mask,
        g_ptr + token[None, :] * stride_gm,
        stride_gr,
        token_mask,
        r,
        BLOCK_K,
        BLOCK_M,
        BLOCK_R,
    )
    acc *= scaling
    if rng_ptr is not None:
        keep = keep_mask(dropout_key(rng_ptr), token[None, :], column[:, None], threshold)
        acc = tl.where(keep, acc * keep_scale, 0.0)

    codebook = tl.load(codebook_ptr + tl.arange(0, 16))
    for start in range(0, n, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        grad_y = tl.load(
            grad_y_ptr + token[None, :] * stride_ym + row[:, None] * stride_yn,
            mask=token_mask & (row[:, None] < n),
            other=0.0,
        )
        weight = load_weight_tile(
            row,
            row < n,
            tile_k * BLOCK_K,
            k,
            row_bytes,
            packed_ptr,
            absmax_ptr,
            nested_absmax_ptr,
            nested_offset_ptr,
            codebook,
            scale_codebook_ptr,
            grad_y_ptr.dtype.element_ty,
            BLOCKSIZE,
            SCALE_WIDTH,
            BLOCK_N,
            BLOCK_K,
        )
        acc = dot(tl.trans(weight), grad_y, acc)

    tl.store(
        grad_x_ptr + token[None, :] * k + column[:, None],
        round_to(acc, grad_x_ptr.dtype.element_ty),
        mask=token_mask & column_mask,
    )


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
    (m, n), (r, k) = grad_y.shape, lora_a.shape
    out = torch.empty(m, k, dtype=grad_y.dtype, device=grad_y.device)
    if out.numel():
        config = tuning.qlora_grad_x(m, r, grad_y.dtype)
        tiles = triton.cdiv(m, config["BLOCK_M"]) * triton.cdiv(k, config["BLOCK_K"])
        threshold, keep_scale = dropout_arguments(dropout)
        with torch.cuda.device_of(grad_y):
            _qlora_grad_x_kernel[(tiles,)](
                grad_y,
                **weight_arguments(
                    packed, absmax, nested_absmax, nested_offset, format, scale_format
                ),
                g_ptr=g,
                lora_a_ptr=lora_a,
                rng_ptr=rng,
                grad_x_ptr=out,
                m=m,
                n=n,
                k=k,
                r=r,
                row_bytes=k // 2,
                stride_ym=grad_y.stride(0),
                stride_yn=grad_y.stride(1),
                stride_gm=g.stride(0),
                stride_gr=g.stride(1),
                stride_ar=lora_a.stride(0),
                stride_ak=lora_a.stride(1),
                scaling=float(scaling),
                threshold=threshold,
                keep_scale=keep_scale,
                BLOCKSIZE=blocksize,
                SCALE_WIDTH=scale_width(k, blocksize),
                enable_fp_fusion=False,
                **config,
            )
    return out
