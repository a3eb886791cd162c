"""The specification: QLoRA (Dettmers et al. 2023) in plain PyTorch, on any device.

Written to be read beside the paper, not to be fast. Every kernel has the signature of its namesake here
and is held to it: codes and dequantized values bit for bit, matrix products by one tolerance rule.

Shapes: x [m, k], weight W [n, k], lora_a A [r, k], lora_b B [n, r]; n out features, k in features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qlora.kernels.formats import (
    NESTED_BLOCKSIZE,
    codebook,
    rank_to_code,
    scale_codebook,
    scale_thresholds,
    thresholds,
)

# --- Block-wise quantization (section 2, equations 1 and 2) -----------------------------------------


def to_blocks(x: Tensor, blocksize: int) -> Tensor:
    """Flatten to fp32 [blocks, blocksize]; a short last block is filled up with zeros."""
    flat = x.reshape(-1).float()
    return F.pad(flat, (0, -flat.numel() % blocksize)).view(-1, blocksize)


def normalize(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scale each block into [-1, 1]: (blocks * (1 / absmax), absmax [blocks]).

    The reciprocal of a tiny absmax overflows, so such blocks are lifted by a power of two first, which
    is exact. A block of zeros stays zero.
    """
    absmax = blocks.abs().amax(dim=1)
    # Of two numbers `where` makes a tensor of torch's default dtype, whatever that is.
    lift = torch.where(absmax < 2.0**-100, 2.0**64, 1.0).to(absmax.dtype)
    inverse = torch.where(absmax > 0, 1.0 / (absmax * lift), 0.0)
    return blocks * lift[:, None] * inverse[:, None], absmax


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Quantize to the nearest entry of a 16-entry codebook, block by block.

    Args:
        x: any shape, fp32 / fp16 / bf16, finite.
        format: a name in `FORMATS`.
        blocksize: elements that share a scale; blocks run over the flattened tensor.

    Returns:
        packed uint8 [ceil(numel / 2)], the even element in the high nibble; absmax fp32 [blocks].
    """
    normalized, absmax = normalize(to_blocks(x, blocksize))
    rank = torch.bucketize(normalized.view(-1)[: x.numel()], thresholds(format, x.device))
    codes = rank_to_code(format, x.device)[rank]
    return pack(F.pad(codes, (0, codes.numel() % 2))), absmax


def pack(codes: Tensor) -> Tensor:
    """Two codes a byte, the even element in the high nibble: uint8 [2 bytes] to uint8 [bytes]."""
    return codes[0::2] << 4 | codes[1::2]


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
    """The inverse of `quantize_4bit`: codebook[code] * absmax, one fp32 product and one rounding to `dtype`.

    With `nested_absmax` and `nested_offset`, `absmax` holds the uint8 codes of double-quantized scales.
    """
    if nested_absmax is not None:
        absmax = dequantize_absmax(absmax, nested_absmax, nested_offset, scale_format)
    codes = torch.stack([packed >> 4, packed & 15], dim=1).view(-1)
    values = codebook(format, packed.device)[codes.long()]
    numel = torch.Size(shape).numel()
    scaled = to_blocks(values[:numel], blocksize) * absmax[:, None]
    return scaled.view(-1)[:numel].to(dtype).view(shape)


# --- Double quantization (section 3) ----------------------------------------------------------------


def quantize_absmax(absmax: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the scales themselves to 8 bits, in blocks of 256 around their mean.

    The mean is summed in fp64 and rounded once, so that it does not hang on the order of summation.

    Returns:
        codes uint8 [blocks]; nested_absmax fp32 [ceil(blocks / 256)]; nested_offset fp32 [].
    """
    offset = absmax.double().mean().float() if absmax.numel() else absmax.new_zeros(())
    normalized, nested_absmax = normalize(to_blocks(absmax - offset, NESTED_BLOCKSIZE))
    flat = normalized.view(-1)[: absmax.numel()]
    codes = torch.bucketize(flat, scale_thresholds(scale_format, absmax.device))
    return codes.to(torch.uint8), nested_absmax, offset


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, scale_format: str
) -> Tensor:
    """The inverse of `quantize_absmax`: fp32 [blocks], a product and a sum, each rounded."""
    values = scale_codebook(scale_format, codes.device)[codes.long()]
    scaled = to_blocks(values, NESTED_BLOCKSIZE) * nested_absmax[:, None]
    return scaled.view(-1)[: codes.numel()] + nested_offset


# --- The QLoRA linear layer (equations 5 and 6) and its gradients -----------------------------------


def qlora_forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    rng: Tensor | None,
    scaling: float,
    dropout: float,
    format: str,
    blocksize: int,
    scale_format: str,
) -> tuple[Tensor, Tensor]:
    """y = x W^T + bias + scaling * h B^T with h = dropout(x) A^T; returns (y [m, n], h [m, r])."""
    shape = [lora_b.shape[0], x.shape[1]]
    weight = dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        scale_format,
        shape,
        x.dtype,
    )
    h = lora_project(x, lora_a, rng, dropout)
    return F.linear(x, weight, bias) + scaling * F.linear(h, lora_b), h


def qlora_grad_x(
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
    """grad_x = grad_y W + scaling * dropout'(g A), with g = grad_y B [m, r]; returns [m, k]."""
    shape = [grad_y.shape[1], lora_a.shape[1]]
    weight = dequantize_4bit(
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        format,
        blocksize,
        scale_format,
        shape,
        g.dtype,
    )
    return grad_y @ weight + scaling * _drop(g @ lora_a, rng, dropout)


def lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """dropout(x) weight^T: [m, k] and [r, k] to [m, r]. The forward's h, and g = grad_y B as weight = B^T."""
    return F.linear(_drop(x, rng, dropout), weight)


def lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """scaling * left^T dropout(right): [m, i] and [m, j] to [i, j].

    grad_A = lora_grad(g, x, rng, scaling, dropout); grad_B = lora_grad(grad_y, h, None, scaling, 0).
    """
    return scaling * (left.mT @ _drop(right, rng, dropout))


# --- Dropout (section 4 uses it on the adapter's input) ---------------------------------------------


def _drop(x: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    if rng is None:
        return x
    keep = dropout_mask(rng, x.shape[0], x.shape[1], dropout)
    return torch.where(keep, x * (1 / (1 - dropout)), 0)


def dropout_mask(rng: Tensor, m: int, k: int, dropout: float) -> Tensor:
    """bool [m, k], True where an element is kept: a function of (seed, offset, row, column) alone.

    A counter-based generator, so that backward recomputes the mask in place of storing it, on any device
    and in any tiling. Each row gets a key, each element a hash of its key and column, whose upper 24
    bits are compared with the dropout probability.

    Args:
        rng: int64 [2], the seed and an offset that tells the calls of one seed apart.
    """
    seed, offset = rng.to(torch.int64).unbind()
    rows = torch.arange(m, device=rng.device)[:, None]
    columns = torch.arange(k, device=rng.device)[None, :]
    row_key = hash_u32(hash_u32(hash_u32(seed) ^ (offset & UINT32)) ^ rows)
    return (hash_u32(row_key ^ columns) >> 8) >= int(dropout * 2**24)


UINT32 = 0xFFFFFFFF


def hash_u32(x: Tensor) -> Tensor:
    """Mix the 32 low bits of an int64 (Wellons' lowbias32 constants); returns values in [0, 2^32)."""
    x = x & UINT32
    x = (x ^ x >> 16) * 0x7FEB352D & UINT32
    x = (x ^ x >> 15) * 0x846CA68B & UINT32
    return x ^ x >> 16
