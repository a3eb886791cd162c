"""The door: schemas, fake implementations, dispatch to both backends, and what it refuses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora.kernels import cpu, formats, ops, reference

OPS = (
    "dequantize_4bit",
    "dequantize_absmax",
    "lora_grad",
    "lora_project",
    "qlora_forward",
    "qlora_grad_x",
    "quantize_4bit",
    "quantize_absmax",
)
M, N, K = (
    5,
    7,
    12,
)  # an odd count of weights in 3 blocks of 32 that straddle the rows, the last one short


def arguments(
    op: str,
    *,
    dtype: torch.dtype = torch.float32,
    format: str = "nf4",
    blocksize: int = 32,
    scale_format: str = "dynamic8",
    rank: int = 3,
    bias: bool = True,
    dropout: float = 0.25,
) -> dict[str, Any]:
    """Good arguments for an op, by name. An empty `scale_format` means fp32 scales, dropout 0 no rng."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    weight = random(N, K, dtype=torch.float32)
    packed, absmax = reference.quantize_4bit(weight, format, blocksize)
    scales = reference.quantize_absmax(absmax, scale_format or "dynamic8")
    nested = scales if scale_format else (absmax, None, None)
    quantized = {
        "packed": packed,
        **dict(zip(("absmax", "nested_absmax", "nested_offset"), nested, strict=True)),
    }
    described = {"format": format, "blocksize": blocksize, "scale_format": scale_format}
    rng = torch.tensor([7, 11]) if dropout else None
    drop = {"rng": rng, "dropout": dropout}
    scaling = {"scaling": 0.5}
    lora_a, lora_b = random(rank, K), random(N, rank)
    every_argument = {
        "dequantize_4bit": quantized | described | {"shape": [N, K], "dtype": dtype},
        "dequantize_absmax": dict(
            zip(("codes", "nested_absmax", "nested_offset"), scales, strict=True)
        )
        | {"scale_format": scale_format or "dynamic8"},
        "lora_grad": {"left": random(M, rank), "right": random(M, K)} | drop | scaling,
        "lora_project": {"x": random(M, K), "weight": lora_a} | drop,
        "qlora_forward": {
            "x": random(M, K),
            "bias": random(N) if bias else None,
            "lora_a": lora_a,
            "lora_b": lora_b,
        }
        | quantized
        | drop
        | scaling
        | described,
        "qlora_grad_x": {"grad_y": random(M, N), "g": random(M, rank), "lora_a": lora_a}
        | quantized
        | drop
        | scaling
        | described,
        "quantize_4bit": {"x": weight.to(dtype), "format": format, "blocksize": blocksize},
        "quantize_absmax": {"absmax": absmax, "scale_format": scale_format or "dynamic8"},
    }
    return {name: every_argument[op][name] for name in _parameters(getattr(ops, op))}


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _overload(op: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.qlora, op).default


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fp32 scales": {"scale_format": ""},
    "e4m3, int4": {"scale_format": "e4m3", "format": "int4"},
    "no bias": {"bias": False},
    "no rng": {"dropout": 0.0},
    "rank 0": {"rank": 0, "dropout": 0.0},
    "bf16": {"dtype": torch.bfloat16},
}
AFFECTED = {
    "dequantize_4bit": {"fp32 scales", "e4m3, int4", "bf16"},
    "dequantize_absmax": {"e4m3, int4"},
    "lora_grad": {"no rng", "rank 0", "bf16"},
    "lora_project": {"no rng", "rank 0", "bf16"},
    "qlora_forward": set(VARIANTS),
    "qlora_grad_x": set(VARIANTS) - {"no bias"},
    "quantize_4bit": {"e4m3, int4", "bf16"},
    "quantize_absmax": {"e4m3, int4"},
}
CASES = [
    pytest.param(op, VARIANTS[name], id=f"{op}-{name}")
    for op in OPS
    for name in VARIANTS
    if name == "plain" or name in AFFECTED[op]
]


# --- One face ---------------------------------------------------------------------------------------


def test_all_ops_are_tested() -> None:
    registered = {
        name.removeprefix("qlora::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("qlora::")
    }
    assert registered == {*OPS, "adamw"}  # which returns nothing: see test_adamw


@pytest.mark.parametrize("op", OPS)
def test_schema_face_reference_and_cpu_agree(op: str) -> None:
    schema = [argument.name for argument in _overload(op)._schema.arguments]
    for backend in (ops, reference, cpu):
        assert _parameters(getattr(backend, op)) == schema, backend.__name__


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_opcheck(op: str, variant: dict[str, Any]) -> None:
    torch.library.opcheck(_overload(op), tuple(arguments(op, **variant).values()))


@pytest.mark.parametrize("op", ["quantize_4bit", "lora_project", "qlora_forward", "qlora_grad_x"])
def test_opcheck_without_rows(op: str) -> None:
    given = {
        name: value[:0] if name in ("x", "grad_y", "g") else value
        for name, value in arguments(op, dropout=0.0).items()
    }
    torch.library.opcheck(_overload(op), tuple(given.values()))


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_meta_device_gives_the_shapes(op: str, variant: dict[str, Any]) -> None:
    given = arguments(op, **variant)
    on_meta = {
        name: value.to("meta") if isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    real = _tuple(getattr(ops, op)(**given))
    fake = _tuple(getattr(ops, op)(**on_meta))
    assert all(tensor.is_meta for tensor in fake)
    assert [(t.shape, t.dtype, t.stride()) for t in fake] == [
        (t.shape, t.dtype, t.stride()) for t in real
    ]


@pytest.mark.parametrize(("op", "variant"), CASES)
def test_results_are_those_of_the_reference(op: str, variant: dict[str, Any]) -> None:
    given = arguments(op, **variant)
    actual, expected = getattr(ops, op)(**given), getattr(reference, op)(**given)
    exact = op.startswith(("quantize", "dequantize"))
    tolerance = 0 if exact else 8 * torch.finfo(variant.get("dtype", torch.float32)).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPS)
def test_cuda_goes_to_the_triton_launcher(op: str) -> None:
    """What is registered for CUDA, run in Triton's interpreter on tensors of the CPU."""
    given = arguments(op)
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    actual = _overload(op).redispatch(cuda, *given.values())
    expected = getattr(reference, op)(**given)
    torch.testing.assert_close(actual, expected)


# --- Bad arguments ----------------------------------------------------------------------------------


def wrong(
    op: str, argument: str, value: Any, error: type[Exception], named: str = "", **variant: Any
) -> Any:
    """One bad argument; `named` is the one that the message is about, where that is another."""
    return pytest.param(
        op, argument, value, error, named or argument, variant, id=f"{op}-{argument}"
    )


FP16, INT = torch.float16, torch.int32
QUANTIZED = [
    case
    for op in ("dequantize_4bit", "qlora_forward", "qlora_grad_x")
    for case in (
        wrong(op, "packed", torch.zeros(43, dtype=torch.uint8), ValueError),
        wrong(op, "packed", torch.zeros(1, 42, dtype=torch.uint8), ValueError),
        wrong(op, "packed", torch.zeros(42, dtype=torch.int8), TypeError),
        wrong(op, "absmax", torch.ones(2, dtype=torch.uint8), ValueError),
        wrong(op, "absmax", torch.ones(3), TypeError),
        wrong(op, "absmax", torch.ones(3, dtype=torch.uint8), TypeError, scale_format=""),
        wrong(op, "absmax", torch.ones(4), ValueError, scale_format=""),
        wrong(op, "absmax", torch.ones(3, dtype=torch.uint8, device="meta"), ValueError),
        wrong(op, "nested_absmax", torch.ones(2), ValueError),
        wrong(op, "nested_absmax", torch.ones(1, dtype=FP16), TypeError),
        wrong(op, "nested_absmax", torch.ones(1, device="meta"), ValueError),
        wrong(op, "nested_offset", None, ValueError),
        wrong(op, "nested_offset", torch.ones(1), ValueError),
        wrong(op, "nested_offset", torch.tensor(1), TypeError),
        wrong(op, "format", "nf5", ValueError),
        wrong(op, "blocksize", 48, ValueError),
        wrong(op, "blocksize", 16, ValueError),
        wrong(op, "scale_format", "", ValueError),
        wrong(op, "scale_format", "fp8", ValueError),
    )
]
DROPOUT = [
    case
    for op in ("lora_grad", "lora_project", "qlora_forward", "qlora_grad_x")
    for case in (
        wrong(op, "rng", None, ValueError),
        wrong(op, "rng", torch.tensor([7]), ValueError),
        wrong(op, "rng", torch.tensor([7, 11], dtype=INT), TypeError),
        wrong(op, "rng", torch.tensor([7, 11], device="meta"), ValueError),
        wrong(op, "dropout", 1.0, ValueError),
        wrong(op, "dropout", -0.1, ValueError),
        wrong(op, "dropout", float("nan"), ValueError),
    )
]
OTHERS = [
    wrong("dequantize_4bit", "dtype", torch.int8, TypeError),
    wrong("dequantize_4bit", "shape", [N, K + 1], ValueError, named="packed"),
    wrong("dequantize_absmax", "codes", torch.zeros(3, dtype=INT), TypeError),
    wrong("dequantize_absmax", "codes", torch.zeros(1, 3, dtype=torch.uint8), ValueError),
    wrong("dequantize_absmax", "nested_absmax", torch.ones(2), ValueError),
    wrong("dequantize_absmax", "nested_offset", torch.ones(1), ValueError),
    wrong("dequantize_absmax", "nested_offset", torch.ones((), device="meta"), ValueError),
    wrong("dequantize_absmax", "scale_format", "nf4", ValueError),
    wrong("lora_grad", "left", torch.ones(M, 3, dtype=INT), TypeError),
    wrong("lora_grad", "left", torch.ones(M), ValueError),
    wrong("lora_grad", "right", torch.ones(M, K, dtype=FP16), TypeError),
    wrong("lora_grad", "right", torch.ones(M + 1, K), ValueError),
    wrong("lora_grad", "right", torch.tensor(1.0), ValueError),
    wrong("lora_grad", "right", torch.ones(M, K, device="meta"), ValueError),
    wrong("lora_project", "x", torch.ones(M, K, dtype=INT), TypeError),
    wrong("lora_project", "x", torch.ones(1, M, K), ValueError),
    wrong("lora_project", "weight", torch.ones(3, K + 1), ValueError),
    wrong("lora_project", "weight", torch.tensor(1.0), ValueError),
    wrong("lora_project", "weight", torch.ones(3, K, dtype=FP16), TypeError),
    wrong("lora_project", "weight", torch.ones(3, K, device="meta"), ValueError),
    wrong("qlora_forward", "x", torch.ones(M, K, dtype=INT), TypeError),
    wrong("qlora_forward", "x", torch.ones(1, M, K), ValueError),
    wrong("qlora_forward", "packed", torch.empty(42, device="meta"), ValueError),
    wrong("qlora_forward", "bias", torch.ones(N + 1), ValueError),
    wrong("qlora_forward", "bias", torch.ones(1, N), ValueError),
    wrong("qlora_forward", "bias", torch.ones(N, dtype=FP16), TypeError),
    wrong("qlora_forward", "bias", torch.ones(N, device="meta"), ValueError),
    wrong("qlora_forward", "lora_a", torch.ones(3, K + 1), ValueError),
    wrong("qlora_forward", "lora_a", torch.tensor(1.0), ValueError),
    wrong("qlora_forward", "lora_a", torch.ones(3, K, dtype=FP16), TypeError),
    wrong("qlora_forward", "lora_a", torch.ones(3, K, device="meta"), ValueError),
    wrong("qlora_forward", "lora_b", torch.ones(N, 4), ValueError),
    wrong("qlora_forward", "lora_b", torch.tensor(1.0), ValueError),
    wrong("qlora_forward", "lora_b", torch.ones(N, 3, dtype=FP16), TypeError),
    wrong("qlora_grad_x", "grad_y", torch.ones(M, N, dtype=INT), TypeError),
    wrong("qlora_grad_x", "grad_y", torch.ones(1, M, N), ValueError),
    wrong("qlora_grad_x", "packed", torch.empty(42, device="meta"), ValueError),
    wrong("qlora_grad_x", "g", torch.ones(M, 4), ValueError),
    wrong("qlora_grad_x", "g", torch.ones(M, 3, dtype=FP16), TypeError),
    wrong("qlora_grad_x", "g", torch.ones(M, 3, device="meta"), ValueError),
    wrong("qlora_grad_x", "lora_a", torch.ones(K), ValueError),
    wrong("qlora_grad_x", "lora_a", torch.ones(3, K, dtype=FP16), TypeError),
    wrong("quantize_4bit", "x", torch.ones(64, dtype=INT), TypeError),
    wrong("quantize_4bit", "x", torch.ones(64, dtype=torch.float64), TypeError),
    wrong("quantize_4bit", "format", "NF4", ValueError),
    wrong("quantize_4bit", "blocksize", 8192, ValueError),
    wrong("quantize_absmax", "absmax", torch.ones(3, dtype=FP16), TypeError),
    wrong("quantize_absmax", "absmax", torch.ones(1, 3), ValueError),
    wrong("quantize_absmax", "scale_format", "", ValueError),
]


@pytest.mark.parametrize(
    ("op", "argument", "value", "error", "named", "variant"), [*QUANTIZED, *DROPOUT, *OTHERS]
)
def test_refuses(
    op: str,
    argument: str,
    value: Any,
    error: type[Exception],
    named: str,
    variant: dict[str, Any],
) -> None:
    given = arguments(op, **variant)
    getattr(ops, op)(**given)  # the others are good
    with pytest.raises(error, match=rf"^{named} must "):
        getattr(ops, op)(**given | {argument: value})


def test_messages_say_what_is_allowed_and_what_was_given() -> None:
    x = torch.ones(64)
    with pytest.raises(
        ValueError, match=r"nf4, fp4, e2m1, e3m0, int4, or .*register_format.*; got 'int8'"
    ):
        ops.quantize_4bit(x, "int8", 64)
    with pytest.raises(ValueError, match=rf"{formats.BLOCKSIZES[-1]}\); got 65"):
        ops.quantize_4bit(x, "nf4", 65)
    with pytest.raises(TypeError, match=r"float32, .*bfloat16; got torch.int64"):
        ops.quantize_4bit(x.long(), "nf4", 64)
    with pytest.raises(ValueError, match=r"lora_b must have shape \(7, 3\); got \(7, 2\)"):
        ops.qlora_forward(**arguments("qlora_forward") | {"lora_b": torch.ones(7, 2)})
