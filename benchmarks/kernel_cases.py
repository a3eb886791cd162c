"""Cases of one tensor or one product: quantize, dequantize, forward, what a launch costs, and which kernel serves.

The yardstick is measured in the same turns: copying as many bytes as a case has to move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

import qlora
from benchmarks import clocks, peers
from benchmarks.clocks import Call
from benchmarks.harness import Case, Contender
from benchmarks.inputs import OURS, Inputs, Variant
from qlora.kernels import formats, ops, reference
from qlora.quantized import QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora.testing import FORWARD_FACTOR, assert_close_to_oracle, relative_rmse

COPY, BITSANDBYTES, TORCHAO, DENSE = "copy of as many bytes", "bitsandbytes", "torchao", "dense"
MOST_TEMPORARY_BYTES = 64 * 2**20

# Shapes [n, k] of what is converted, and the targets: by device, the least ratio of a contender's time to ours.
CONVERTED = {"cpu": [(1536, 576), (4096, 4096)], "cuda": [(8192, 8192), (28672, 8192)]}
QUANTIZE_TARGETS = {"cpu": {BITSANDBYTES: 2.0}, "cuda": {BITSANDBYTES: 2.0}}
QUANTIZE_ON_DEVICE_TARGETS = {COPY: 0.80}
DEQUANTIZE_TARGETS = {"cpu": {}, "cuda": {COPY: 0.90, BITSANDBYTES: 1.3}}

# Tokens m, and the shapes that they are multiplied with.
FORWARD = {
    "cpu": {m: [(1536, 576), (4096, 4096)] for m in (1, 16, 512)},
    "cuda": {
        1: [(4096, 4096), (11008, 4096), (8192, 8192), (28672, 8192)],
        **{m: [(4096, 4096), (28672, 8192)] for m in (2, 4, 16, 32, 128, 512)},
    },
}
FORWARD_TARGETS = (
    (1, {DENSE: 3.2, COPY: 0.75, BITSANDBYTES: 1.3}),
    (16, {DENSE: 2.5, BITSANDBYTES: 1.3}),
    (512, {DENSE: 1 / 1.05, BITSANDBYTES: 1.0}),
)
"""On a GPU: (largest m, targets), ascending."""

LAUNCHED = (1024, 1024)
"""Small, so that the GPU keeps up with the launches and never holds one up."""

CROSSOVER_SHAPE = (8192, 8192)
CROSSOVERS = {
    **dict.fromkeys((8, 16), ("few_tokens", "fused_linear")),
    **dict.fromkeys((64, 512, 1024, 2048), ("fused_linear", "many_tokens")),
}
"""By tokens m, the kernels between which `tuning` chooses at about that m."""


def kernel_cases(device: torch.device, dtypes: Sequence[torch.dtype], quick: bool) -> list[Case]:
    """All cases of this module; with `quick`, of the first shape alone."""
    kind, most = device.type, 1 if quick else None
    variant = partial(Variant, device, quick=quick)
    converted = [variant(dtype, *shape) for shape in CONVERTED[kind][:most] for dtype in dtypes]
    cases = [_quantize_case(v, QUANTIZE_TARGETS[kind]) for v in converted]
    if kind == "cuda":
        cases += [_quantize_on_device_case(v, QUANTIZE_ON_DEVICE_TARGETS) for v in converted]
    cases += [_dequantize_case(v, DEQUANTIZE_TARGETS[kind]) for v in converted]
    cases += [
        _forward_case(variant(dtype, *shape), m)
        for m, shapes in FORWARD[kind].items()
        for shape in shapes[:most]
        for dtype in dtypes
    ]
    if kind == "cuda":
        cases += [_launch_case(variant(dtype, *LAUNCHED)) for dtype in dtypes]
        cases += [
            _crossover_case(variant(dtype, *CROSSOVER_SHAPE), m, names)
            for m, names in list(CROSSOVERS.items())[:most]
            for dtype in dtypes
        ]
    return cases


# --- quantize and dequantize ------------------------------------------------------------------------


def _quantize_case(variant: Variant, targets: Mapping[str, float]) -> Case:
    """The public call. It looks for NaN, so that on a GPU the host waits for the device, and the clock is eager."""
    moved = variant.dense_bytes + variant.nf4_bytes
    contenders = (
        Contender(OURS, lambda i: partial(quantize_4bit, i.original), _check_quantized),
        Contender(
            BITSANDBYTES,
            lambda i: partial(peers.bitsandbytes_quantize, i.original, double_quant=True),
            lambda i, made: _check_quantized(i, peers.from_bitsandbytes(*made)),
            peers.BITSANDBYTES,
        ),
        Contender(
            TORCHAO,
            lambda i: partial(peers.torchao_quantize, i.original),
            lambda i, made: _check_nearest(i, made.get_original_weight().float(), 1.02),
            peers.TORCHAO,
        ),
        _copy_of(moved),
    )
    return variant.case(
        "quantize", contenders, targets, moved, most_temporary_bytes=MOST_TEMPORARY_BYTES
    )


def _quantize_on_device_case(variant: Variant, targets: Mapping[str, float]) -> Case:
    """The kernels alone, without the look for NaN, as a CUDA graph can hold them."""
    moved = variant.dense_bytes + variant.nf4_bytes
    contenders = (
        Contender(OURS, lambda i: partial(_quantize_on_device, i.original), _check_parts),
        _copy_of(moved),
    )
    return variant.case(
        "quantize",
        contenders,
        targets,
        moved,
        ["without the check for NaN"],
        clock=variant.replayed(),
        most_temporary_bytes=MOST_TEMPORARY_BYTES,
    )


def _quantize_on_device(weight: Tensor) -> tuple[Tensor, ...]:
    packed, absmax = ops.quantize_4bit(weight, "nf4", 64)
    return packed, *ops.quantize_absmax(absmax, "dynamic8")


def _check_parts(inputs: Inputs, parts: tuple[Tensor, ...]) -> None:
    shape, dtype = inputs.original.shape, inputs.dtype
    _check_quantized(inputs, QuantizedTensor(*parts, "nf4", 64, "dynamic8", shape, dtype))


def _check_quantized(inputs: Inputs, q: QuantizedTensor) -> None:
    """Scales may be off by a code, which changes little."""
    _check_nearest(inputs, dequantize_4bit(q, torch.float32), 1.001)


def _check_nearest(inputs: Inputs, decoded: Tensor, factor: float) -> None:
    """As near to the original as nearest codes are, up to a factor on the error."""
    packed, absmax = reference.quantize_4bit(inputs.original, "nf4", 64)
    scales = reference.quantize_absmax(absmax, "dynamic8")
    arguments = ("nf4", 64, "dynamic8", list(inputs.original.shape), torch.float32)
    nearest = reference.dequantize_4bit(packed, *scales, *arguments)
    error, allowed = (relative_rmse(t, inputs.original) for t in (decoded, nearest))
    if not error <= factor * allowed:
        raise AssertionError(f"relative error {error:.6f}, the nearest codes have {allowed:.6f}")


def _dequantize_case(variant: Variant, targets: Mapping[str, float]) -> Case:
    moved = variant.dense_bytes + variant.nf4_bytes
    contenders = (
        Contender(OURS, lambda i: partial(dequantize_4bit, i.quantized), _check_dequantized),
        Contender(
            BITSANDBYTES,
            lambda i: partial(
                peers.bitsandbytes_dequantize,
                i.quantized.packed.view(-1, 1),
                peers.bitsandbytes_state(i.quantized, i.dtype),
            ),
            _check_dequantized,
            peers.BITSANDBYTES,
        ),
        Contender(
            TORCHAO, lambda i: i.torchao.get_original_weight, _check_torchao_decoded, peers.TORCHAO
        ),
        _copy_of(moved),
    )
    return variant.case(
        "dequantize",
        contenders,
        targets,
        moved,
        clock=variant.replayed(),
        most_temporary_bytes=MOST_TEMPORARY_BYTES,
    )


def _check_dequantized(inputs: Inputs, decoded: Tensor) -> None:
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
    assert_close_to_oracle(decoded, plain, oracle, FORWARD_FACTOR)


def _check_torchao_decoded(inputs: Inputs, decoded: Tensor) -> None:
    """It rounds the scale twice and the product once more, each to the weight's dtype."""
    error = relative_rmse(decoded, peers.torchao_oracle(inputs.torchao))
    if not error <= 2 * torch.finfo(inputs.dtype).eps:
        raise AssertionError(f"relative error {error:.3e} against what its bytes stand for")


def _copy_of(moved: int) -> Contender:
    """A copy that reads and writes this many bytes together."""

    def prepare(inputs: Inputs) -> Call:
        source = torch.ones(moved // 2, dtype=torch.uint8, device=inputs.original.device)
        return partial(torch.empty_like(source).copy_, source)

    return Contender(COPY, prepare, None)


# --- forward ----------------------------------------------------------------------------------------


def _forward_case(variant: Variant, m: int) -> Case:
    """y = x W^T without an adapter, as in decoding and in evaluation."""
    moved = variant.nf4_bytes + m * (variant.n + variant.k) * variant.dtype.itemsize
    contenders = (*_products(), _copy_of(moved))
    on_gpu = variant.device.type == "cuda"
    return variant.case(
        "forward",
        contenders,
        next(targets for largest, targets in FORWARD_TARGETS if m <= largest) if on_gpu else {},
        moved,
        [f"{m} token{'s' * (m > 1)}"],
        m,
        clock=variant.replayed(),
        gradients=False,
        operations=2 * m * variant.n * variant.k,
        most_temporary_bytes=MOST_TEMPORARY_BYTES,
    )


def _launch_case(variant: Variant) -> Case:
    """What the host spends on an eager call at m = 1, of many that the device does not hold up."""
    case = variant.case("launch", _products(), {}, variant.nf4_bytes, ["1 token"])
    return replace(case, clock=clocks.HOST, gradients=False, bytes_moved=None)


def _crossover_case(variant: Variant, m: int, names: Sequence[str]) -> Case:
    """The kernel that `tuning` chooses, as ours, beside each of those that it has to choose from."""
    moved = variant.nf4_bytes + m * (variant.n + variant.k) * variant.dtype.itemsize
    ours, *_ = _products()
    kernels = [Contender(name, partial(_by_kernel, name), _check_forward) for name in names]
    return variant.case(
        "crossover",
        (ours, *kernels),
        {},
        moved,
        [f"{m} tokens"],
        m,
        clock=variant.replayed(),
        gradients=False,
        operations=2 * m * variant.n * variant.k,
    )


def _by_kernel(name: str, inputs: Inputs) -> Call:
    """The product by one kernel; the adapter has rank 0, as where there is none."""
    kernel = import_module(f"qlora.kernels.{name}")  # needs triton, which not every platform has
    x, q = inputs.x, inputs.quantized
    h, lora_b = x.new_empty(len(x), 0), x.new_empty(inputs.n, 0)
    weight = (q.packed, q.absmax, q.nested_absmax, q.nested_offset)
    formats_of = (q.format, q.blocksize, q.scale_format)
    return partial(kernel.forward, x, *weight, None, h, lora_b, 1.0, *formats_of)


def _products() -> tuple[Contender, ...]:
    return (
        Contender(OURS, lambda i: partial(qlora.qlora_linear, i.x, i.quantized), _check_forward),
        Contender(
            BITSANDBYTES,
            # In eval it computes in bf16 on some CPUs, whatever it was asked for; in training mode it does not.
            lambda i: partial(
                peers.bitsandbytes_linear(i.quantized, i.dtype).train(i.dtype == torch.float32), i.x
            ),
            _check_forward,
            peers.BITSANDBYTES,
        ),
        Contender(
            TORCHAO, lambda i: partial(F.linear, i.x, i.torchao), _check_torchao, peers.TORCHAO
        ),
        Contender(DENSE, lambda i: partial(F.linear, i.x, i.dense), _check_forward),
    )


def _check_forward(inputs: Inputs, y: Tensor) -> None:
    """The oracle has the weight that the bytes stand for: to round it is part of the error that is allowed."""
    _check_product(inputs, y, dequantize_4bit(inputs.quantized, torch.float32), inputs.dense)


def _check_torchao(inputs: Inputs, y: Tensor) -> None:
    """Against its own weight, as it decodes."""
    weight = inputs.torchao.get_original_weight()
    _check_product(inputs, y, weight, weight)


def _check_product(inputs: Inputs, y: Tensor, exact: Tensor, weight: Tensor) -> None:
    oracle = F.linear(inputs.x.double(), exact.double())
    assert_close_to_oracle(y, F.linear(inputs.x, weight), oracle, FORWARD_FACTOR)
