"""The calls whose kernels `benchmarks.static` compiles: real launchers on `meta` tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor

from qlora.kernels import adamw, double_quant, formats, linear, lora, nf4

N, K, RANK = 11008, 4096, 64
"""Out and in features of a LLaMA-7B layer, and the paper's rank."""

TOKENS = (1, 16, 64, 512, 4096)
"""Few, in between and many."""

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Case:
    """A name, and a call of launchers."""

    name: str
    call: Callable[[], object]


def cases(every: bool = False) -> list[Case]:
    """A few cases per kernel; with `every`, all dtypes, scales, token counts, ranks and block sizes."""
    if not every:
        return [
            *_blockwise(torch.bfloat16, 64),
            *(_forward(torch.bfloat16, m) for m in TOKENS),
            _forward(torch.bfloat16, 4096, n=32001),  # a width of no power of two spilled once
            *(_grad_x(torch.bfloat16, m, 0.05) for m in TOKENS),
            _adapter(torch.bfloat16, 0.05),
            _forward(torch.float16, 512, nested=False),
            _grad_x(torch.float16, 512, 0.0, nested=False),
            _adapter(torch.float16, 0.0),
            _forward(torch.float32, 512),
            _grad_x(torch.float32, 512, 0.05),
            *(_adamw(dtype, bits) for dtype in (torch.float32, torch.bfloat16) for bits in (32, 8)),
        ]
    found: list[Case] = []
    for dtype in DTYPE_NAMES:
        for blocksize in formats.BLOCKSIZES:
            found += _blockwise(dtype, blocksize)
            # These rows are multiples of 32, not of every block size: blocks straddle them.
            found.append(_forward(dtype, 4096, blocksize=blocksize, k=K + 32))
        for m, nested in product(TOKENS, (True, False)):
            found.append(_forward(dtype, m, nested=nested))
            found += [_grad_x(dtype, m, dropout, nested=nested) for dropout in (0.0, 0.05)]
        for rank, dropout in product((8, RANK, 256), (0.0, 0.05)):
            found.append(_adapter(dtype, dropout, rank=rank))
        found += [_adamw(dtype, bits) for bits in (32, 8)]
        for rank in (8, 256):
            found += [_forward(dtype, 4096, rank=rank), _grad_x(dtype, 4096, 0.05, rank=rank)]
    return found


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _weight(n: int, k: int, blocksize: int, nested: bool) -> tuple[Tensor | None, ...]:
    """packed, absmax, nested_absmax, nested_offset of an [n, k] weight."""
    blocks = formats.num_blocks(n * k, blocksize)
    packed = _empty(formats.packed_bytes(n * k), dtype=torch.uint8)
    if not nested:
        return packed, _empty(blocks, dtype=torch.float32), None, None
    nested_blocks = formats.num_blocks(blocks, formats.NESTED_BLOCKSIZE)
    return (
        packed,
        _empty(blocks, dtype=torch.uint8),
        _empty(nested_blocks, dtype=torch.float32),
        _empty(dtype=torch.float32),
    )


def _blockwise(dtype: torch.dtype, blocksize: int) -> list[Case]:
    """Quantize and dequantize, of weights and of scales."""
    name, shape = f"{DTYPE_NAMES[dtype]} blocksize={blocksize}", [N, K]
    plain, nested = _weight(N, K, blocksize, False), _weight(N, K, blocksize, True)
    dequantize = partial(
        nf4.dequantize_4bit, format="nf4", blocksize=blocksize, shape=shape, dtype=dtype
    )
    return [
        Case(name, partial(nf4.quantize_4bit, _empty(N, K, dtype=dtype), "nf4", blocksize)),
        Case(f"{name} plain", partial(dequantize, *plain, scale_format="")),
        Case(f"{name} nested", partial(dequantize, *nested, scale_format="dynamic8")),
        Case("absmax", partial(double_quant.quantize_absmax, plain[1], "dynamic8")),
        Case("absmax", partial(double_quant.dequantize_absmax, *nested[1:], "dynamic8")),
    ]


def _forward(
    dtype: torch.dtype,
    m: int,
    nested: bool = True,
    rank: int = RANK,
    blocksize: int = 64,
    n: int | None = None,
    k: int = K,
) -> Case:
    """The projection on the rank, and the layer's forward."""
    n = n or N

    def call() -> None:
        linear.qlora_forward(
            _empty(m, k, dtype=dtype),
            *_weight(n, k, blocksize, nested),
            _empty(n, dtype=dtype),
            _empty(rank, k, dtype=dtype),
            _empty(n, rank, dtype=dtype),
            None,
            0.25,
            0.0,
            "nf4",
            blocksize,
            "dynamic8" if nested else "",
        )

    scales = "nested" if nested else "plain"
    return Case(f"{DTYPE_NAMES[dtype]} m={m} k={k} r={rank} blocksize={blocksize} {scales}", call)


def _grad_x(
    dtype: torch.dtype, m: int, dropout: float, nested: bool = True, rank: int = RANK
) -> Case:
    """The layer's input gradient."""

    def call() -> None:
        linear.qlora_grad_x(
            _empty(m, N, dtype=dtype),
            _empty(m, rank, dtype=dtype),
            *_weight(N, K, 64, nested),
            _empty(rank, K, dtype=dtype),
            _empty(2, dtype=torch.int64) if dropout else None,
            0.25,
            dropout,
            "nf4",
            64,
            "dynamic8" if nested else "",
        )

    scales = "nested" if nested else "plain"
    return Case(f"{DTYPE_NAMES[dtype]} m={m} r={rank} dropout={dropout} {scales}", call)


def _adapter(dtype: torch.dtype, dropout: float, rank: int = RANK) -> Case:
    """The adapter's products: h of x, g of grad_y, the gradients of A and B."""

    def call() -> None:
        m = 4096
        rng = _empty(2, dtype=torch.int64) if dropout else None
        x, grad_y, h = (_empty(m, width, dtype=dtype) for width in (K, N, rank))
        lora.lora_project(x, _empty(rank, K, dtype=dtype), rng, dropout)
        g = lora.lora_project(grad_y, _empty(N, rank, dtype=dtype).mT, None, 0.0)
        lora.lora_grad(g, x, rng, 0.25, dropout)
        lora.lora_grad(grad_y, h, None, 0.25, 0.0)

    return Case(f"{DTYPE_NAMES[dtype]} r={rank} dropout={dropout}", call)


def _adamw(dtype: torch.dtype, bits: int, rank: int = RANK) -> Case:
    """A step for the two factors of an adapter; bf16 is rounded stochastically."""

    def call() -> None:
        shapes = [(rank, K), (N, rank)]
        params = [_empty(*shape, dtype=dtype) for shape in shapes]
        grads = [_empty(*shape, dtype=dtype) for shape in shapes]
        elements = sum(formats.state_tiles(n * k) for n, k in shapes) * formats.STATE_TILE
        held = torch.float32 if bits == 32 else torch.uint8
        states = [_empty(elements, dtype=held) for _ in range(2)]
        blocks = elements // formats.STATE_BLOCKSIZE
        scales = [_empty(blocks, dtype=torch.float32) if bits == 8 else None for _ in range(2)]
        scalars, rng = torch.ones(len(shapes), 7), torch.tensor([7, 11])
        adamw.adamw(params, grads, *states, *scales, scalars, rng)

    return Case(f"{DTYPE_NAMES[dtype]} r={rank} {bits} bits", call)
