"""Offsets do not overflow: where a tensor passes 2^31 elements, they are computed in 64 bits.

Each kernel is compiled for a call with tensors of more than 2^31 elements, and what is computed on the way to
an address or a mask is bounded for that call, see `triton_code`.
Runs as a program of its own too, which prints the calls: kernels are not compiled in the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.triton_code import Code

ROOT = Path(__file__).parents[1]
WIDTH = 2**20
"""In and out features. With 4096 tokens x has 2^32 elements, grad_y as many, and W 2^40."""

# Tensors that a call may grow past 2^31 elements. The adapter's factors may not: rank times features.
LARGE = {
    "_quantize_4bit_kernel": {"x_ptr": WIDTH**2, "words_ptr": WIDTH**2 // 8, "absmax_ptr": 2**34},
    "_dequantize_4bit_kernel": {
        "packed_ptr": WIDTH**2 // 2,
        "absmax_ptr": 2**34,
        "out_ptr": WIDTH**2,
    },
    "_quantize_absmax_kernel": {"absmax_ptr": 2**34, "codes_ptr": 2**34},
    "_dequantize_absmax_kernel": {"codes_ptr": 2**34, "absmax_ptr": 2**34},
    "_qlora_forward_kernel": {
        "x_ptr": 2**32,
        "packed_ptr": WIDTH**2 // 2,
        "absmax_ptr": 2**34,
        "y_ptr": 2**32,
    },
    "_qlora_grad_x_kernel": {
        "grad_y_ptr": 2**32,
        "packed_ptr": WIDTH**2 // 2,
        "absmax_ptr": 2**34,
        "grad_x_ptr": 2**32,
    },
    "_dequantize_slab_kernel": {
        "packed_ptr": WIDTH**2 // 2,
        "absmax_ptr": 2**34,
        "out_ptr": WIDTH**2 // 2,
    },
    "_adapter_kernel": {"out_ptr": 2**32 - WIDTH // 2},  # its columns begin within the first row
    # The one kernel that counts in 32 bits, of words: it is given no more than this.
    "_few_tokens_kernel": {"words_ptr": (WIDTH - 16) * 2**14 // 8},
    "_lora_project_kernel": {"x_ptr": 2**32},
    "_adamw_kernel": {"exp_avg_ptr": 2**33, "exp_avg_sq_ptr": 2**33},
    "_lora_grad_kernel": {"wide_ptr": 2**32},
}

# What integers that a kernel loads from a table can be, by their bits: `adamw` finds there the numbers of parameters
# and of tiles, and sizes.
LOADED = {"_adamw_kernel": {32: (0, 2**31 - 1), 64: (0, 2**41)}}

# --- Calls with large tensors, in a process without the interpreter -----------------------------------


def _calls() -> Iterator[Callable[[], object]]:
    """Those of `static_cases`, the same with column-major activations, and the largest weight for few tokens."""
    import torch

    from benchmarks import static_cases
    from qlora.kernels import fused_linear, linear, lora

    bf16, empty = torch.bfloat16, static_cases._empty
    for case in (
        *static_cases._blockwise(bf16, 64),
        *(static_cases._forward(bf16, m, k=WIDTH) for m in (1, 64, 4096)),
        *(static_cases._grad_x(bf16, m, 0.05) for m in (1, 4096)),
        static_cases._adapter(bf16, 0.05),
    ):
        yield case.call
    weight = static_cases._weight(WIDTH, WIDTH, 64, True)
    x, h = empty(WIDTH, 4096, dtype=bf16).mT, empty(4096, 64, dtype=bf16)
    a, b = empty(64, WIDTH, dtype=bf16), empty(WIDTH, 64, dtype=bf16)
    rest = (0.25, 0.0, "nf4", 64, "dynamic8")
    yield lambda: fused_linear.forward(x, *weight, None, h, b, 0.25, *rest[2:])
    yield lambda: fused_linear.grad_x(x, h, *weight, a, None, *rest)
    yield lambda: linear.qlora_forward(x, *weight, None, a, b, None, *rest)
    yield lambda: linear.qlora_grad_x(x, h, *weight, a, None, *rest)
    yield lambda: lora.lora_grad(h, x, None, 0.25, 0.0)
    yield static_cases._forward(bf16, 16, n=WIDTH - 16, k=2**14).call
    for bits in (32, 8):
        yield static_cases._adamw(bf16, bits, rank=4096).call


def collect() -> list[dict[str, Any]]:
    """The kernels that large calls launch: name, integer arguments, grid and Triton's intermediate code."""
    from triton.runtime.jit import JITFunction

    from benchmarks import static, static_cases
    from qlora.kernels import tuning

    found: list[dict[str, Any]] = []
    with (
        mock.patch.multiple(static_cases, N=WIDTH, K=WIDTH),
        mock.patch.object(tuning, "SLAB_BYTES", WIDTH**2),  # two slabs in place of thousands
        static.compile_only(90) as launches,
    ):
        compile_and_record = JITFunction.run

        def run(self: JITFunction, *args: Any, grid: Any, **kwargs: Any) -> Any:
            compiled = compile_and_record(self, *args, grid=grid, **kwargs)
            arguments = dict(zip(self.arg_names, args, strict=False)) | kwargs
            found.append(
                {
                    "kernel": compiled.metadata.name,
                    "arguments": {k: v for k, v in arguments.items() if type(v) is int},
                    "grid": [*grid, 1, 1][:3],
                    "code": compiled.asm["ttir"],
                }
            )
            return compiled

        with mock.patch.object(JITFunction, "run", run):
            for call in _calls():
                call()
        assert len(found) == len(launches)
    return found


# --- Tests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": str(ROOT),
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    command = [sys.executable, __file__]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(printed.stdout)


def _codes(launches: list[dict[str, Any]]) -> Iterator[tuple[str, Code]]:
    for launch in launches:
        yield launch["kernel"], Code(launch | {"loaded": LOADED.get(launch["kernel"], {})})


def test_addresses_and_masks_do_not_overflow(launches: list[dict[str, Any]]) -> None:
    for kernel, code in _codes(launches):
        assert code.overflows() == [], kernel


def test_the_calls_are_large(launches: list[dict[str, Any]]) -> None:
    """Each tensor that can be large is, and its last element is within reach: the test above sees it."""
    reaches: dict[str, dict[str, int]] = {}
    for kernel, code in _codes(launches):
        found = reaches.setdefault(kernel, {})
        for pointer, reach in code.reaches().items():
            found[pointer] = max(found.get(pointer, 0), reach)
    for kernel, sizes in LARGE.items():
        for pointer, size in sizes.items():
            assert size >= 2**31 - 2**15
            assert reaches[kernel][pointer] >= size - 1, f"{kernel}: {pointer}"


def _code(body: str, **arguments: int) -> Code:
    signature = ", ".join(f"%{name}: i32" for name in arguments)
    function = f'tt.func public @kernel(%x_ptr: !tt.ptr<f32> loc("x_ptr"(#loc)), {signature})'
    launch = {"grid": [2**20, 1, 1], "arguments": arguments, "code": f"{function}\n{body}"}
    return Code(launch)


WIDE = """
    %pid = tt.get_program_id x : i32 loc(#loc3)
    %c4096_i64 = arith.constant 4096 : i64 loc(#loc)
    %wide = arith.extsi %pid : i32 to i64 loc(#loc)
    %start = arith.muli %wide, %c4096_i64 : i64 loc(#loc)
    %rows = tt.make_range {end = 4096 : i32, start = 0 : i32} : tensor<4096xi32> loc(#loc)
    %left = arith.subi %c4096_i64, %start : i64 loc(#loc)
    %base = tt.addptr %x_ptr, %start : !tt.ptr<f32>, i64 loc(#loc)
    %bases = tt.splat %base : !tt.ptr<f32> -> tensor<4096x!tt.ptr<f32>> loc(#loc)
    %ptrs = tt.addptr %bases, %rows : tensor<4096x!tt.ptr<f32>>, tensor<4096xi32> loc(#loc)
    %x = tt.load %ptrs : tensor<4096x!tt.ptr<f32>> loc(#loc)
"""
NARROW = """
    %pid = tt.get_program_id x : i32 loc(#loc3)
    %c4096_i32 = arith.constant 4096 : i32 loc(#loc)
    %start = arith.muli %pid, %c4096_i32 : i32 loc(#loc)
    %wide = arith.extsi %start : i32 to i64 loc(#loc)
    %ptr = tt.addptr %x_ptr, %wide : !tt.ptr<f32>, i64 loc(#loc)
"""


LOOPS = """
    %c0 = arith.constant 0 : i32 loc(#loc)
    %c1 = arith.constant 1 : i32 loc(#loc)
    %acc = arith.constant 0.0 : f32 loc(#loc)
    %sum = scf.for %i = %c0 to %n step %c1 iter_args(%a = %acc) -> (f32)  : i32 {
      %ptr = tt.addptr %x_ptr, %i : !tt.ptr<f32>, i32 loc(#loc)
      scf.yield %a : f32 loc(#loc)
    } loc(#loc)
    %other = scf.for %i = %c0 to %c1 step %c1 iter_args(%a = %sum) -> (f32)  : i32 {
      %square = arith.muli %i, %n : i32 loc(#loc)
      %ptr = tt.addptr %x_ptr, %square : !tt.ptr<f32>, i32 loc(#loc)
      scf.yield %a : f32 loc(#loc)
    } loc(#loc)
"""


def test_loops_beside_each_other_have_their_own_bounds() -> None:
    code = _code(LOOPS, n=2**30)
    assert code.overflows() == []
    assert code.reaches() == {"x_ptr": 2**30 - 1}
    assert _code(LOOPS.replace("%c0 to %c1", "%c0 to %n"), n=2**30).overflows() != []


def test_wide_offsets_pass() -> None:
    code = _code(WIDE)
    assert code.overflows() == []
    assert code.reaches() == {"x_ptr": 2**32 - 1}


def test_an_offset_that_is_widened_too_late_is_found() -> None:
    (found,) = _code(NARROW).overflows()
    assert found.startswith("%start = arith.muli")
    assert found.endswith(f"0 to {(2**20 - 1) * 4096}")


@pytest.mark.parametrize(
    ("operation", "low", "high"),
    [
        ("arith.divsi %a, %b", -50, 50),
        ("arith.remsi %a, %b", -6, 6),
        ("arith.remsi %b, %a", 0, 7),
        ("arith.minsi %a, %b", -100, 7),
        ("arith.maxsi %a, %b", 2, 100),
        ("arith.subi %a, %b", -107, 98),
        ("arith.muli %a, %b", -700, 700),
        ("arith.shrsi %a, %b", -25, 25),
        ("arith.andi %a, %b", 0, 7),
        ("arith.ori %b, %b", 2, 7),
        ("arith.select %c, %a, %b", -100, 100),
        ("tt.load %p", -(2**31), 2**31 - 1),
    ],
)
def test_intervals(operation: str, low: int, high: int) -> None:
    code = _code(f"%r = {operation} : i32")
    code._intervals |= {"a": (-100, 100), "b": (2, 7), "c": (0, 1)}
    assert code.interval("r") == (low, high)


if __name__ == "__main__":
    print(json.dumps(collect()))
