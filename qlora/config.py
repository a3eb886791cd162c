"""`QLoRAConfig`: what is quantized how, and which layers get an adapter of which size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qlora.kernels import formats

ALL_LINEAR = "all-linear"

BASE_FIELDS = ("format", "blocksize", "double_quant", "scale_format")
"""The fields of QLoRAConfig that say how the base is quantized."""

ADAPTER_DTYPES = ("float32", "bfloat16")

_MAX_RANK = 256


@dataclass(frozen=True)
class QLoRAConfig:
    """Settings of `quantize_model` and of each layer. The defaults are the QLoRA paper's,
    but for the dropout, which it sets to 0.1 up to 13B and 0.05 above, and its published scripts to 0.05.

    Attributes:
        rank: r, the inner dimension of the adapter's factors, 1 to 256.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability that an element of the adapter's input is dropped in training, in [0, 1).
        target_modules: the linear layers that get an adapter: "all-linear", a sequence of names (a layer
            matches by its full name or the end of it after a dot, as "q_proj" or "attn.q_proj"), or a
            regular expression that matches full names. Layers without an adapter are quantized all the same.
        format: the 4-bit data type of the base: "nf4", "fp4", "e2m1", "e3m0", "int4"; or None to leave the
            base dense: plain LoRA, the 16-bit baseline of the papers.
        blocksize: weights that share a scale, a power of two from 32 to 4096.
        double_quant: store the scales in 8 bits.
        scale_format: the data type of double-quantized scales: "dynamic8" or "e4m3".
        adapter_dtype: what the adapter's factors and their gradients are held in, "float32" or "bfloat16", which
            saves 4 bytes per trained parameter (65B in 48 GB needs it).

    Raises:
        TypeError, ValueError: a value is not one of the allowed; the message names it.
    """

    rank: int = 64
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | Sequence[str] = ALL_LINEAR
    format: str | None = "nf4"
    blocksize: int = 64
    double_quant: bool = True
    scale_format: str = "dynamic8"
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        for name, kind in (("rank", int), ("blocksize", int), ("double_quant", bool)):
            if type(getattr(self, name)) is not kind:
                got = getattr(self, name)
                raise TypeError(f"{name} must be of type {kind.__name__}; got {got!r}")
        if not 1 <= self.rank <= _MAX_RANK:
            raise ValueError(f"rank must be from 1 to {_MAX_RANK}; got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be positive and finite; got {self.alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1; got {self.dropout}")
        if not isinstance(self.target_modules, (str, Sequence)):
            raise TypeError(
                f"target_modules must be a string or a sequence of names; got {self.target_modules!r}"
            )
        if not self.target_modules:
            raise ValueError(
                f"target_modules must name at least one layer; got {self.target_modules!r}"
            )
        if self.format is not None:
            formats.check_format(self.format)
        formats.check_blocksize(self.blocksize)
        formats.check_scale_format(self.scale_format)
        if self.adapter_dtype not in ADAPTER_DTYPES:
            allowed = " or ".join(ADAPTER_DTYPES)
            raise ValueError(f"adapter_dtype must be {allowed}; got {self.adapter_dtype!r}")

    @property
    def adapter_torch_dtype(self) -> torch.dtype:
        """The dtype that `adapter_dtype` names."""
        return getattr(torch, self.adapter_dtype)

    @property
    def scaling(self) -> float:
        """The factor of the adapter's output, alpha / rank (LoRA, section 4.1)."""
        return self.alpha / self.rank
