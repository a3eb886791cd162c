"""The only door to the kernels: `torch.ops.qlora.*`, checked at the entrance.

Each op has a schema, a fake implementation (shapes and dtypes alone, for `torch.compile` and the meta
device), a CPU implementation and a CUDA implementation that imports its Triton launcher on the first call.
No op has autograd: `qlora.functional` composes them into a differentiable function.

The functions below are the ops' faces. They check what a kernel would otherwise read as garbage, and raise
ValueError or TypeError that names the argument. Their documentation is that of their namesakes in
`qlora.kernels.reference`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import cpu, formats

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPUTE_DTYPES = (*WEIGHT_DTYPES, torch.float64)  # fp64 for gradcheck and as an oracle

_SCALES = "Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_FORMAT = "str format, int blocksize, str scale_format"


def _define(schema: str, cuda_module: str, fake: Callable[..., Any]) -> None:
    """Register `qlora::schema` with the implementations of that name in `cpu` and in `cuda_module`."""
    name = schema.partition("(")[0]

    def cuda(*args: Any) -> Any:
        return getattr(importlib.import_module(f"qlora.kernels.{cuda_module}"), name)(*args)

    torch.library.define(f"qlora::{name}", schema.removeprefix(name))
    torch.library.impl(f"qlora::{name}", "CPU")(getattr(cpu, name))
    torch.library.impl(f"qlora::{name}", "CUDA")(cuda)
    torch.library.register_fake(f"qlora::{name}")(fake)


# --- Quantization -----------------------------------------------------------------------------------


def _fake_quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    numel = x.numel()
    return (
        x.new_empty(formats.packed_bytes(numel), dtype=torch.uint8),
        x.new_empty(formats.num_blocks(numel, blocksize), dtype=torch.float32),
    )


_define(
    "quantize_4bit(Tensor x, str format, int blocksize) -> (Tensor, Tensor)",
    "nf4",
    _fake_quantize_4bit,
)


def quantize_4bit(x: Tensor, format: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """(packed, absmax): see `reference.quantize_4bit`."""
    _check_float("x", x, WEIGHT_DTYPES)
    formats.check_format(format)
    formats.check_blocksize(blocksize)
    return torch.ops.qlora.quantize_4bit(x, format, blocksize)


def _fake_dequantize_4bit(
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
    return packed.new_empty(shape, dtype=dtype)


_define(
    f"dequantize_4bit(Tensor packed, {_SCALES}, {_FORMAT}, SymInt[] shape, ScalarType dtype) -> Tensor",
    "nf4",
    _fake_dequantize_4bit,
)


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
    """A tensor of `shape` and `dtype`: see `reference.dequantize_4bit`."""
    numel = torch.Size(shape).numel()
    _check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, numel
    )
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"dtype must be one of {_names(COMPUTE_DTYPES)}; got {dtype}")
    return torch.ops.qlora.dequantize_4bit(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, shape, dtype
    )


def _fake_quantize_absmax(absmax: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor]:
    nested_blocks = formats.num_blocks(absmax.numel(), formats.NESTED_BLOCKSIZE)
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    return codes, absmax.new_empty(nested_blocks), absmax.new_empty(())


_define(
    "quantize_absmax(Tensor absmax, str scale_format) -> (Tensor, Tensor, Tensor)",
    "double_quant",
    _fake_quantize_absmax,
)


def quantize_absmax(absmax: Tensor, scale_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, nested_absmax, nested_offset): see `reference.quantize_absmax`."""
    _check("absmax", absmax, torch.float32, None)
    formats.check_scale_format(scale_format)
    return torch.ops.qlora.quantize_absmax(absmax, scale_format)


def _fake_dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, scale_format: str
) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


_define(
    "dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor nested_offset, str scale_format)"
    " -> Tensor",
    "double_quant",
    _fake_dequantize_absmax,
)


def dequantize_absmax(
    codes: Tensor, nested_absmax: Tensor, nested_offset: Tensor, scale_format: str
) -> Tensor:
    """fp32 [blocks]: see `reference.dequantize_absmax`."""
    _check_nested(codes, nested_absmax, nested_offset, scale_format, codes.numel())
    return torch.ops.qlora.dequantize_absmax(codes, nested_absmax, nested_offset, scale_format)


# --- The QLoRA linear layer -------------------------------------------------------------------------


def _fake_qlora_forward(
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
    m = x.shape[0]
    return x.new_empty(m, lora_b.shape[0]), x.new_empty(m, lora_a.shape[0])


_define(
    f"qlora_forward(Tensor x, Tensor packed, {_SCALES}, Tensor? bias, Tensor lora_a, Tensor lora_b,"
    f" Tensor? rng, float scaling, float dropout, {_FORMAT}) -> (Tensor, Tensor)",
    "fused_linear",
    _fake_qlora_forward,
)


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
    """(y, h): see `reference.qlora_forward`."""
    _check_float("x", x, COMPUTE_DTYPES)
    m, k = _check_matrix("x", x)
    rank, n = lora_a.shape[0], lora_b.shape[0]
    _check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, n * k
    )
    _check("lora_a", lora_a, x.dtype, (rank, k))
    _check("lora_b", lora_b, x.dtype, (n, rank))
    if bias is not None:
        _check("bias", bias, x.dtype, (n,))
    _check_dropout(rng, dropout)
    return torch.ops.qlora.qlora_forward(
        x,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        bias,
        lora_a,
        lora_b,
        rng,
        scaling,
        dropout,
        format,
        blocksize,
        scale_format,
    )


def _fake_qlora_grad_x(
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
    return grad_y.new_empty(grad_y.shape[0], lora_a.shape[1])


_define(
    f"qlora_grad_x(Tensor grad_y, Tensor g, Tensor packed, {_SCALES}, Tensor lora_a, Tensor? rng,"
    f" float scaling, float dropout, {_FORMAT}) -> Tensor",
    "fused_linear",
    _fake_qlora_grad_x,
)


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
    """grad_x [m, k]: see `reference.qlora_grad_x`."""
    _check_float("grad_y", grad_y, COMPUTE_DTYPES)
    m, n = _check_matrix("grad_y", grad_y)
    rank, k = _check_matrix("lora_a", lora_a)
    _check("g", g, grad_y.dtype, (m, rank))
    _check("lora_a", lora_a, grad_y.dtype, (rank, k))
    _check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, n * k
    )
    _check_dropout(rng, dropout)
    return torch.ops.qlora.qlora_grad_x(
        grad_y,
        g,
        packed,
        absmax,
        nested_absmax,
        nested_offset,
        lora_a,
        rng,
        scaling,
        dropout,
        format,
        blocksize,
        scale_format,
    )


def _fake_lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_define(
    "lora_project(Tensor x, Tensor weight, Tensor? rng, float dropout) -> Tensor",
    "fused_linear",
    _fake_lora_project,
)


def lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """dropout(x) weight^T: see `reference.lora_project`."""
    _check_float("x", x, COMPUTE_DTYPES)
    _, k = _check_matrix("x", x)
    _check("weight", weight, x.dtype, (weight.shape[0], k))
    _check_dropout(rng, dropout)
    return torch.ops.qlora.lora_project(x, weight, rng, dropout)


def _fake_lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])


_define(
    "lora_grad(Tensor left, Tensor right, Tensor? rng, float scaling, float dropout) -> Tensor",
    "fused_linear",
    _fake_lora_grad,
)


def lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """scaling * left^T dropout(right): see `reference.lora_grad`."""
    _check_float("left", left, COMPUTE_DTYPES)
    m, _ = _check_matrix("left", left)
    _check("right", right, left.dtype, (m, right.shape[-1]))
    _check_dropout(rng, dropout)
    return torch.ops.qlora.lora_grad(left, right, rng, scaling, dropout)


# --- Checks -----------------------------------------------------------------------------------------


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype) for dtype in dtypes)


def _check_float(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} must have one of the dtypes {_names(dtypes)}; got {tensor.dtype}")


def _check_matrix(name: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.dim() != 2:
        raise ValueError(f"{name} must have 2 dimensions; got shape {tuple(tensor.shape)}")
    return tensor.shape[0], tensor.shape[1]


def _check(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must have dtype {dtype}; got {tensor.dtype}")
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}; got {tuple(tensor.shape)}")


def _check_quantized(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_offset: Tensor | None,
    format: str,
    blocksize: int,
    scale_format: str,
    numel: int,
) -> None:
    formats.check_format(format)
    formats.check_blocksize(blocksize)
    _check("packed", packed, torch.uint8, (formats.packed_bytes(numel),))
    blocks = formats.num_blocks(numel, blocksize)
    if nested_absmax is None:
        _check("absmax", absmax, torch.float32, (blocks,))
    else:
        _check_nested(absmax, nested_absmax, nested_offset, scale_format, blocks)


def _check_nested(
    codes: Tensor,
    nested_absmax: Tensor,
    nested_offset: Tensor | None,
    scale_format: str,
    blocks: int,
) -> None:
    formats.check_scale_format(scale_format)
    if nested_offset is None:
        raise ValueError("nested_offset must be given with nested_absmax; got None")
    nested_blocks = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
    _check("absmax", codes, torch.uint8, (blocks,))
    _check("nested_absmax", nested_absmax, torch.float32, (nested_blocks,))
    _check("nested_offset", nested_offset, torch.float32, ())


def _check_dropout(rng: Tensor | None, dropout: float) -> None:
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {dropout}")
    if rng is not None:
        _check("rng", rng, torch.int64, (2,))
    elif dropout:
        raise ValueError(
            "rng must be given, an int64 tensor (seed, offset), where dropout > 0; got None"
        )
