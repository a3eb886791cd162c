"""Cases of one linear layer with an adapter: its result, and the gradients of x, A and B.

Each contender draws its own dropout. The check draws it again from the same seed, and holds the contender to
the fp64 oracle under that very mask. On a GPU both passes are replayed from a CUDA graph: from Python, the launches
would take as long as the work of a short layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import clocks, peers
from benchmarks.clocks import Call
from benchmarks.harness import CHECK_SEED, Case, Contender
from benchmarks.inputs import ALPHA, OURS, RANK, SCALING, Inputs, Variant
from benchmarks.kernel_cases import LAUNCHED, MOST_TEMPORARY_BYTES
from qlora import QLoRAConfig
from qlora.kernels import reference
from qlora.modules import QLoRALinear
from qlora.quantized import dequantize_4bit
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle

PEFT, BY_HAND = "PEFT over bitsandbytes", "LoRA over dense, by hand"
DECODED, TORCHAO = "dequantize + addmm", "LoRA over torchao"

# Tokens m, and the shapes [n, k] that they are multiplied with: few, where a call takes many milliseconds.
LAYER = {
    "cpu": {512: [(1536, 576), (4096, 4096)]},
    "cuda": {
        2048: [(4096, 4096), (28672, 8192)],
        8192: [(4096, 4096), (11008, 4096)],
        16384: [(4096, 4096)],
    },
}
LAUNCHED_TOKENS = 128
DROPOUT = {"cpu": (0.0,), "cuda": (0.0, 0.05)}
TARGETS = {"cpu": {PEFT: 1.0}, "cuda": {BY_HAND: 0.90, PEFT: 1.25, DECODED: 1.1}}
"""By device, the least ratio of a contender's time to ours."""


def layer_cases(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> list[Case]:
    """All of them; with `quick`, of the first number of tokens and the first shape alone."""
    most = 1 if quick else None
    cases = [
        layer_case(Variant(device, dtype, *shape, quick=quick), m, dropout)
        for m, shapes in list(LAYER[device.type].items())[:most]
        for shape in shapes[:most]
        for dtype in dtypes
        for dropout in DROPOUT[device.type]
    ]
    if device.type == "cuda":
        cases += [_launch_case(Variant(device, dtype, *LAUNCHED, quick=quick)) for dtype in dtypes]
    return cases


def layer_case(variant: Variant, m: int, dropout: float) -> Case:
    """y, and the gradients of x, A and B, at one number of tokens."""
    contender = partial(_contender, dropout)
    contenders = (
        contender(OURS, _ours, _our_mask),
        contender(PEFT, _peft, _peft_mask, peers.PEFT_OVER_BITSANDBYTES),
        contender(TORCHAO, _torchao, _torch_mask, peers.TORCHAO, lambda i: i.torchao.to(i.dtype)),
        contender(DECODED, partial(_by_hand, lambda i: dequantize_4bit(i.quantized)), _hand_mask),
        contender(BY_HAND, partial(_by_hand, lambda i: i.dense), _hand_mask),
        Contender("dense products alone", _dense_products, None),
    )
    n, k, item = variant.n, variant.k, variant.dtype.itemsize
    return variant.case(
        "layer",
        contenders,
        TARGETS[variant.device.type],
        # x, grad_y and their like come out; A and B are fp32, and so are their gradients.
        variant.nf4_bytes + 2 * (n + k) * (m * item + 4 * RANK),
        [f"{m} tokens", f"rank {RANK}", *[f"dropout {dropout:g}"] * (dropout > 0)],
        m,
        RANK,
        {"dropout": dropout},
        clock=variant.replayed(),
        draws=dropout > 0,
        operations=4 * m * n * k + 6 * m * RANK * (n + k),
        most_temporary_bytes=MOST_TEMPORARY_BYTES,
    )


def _launch_case(variant: Variant) -> Case:
    """What the host spends on both passes, of a layer so small that the device does not hold it up."""
    case = layer_case(variant, LAUNCHED_TOKENS, 0.0)
    alone = {"bytes_moved": None, "operations": None, "most_temporary_bytes": None, "targets": {}}
    name = f"{case.name}, both passes"
    return replace(case, group="launch", name=name, clock=clocks.HOST, input_sets=2, **alone)


def _contender(
    dropout: float,
    name: str,
    prepare: Callable[[float, Inputs], Call],
    mask: Callable[[Inputs, float], Tensor],
    requires: tuple[str, ...] = (),
    weight: Callable[[Inputs], Tensor] = lambda i: i.dense,
) -> Contender:
    """One that is held to the oracle over `weight`, under the dropout that `mask` draws."""

    def check(inputs: Inputs, tensors: Sequence[Tensor]) -> None:
        keep = None
        if dropout:
            torch.manual_seed(CHECK_SEED)
            keep = mask(inputs, dropout).double() / (1 - dropout)
        expected = partial(_plain, inputs, weight(inputs), keep)
        factors = [FORWARD_FACTOR] + [GRADIENT_FACTOR] * 3
        plain, oracle = expected(inputs.dtype), expected(torch.float64)
        for tensor, near, exact, factor in zip(tensors, plain, oracle, factors, strict=True):
            assert_close_to_oracle(tensor, near, exact, factor)

    return Contender(name, partial(prepare, dropout), check, requires)


def _plain(inputs: Inputs, weight: Tensor, keep: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """Autograd over plain products in `dtype`. The adapter is fp32, or fp64 for the oracle."""
    master = torch.promote_types(dtype, torch.float32)
    adapter = [t.to(master).requires_grad_() for t in (inputs.lora_a, inputs.lora_b)]
    weight = weight.to(dtype)

    def layer(x: Tensor) -> Tensor:
        lora_a, lora_b = (t.to(dtype) for t in adapter)
        dropped = x if keep is None else (x * keep).to(dtype)
        return F.linear(x, weight) + SCALING * F.linear(F.linear(dropped, lora_a), lora_b)

    return _gradients_of(layer, inputs.x.to(dtype), inputs.grad_y.to(dtype), *adapter)()


# --- Through autograd -------------------------------------------------------------------------------


def _ours(dropout: float, inputs: Inputs) -> Call:
    config = QLoRAConfig(rank=RANK, alpha=ALPHA, dropout=dropout)
    layer = QLoRALinear.from_linear(inputs.linear, config, quantized=inputs.quantized)
    return _forward_backward(inputs, layer, layer.lora_a, layer.lora_b)


def _our_mask(inputs: Inputs, dropout: float) -> Tensor:
    rng = torch.randint(2**31, (2,), device=inputs.x.device)
    return reference.dropout_mask(rng, *inputs.x.shape, dropout)


def _peft(dropout: float, inputs: Inputs) -> Call:
    base = peers.bitsandbytes_linear(inputs.quantized, inputs.dtype)
    layer = peers.peft_layer(base, RANK, ALPHA, dropout)
    call = _forward_backward(inputs, layer, *peers.peft_adapter(layer))
    return peers.autocast(inputs.x.device, inputs.dtype)(call)


def _peft_mask(inputs: Inputs, dropout: float) -> Tensor:
    """It casts x to the adapter's fp32 first."""
    return F.dropout(torch.ones_like(inputs.x, dtype=torch.float32), dropout) != 0


def _torchao(dropout: float, inputs: Inputs) -> Call:
    lora_a, lora_b = (t.clone().requires_grad_() for t in (inputs.lora_a, inputs.lora_b))

    def layer(x: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, dropout), lora_a.to(x.dtype))
        return F.linear(x, inputs.torchao) + SCALING * F.linear(h, lora_b.to(x.dtype))

    return _gradients_of(layer, inputs.x, inputs.grad_y, lora_a, lora_b)


def _torch_mask(inputs: Inputs, dropout: float) -> Tensor:
    return F.dropout(torch.ones_like(inputs.x), dropout) != 0


def _forward_backward(
    inputs: Inputs, layer: nn.Module, lora_a: nn.Parameter, lora_b: nn.Parameter
) -> Call:
    lora_a.data, lora_b.data = inputs.lora_a.clone(), inputs.lora_b.clone()
    return _gradients_of(layer.train(), inputs.x, inputs.grad_y, lora_a, lora_b)


def _gradients_of(
    layer: Callable[[Tensor], Tensor], x: Tensor, grad_y: Tensor, *adapter: Tensor
) -> Call:
    leaf = x.clone().requires_grad_()

    def call() -> list[Tensor]:
        y = layer(leaf)
        return [y.detach(), *torch.autograd.grad(y, (leaf, *adapter), grad_y)]

    return call


# --- Written out by hand ----------------------------------------------------------------------------


def _by_hand(weight: Callable[[Inputs], Tensor], dropout: float, inputs: Inputs) -> Call:
    """The products of both passes without autograd; `weight` gives W [n, k] for each pass."""

    @torch.no_grad()
    def call() -> list[Tensor]:
        x, grad_y = inputs.x, inputs.grad_y
        lora_a, lora_b = (t.to(x.dtype) for t in (inputs.lora_a, inputs.lora_b))
        dropped, keep = torch.native_dropout(x, dropout, True) if dropout else (x, None)
        h = dropped @ lora_a.mT
        y = (x @ weight(inputs).mT).addmm_(h, lora_b.mT, alpha=SCALING)
        g = grad_y @ lora_b
        grad_x = grad_y @ weight(inputs)
        if keep is None:
            grad_x.addmm_(g, lora_a, alpha=SCALING)
        else:
            back = torch.ops.aten.native_dropout_backward(g @ lora_a, keep, 1 / (1 - dropout))
            grad_x.add_(back, alpha=SCALING)
        grad_a, grad_b = g.mT @ dropped, grad_y.mT @ h
        return [y, grad_x, SCALING * grad_a.float(), SCALING * grad_b.float()]

    return call


def _hand_mask(inputs: Inputs, dropout: float) -> Tensor:
    return torch.native_dropout(torch.ones_like(inputs.x), dropout, True)[1]


def _dense_products(inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        return inputs.x @ inputs.dense.mT, inputs.grad_y @ inputs.dense

    return call
