"""Cases of one tensor or one layer: quantize, dequantize, forward, and forward with backward.

The yardsticks are measured in the same turns: copying as many bytes as a format conversion has to move, and
the dense matrix products alone where a layer is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qlora
from benchmarks import peers
from benchmarks.harness import Call, Case, Contender
from qlora.kernels import formats, reference
from qlora.modules import LoRALinear, QLoRALinear
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_close_to_oracle, relative_rmse

RANK, ALPHA = 64, 16.0

_SETS_BYTES, _MOST_SETS = 256 * 2**20, 8
"""Input sets of a case: as many as take this many bytes (far more than a cache), from 2 up to so many."""

_SHAPES = {
    "cpu": [(1536, 576), (4096, 4096)],
    "cuda": [(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)],
}
_TOKENS = {"cpu": (512,), "cuda": (512, 2048, 8192)}
_DECODED_TOKENS = (1, 16)


def kernel_cases(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> list[Case]:
    """All cases of this module; with `quick`, of the smallest shape alone."""
    shapes, tokens = _SHAPES[device.type], _TOKENS[device.type]
    if quick:
        shapes, tokens = shapes[:1], tokens[:1]
    variants = [
        _Variant(device, dtype, *shape, quick=quick) for shape in shapes for dtype in dtypes
    ]
    cases = [_quantize_case(variant) for variant in variants]
    cases += [_dequantize_case(variant) for variant in variants]
    cases += [_forward_case(v, m) for v in variants for m in (*_DECODED_TOKENS, *tokens)]
    return cases + [_training_case(variant, m) for variant in variants for m in tokens]


@dataclass(frozen=True)
class _Variant:
    """A weight's shape, and where and in what it is computed with."""

    device: torch.device
    dtype: torch.dtype
    n: int
    k: int
    quick: bool

    @property
    def input_sets(self) -> int:
        fitting = _SETS_BYTES // (self.n * self.k * self.dtype.itemsize)
        return 2 if self.quick else max(2, min(_MOST_SETS, fitting))

    def case(
        self,
        group: str,
        check: Callable[[Inputs, list[Tensor]], None],
        contenders: Sequence[Contender],
        m: int = 1,
        rank: int = 0,
    ) -> Case:
        dtype = str(self.dtype).removeprefix("torch.")
        words = [f"{self.n} x {self.k}", dtype]
        words += [f"{m} token{'s' * (m > 1)}"] * (group in ("forward", "layer"))
        words += [f"rank {rank}"] * (rank > 0)
        return Case(
            group=group,
            name=", ".join(words),
            parameters={"n": self.n, "k": self.k, "m": m, "rank": rank, "dtype": dtype},
            inputs=partial(Inputs, self.device, self.dtype, self.n, self.k, m),
            check=check,
            contenders=contenders,
            input_sets=self.input_sets,
        )


class Inputs:
    """Random tensors of a case, and what follows from them, each made when it is first asked for."""

    def __init__(
        self, device: torch.device, dtype: torch.dtype, n: int, k: int, m: int, seed: int
    ) -> None:
        self.dtype, self.n, self.k = dtype, n, k
        generator = torch.Generator(device).manual_seed(seed)
        normal = partial(torch.randn, generator=generator, device=device)
        self.original = normal(n, k).div_(k**0.5).to(dtype)
        self.x, self.grad_y = normal(m, k).to(dtype), normal(m, n).to(dtype)
        self.lora_a, self.lora_b = normal(RANK, k) / k**0.5, normal(n, RANK) / RANK**0.5

    @cached_property
    def quantized(self) -> QuantizedTensor:
        return quantize_4bit(self.original)

    @cached_property
    def dense(self) -> Tensor:
        """The decoded weight."""
        return dequantize_4bit(self.quantized)

    @cached_property
    def linear(self) -> nn.Linear:
        """A dense layer with the decoded weight."""
        linear = nn.Linear(self.k, self.n, bias=False, device="meta")
        linear.weight = nn.Parameter(self.dense, requires_grad=False)
        return linear

    @cached_property
    def config(self) -> qlora.QLoRAConfig:
        return qlora.QLoRAConfig(rank=RANK, alpha=ALPHA)


# --- quantize and dequantize ------------------------------------------------------------------------


def _quantize_case(variant: _Variant) -> Case:
    contenders = (
        Contender("qlora", lambda i: partial(quantize_4bit, i.original), tensors=_decoded),
        Contender(
            "bitsandbytes",
            lambda i: partial(peers.bitsandbytes_quantize, i.original, double_quant=True),
            peers.BITSANDBYTES,
            tensors=lambda result: _decoded(peers.from_bitsandbytes(*result)),
        ),
        Contender("copy of as many bytes", _copy_as_many_bytes, tensors=None),
    )
    return variant.case("quantize", _check_quantized, contenders)


def _decoded(q: QuantizedTensor) -> list[Tensor]:
    return [dequantize_4bit(q, torch.float32)]


def _check_quantized(inputs: Inputs, tensors: list[Tensor]) -> None:
    """As near to the original as nearest codes are; scales may be off by a code, which changes little."""
    packed, absmax = reference.quantize_4bit(inputs.original, "nf4", 64)
    scales = reference.quantize_absmax(absmax, "dynamic8")
    arguments = ("nf4", 64, "dynamic8", list(inputs.original.shape), torch.float32)
    nearest = reference.dequantize_4bit(packed, *scales, *arguments)
    error, allowed = (relative_rmse(t, inputs.original) for t in (tensors[0], nearest))
    if not error <= 1.001 * allowed:
        raise AssertionError(f"relative error {error:.6f}, the nearest codes have {allowed:.6f}")


def _dequantize_case(variant: _Variant) -> Case:
    contenders = (
        Contender("qlora", lambda i: partial(dequantize_4bit, i.quantized), tensors=_alone),
        Contender(
            "bitsandbytes",
            lambda i: partial(
                peers.bitsandbytes_dequantize,
                i.quantized.packed.view(-1, 1),
                peers.bitsandbytes_state(i.quantized, i.dtype),
            ),
            peers.BITSANDBYTES,
            tensors=_alone,
        ),
        Contender("copy of as many bytes", _copy_as_many_bytes, tensors=None),
    )
    return variant.case("dequantize", _check_dequantized, contenders)


def _alone(tensor: Tensor) -> list[Tensor]:
    return [tensor]


def _check_dequantized(inputs: Inputs, tensors: list[Tensor]) -> None:
    q = inputs.quantized
    arguments = (q.format, q.blocksize, q.scale_format, list(q.shape))
    scales = (q.absmax, q.nested_absmax, q.nested_offset)
    plain = reference.dequantize_4bit(q.packed, *scales, *arguments, inputs.dtype)
    # In fp64: the scales as they decode, times the codebook's values, which come out at a scale of one.
    ones = torch.ones(q.absmax.shape, device=q.device)
    values = reference.dequantize_4bit(q.packed, ones, None, None, *arguments, torch.float64)
    nested = q.nested_absmax.double().repeat_interleave(formats.NESTED_BLOCKSIZE)[: len(q.absmax)]
    codes = formats.scale_codebook(q.scale_format, q.device).double()[q.absmax.long()]
    absmax = codes * nested + q.nested_offset.double()
    oracle = (values.view(-1, q.blocksize) * absmax[:, None]).view(q.shape)
    assert_close_to_oracle(tensors[0], plain, oracle, FORWARD_FACTOR)


def _copy_as_many_bytes(inputs: Inputs) -> Call:
    """A copy that reads and writes, together, the bytes of the dense and of the quantized weight."""
    moved = inputs.original.nbytes + inputs.quantized.nbytes
    source = torch.zeros(moved // 2, dtype=torch.uint8, device=inputs.original.device)
    return partial(torch.empty_like(source).copy_, source)


# --- The layer --------------------------------------------------------------------------------------


def _forward_case(variant: _Variant, m: int) -> Case:
    """y = x W^T without an adapter, as in decoding and in evaluation."""
    contenders = (
        Contender("qlora", lambda i: partial(qlora.qlora_linear, i.x, i.quantized), tensors=_alone),
        Contender(
            "bitsandbytes",
            # In eval it computes in bf16 on some CPUs, whatever it was asked for; in training mode it does not.
            lambda i: partial(
                peers.bitsandbytes_linear(i.quantized, i.dtype).train(i.dtype == torch.float32), i.x
            ),
            peers.BITSANDBYTES,
            tensors=_alone,
        ),
        Contender("dense", lambda i: partial(F.linear, i.x, i.dense), tensors=_alone),
    )
    return variant.case("forward", _check_forward, tuple(map(_without_grad, contenders)), m)


def _without_grad(contender: Contender) -> Contender:
    def prepare(inputs: Inputs) -> Call:
        return torch.no_grad()(contender.prepare(inputs))

    return Contender(contender.name, prepare, contender.requires, contender.tensors)


def _check_forward(inputs: Inputs, tensors: list[Tensor]) -> None:
    plain = F.linear(inputs.x, inputs.dense)
    oracle = F.linear(inputs.x.double(), inputs.dense.double())
    assert_close_to_oracle(tensors[0], plain, oracle, FORWARD_FACTOR)


def _training_case(variant: _Variant, m: int) -> Case:
    """y, and the gradients of x, A and B."""
    contenders = (
        Contender("qlora", _ours),
        Contender("PEFT over bitsandbytes", _peft, peers.PEFT_OVER_BITSANDBYTES),
        Contender("LoRA over dense", _dense_lora),
        Contender("dense products alone", _dense_products, tensors=None),
    )
    return variant.case("layer", _check_training, contenders, m, RANK)


def _ours(inputs: Inputs) -> Call:
    layer = QLoRALinear.from_linear(inputs.linear, inputs.config, quantized=inputs.quantized)
    return _forward_backward(inputs, layer, layer.lora_a, layer.lora_b)


def _dense_lora(inputs: Inputs) -> Call:
    layer = LoRALinear.from_linear(inputs.linear, inputs.config)
    return _forward_backward(inputs, layer, layer.lora_a, layer.lora_b)


def _peft(inputs: Inputs) -> Call:
    base = peers.bitsandbytes_linear(inputs.quantized, inputs.dtype)
    layer = peers.peft_layer(base, RANK, ALPHA)
    return _forward_backward(inputs, layer, *peers.peft_adapter(layer))


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


def _dense_products(inputs: Inputs) -> Call:
    def call() -> tuple[Tensor, Tensor]:
        return inputs.x @ inputs.dense.mT, inputs.grad_y @ inputs.dense

    return call


def _check_training(inputs: Inputs, tensors: list[Tensor]) -> None:
    factors = [FORWARD_FACTOR] + [GRADIENT_FACTOR] * 3
    plain, oracle = _plain_training(inputs, inputs.dtype), _plain_training(inputs, torch.float64)
    for tensor, expected, exact, factor in zip(tensors, plain, oracle, factors, strict=True):
        assert_close_to_oracle(tensor, expected, exact, factor)


def _plain_training(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """Autograd over plain products in `dtype`. The adapter is fp32, or fp64 for the oracle."""
    master = torch.promote_types(dtype, torch.float32)
    adapter = [t.to(master).requires_grad_() for t in (inputs.lora_a, inputs.lora_b)]
    weight = inputs.dense.to(dtype)

    def layer(x: Tensor) -> Tensor:
        lora_a, lora_b = (t.to(dtype) for t in adapter)
        return F.linear(x, weight) + ALPHA / RANK * F.linear(F.linear(x, lora_a), lora_b)

    return _gradients_of(layer, inputs.x.to(dtype), inputs.grad_y.to(dtype), *adapter)()
