"""A weight in 4 bits: `QuantizedTensor`, `quantize_4bit` and `dequantize_4bit`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import checks, formats, ops


@dataclass(frozen=True)
class QuantizedTensor:
    """A block-wise quantized tensor of `shape`, with scales in fp32 or double-quantized to 8 bits.

    Attributes:
        packed: uint8 [ceil(numel / 2)], two codes a byte, the even element in the high nibble.
        absmax: the scale of each block: fp32 [blocks], or uint8 codes [blocks] if double-quantized.
        nested_absmax: fp32 [ceil(blocks / 256)], the scales of the scales; None without double quantization.
        nested_offset: fp32 [], the mean that was subtracted from the scales; None likewise.
        format: the 4-bit data type, a name in `qlora.kernels.formats.FORMATS`.
        blocksize: elements that share a scale; blocks run over the flattened tensor.
        scale_format: the 8-bit data type of the scales; "" without double quantization.
        shape: the tensor's shape before quantization.
        dtype: the tensor's dtype before quantization, and of what it dequantizes to by default.
    """

    packed: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    format: str
    blocksize: int
    scale_format: str
    shape: torch.Size
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of weights."""
        return self.shape.numel()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights and of all scales."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.nested_offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_parameter(self) -> float:
        """4.127 for nf4, block size 64, double-quantized (QLoRA, section 3), and a few bytes; 0 if empty."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0

    @property
    def device(self) -> torch.device:
        """Where the packed weights are."""
        return self.packed.device

    @property
    def settings(self) -> dict[str, Any]:
        """How it was quantized: `quantize_4bit(weight, **settings)` does the same to another weight.

        Without `scale_format` where the scales are in fp32.
        """
        base = {"format": self.format, "blocksize": self.blocksize}
        base["double_quant"] = bool(self.scale_format)
        return base | ({"scale_format": self.scale_format} if self.scale_format else {})

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same weight on another device."""
        return replace(
            self,
            packed=self.packed.to(device),
            absmax=self.absmax.to(device),
            nested_absmax=None if self.nested_absmax is None else self.nested_absmax.to(device),
            nested_offset=None if self.nested_offset is None else self.nested_offset.to(device),
        )


def quantize_4bit(
    weight: Tensor,
    format: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    scale_format: str = "dynamic8",
) -> QuantizedTensor:
    """Quantize a tensor to 4 bits (QLoRA, sections 2 and 3).

    Args:
        weight: any shape; fp32, fp16 or bf16. On the meta device only the sizes are worked out.
        format: "nf4", "fp4", "e2m1", "e3m0" or "int4".
        blocksize: weights that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits, 0.127 in place of 0.5 bits per weight at block size 64.
        scale_format: the data type of double-quantized scales, "dynamic8" (bitsandbytes') or "e4m3".

    Raises:
        TypeError: `weight` has another dtype.
        ValueError: `weight` holds a NaN or an infinity, or is so large that a scale in 8 bits is none that fp32
            has; or another argument is not one of the allowed.
    """
    checks.check_float("weight", weight, ops.WEIGHT_DTYPES)
    formats.check_scale_format(scale_format)
    packed, absmax = ops.quantize_4bit(weight.detach(), format, blocksize)
    _check_finite(weight, absmax)
    nested_absmax = nested_offset = None
    if double_quant:
        absmax, nested_absmax, nested_offset = ops.quantize_absmax(absmax, scale_format)
        _check_scales(weight, nested_absmax, nested_offset)
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        nested_absmax=nested_absmax,
        nested_offset=nested_offset,
        format=format,
        blocksize=blocksize,
        scale_format=scale_format if double_quant else "",
        shape=weight.shape,
        dtype=weight.dtype,
    )


def dtype_name(dtype: torch.dtype) -> str:
    """As files and settings write it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _check_finite(weight: Tensor, absmax: Tensor) -> None:
    """NaN and infinity survive in their block's absmax, which is 1/64 of the weight to look through."""
    if weight.is_meta or torch.isfinite(absmax).all():
        return
    bad = (~torch.isfinite(weight)).sum().item()
    raise ValueError(
        f"weight must be finite; got {bad} NaN or infinite of {weight.numel()} elements"
        f" in a tensor of shape {tuple(weight.shape)}"
    )


def _check_scales(weight: Tensor, nested_absmax: Tensor, nested_offset: Tensor) -> None:
    """A largest scale beyond fp32 would decode its blocks to infinities, and their zeros to NaN."""
    if not weight.is_meta and not torch.isfinite(nested_absmax + nested_offset).all():
        raise ValueError(
            "weight must be smaller for double quantization: a scale in 8 bits would be infinite, at elements up to "
            f"{weight.abs().max().item():.3e}; use double_quant=False"
        )


def dequantize_4bit(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """The dense tensor of `q.shape`, in `dtype` or else `q.dtype`: codebook value times scale."""
    return ops.dequantize_4bit(
        q.packed,
        q.absmax,
        q.nested_absmax,
        q.nested_offset,
        q.format,
        q.blocksize,
        q.scale_format,
        list(q.shape),
        dtype or q.dtype,
    )
