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
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qlora.kernels import checks, cpu, formats

WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
COMPUTE_DTYPES = (*WEIGHT_DTYPES, torch.float64)  # fp64 for gradcheck and as an oracle

_SCALES = "Tensor absmax, Tensor? nested_absmax, Tensor? nested_offset"
_FORMAT = "str format, int blocksize, str scale_format"


def _define(schema: str, cuda_module: str, fake: Callable[..., Any]) -> None:
    """Register `qlora::schema` with the implementations of that name in `cpu` and in `cuda_module`."""
    name = schema.partition("(")[0]

    # No op has autograd: an exported program, say, calls one where gradients are recorded.
    @torch.no_grad()
    def on_cpu(*args: Any) -> Any:
        return getattr(cpu, name)(*args)

    @torch.no_grad()
    def on_cuda(*args: Any) -> Any:
        return getattr(importlib.import_module(f"qlora.kernels.{cuda_module}"), name)(*args)

    torch.library.define(f"qlora::{name}", schema.removeprefix(name))
    torch.library.impl(f"qlora::{name}", "CPU")(on_cpu)
    torch.library.impl(f"qlora::{name}", "CUDA")(on_cuda)
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
    checks.check_float("x", x, WEIGHT_DTYPES)
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
    scales = {"nested_absmax": nested_absmax, "nested_offset": nested_offset}
    checks.check_devices(packed=packed, absmax=absmax, **scales)
    checks.check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, numel
    )
    if dtype not in COMPUTE_DTYPES:
        raise TypeError(f"dtype must be one of {checks.names(COMPUTE_DTYPES)}; got {dtype}")
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
    checks.check_tensor("absmax", absmax, torch.float32, (absmax.numel(),))
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
    checks.check_devices(codes=codes, nested_absmax=nested_absmax, nested_offset=nested_offset)
    checks.check_nested("codes", codes, nested_absmax, nested_offset, scale_format, codes.numel())
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
    "linear",
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
    checks.check_float("x", x, COMPUTE_DTYPES)
    _, k = checks.check_matrix("x", x)
    rank, _ = checks.check_matrix("lora_a", lora_a)
    n, _ = checks.check_matrix("lora_b", lora_b)
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    adapter = {"bias": bias, "lora_a": lora_a, "lora_b": lora_b, "rng": rng}
    checks.check_devices(x=x, packed=packed, **scales, **adapter)
    checks.check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, n * k
    )
    checks.check_tensor("lora_a", lora_a, x.dtype, (rank, k))
    checks.check_tensor("lora_b", lora_b, x.dtype, (n, rank))
    if bias is not None:
        checks.check_tensor("bias", bias, x.dtype, (n,))
    checks.check_dropout(rng, dropout)
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
    "linear",
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
    checks.check_float("grad_y", grad_y, COMPUTE_DTYPES)
    m, n = checks.check_matrix("grad_y", grad_y)
    rank, k = checks.check_matrix("lora_a", lora_a)
    scales = {"absmax": absmax, "nested_absmax": nested_absmax, "nested_offset": nested_offset}
    checks.check_devices(grad_y=grad_y, g=g, packed=packed, **scales, lora_a=lora_a, rng=rng)
    checks.check_tensor("g", g, grad_y.dtype, (m, rank))
    checks.check_tensor("lora_a", lora_a, grad_y.dtype, (rank, k))
    checks.check_quantized(
        packed, absmax, nested_absmax, nested_offset, format, blocksize, scale_format, n * k
    )
    checks.check_dropout(rng, dropout)
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
    "lora",
    _fake_lora_project,
)


def lora_project(x: Tensor, weight: Tensor, rng: Tensor | None, dropout: float) -> Tensor:
    """dropout(x) weight^T: see `reference.lora_project`."""
    checks.check_float("x", x, COMPUTE_DTYPES)
    _, k = checks.check_matrix("x", x)
    rank, _ = checks.check_matrix("weight", weight)
    checks.check_devices(x=x, weight=weight, rng=rng)
    checks.check_tensor("weight", weight, x.dtype, (rank, k))
    checks.check_dropout(rng, dropout)
    return torch.ops.qlora.lora_project(x, weight, rng, dropout)


def _fake_lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    return left.new_empty(left.shape[1], right.shape[1])


_define(
    "lora_grad(Tensor left, Tensor right, Tensor? rng, float scaling, float dropout) -> Tensor",
    "lora",
    _fake_lora_grad,
)


def lora_grad(
    left: Tensor, right: Tensor, rng: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """scaling * left^T dropout(right): see `reference.lora_grad`."""
    checks.check_float("left", left, COMPUTE_DTYPES)
    m, _ = checks.check_matrix("left", left)
    _, j = checks.check_matrix("right", right)
    checks.check_devices(left=left, right=right, rng=rng)
    checks.check_tensor("right", right, left.dtype, (m, j))
    checks.check_dropout(rng, dropout)
    return torch.ops.qlora.lora_grad(left, right, rng, scaling, dropout)


# --- The optimizer ----------------------------------------------------------------------------------

_define(
    "adamw(Tensor(a!)[] params, Tensor?[] grads, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq,"
    " Tensor(d!)? exp_avg_absmax, Tensor(e!)? exp_avg_sq_absmax, Tensor scalars, Tensor? rng) -> ()",
    "adamw",
    lambda *arguments: None,
)


@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_absmax: Tensor | None,
    exp_avg_sq_absmax: Tensor | None,
    scalars: Tensor,
    rng: Tensor | None,
) -> None:
    """One step of AdamW in place, for all params at once: see `reference_adamw.adamw`."""
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    absmax = {"exp_avg_absmax": exp_avg_absmax, "exp_avg_sq_absmax": exp_avg_sq_absmax}
    checks.check_adamw(params, grads, states, absmax, scalars, rng, WEIGHT_DTYPES)
    if params:
        torch.ops.qlora.adamw(params, grads, *states.values(), *absmax.values(), scalars, rng)
