"""The optimizer's op: its kernel and its CPU path are the reference, bit for bit, and bad arguments are refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora.kernels import adamw, cpu, cpu_adamw, formats, ops, reference_adamw
from qlora.kernels.reference_adamw import SCALARS
from tests.on_device import DEVICES, interpreted_only
from tests.steps import Step, assert_same_step, step_of, steps

# Gradients near the largest number overflow when they are squared, and numpy says so.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")


def _check(launcher: Callable[..., None], device: str, step: Step) -> None:
    """The launcher on a copy of the arguments, the reference on another."""
    actual, expected = step.on(device), step.on("cpu")
    reference_adamw.adamw(*expected.arguments())
    versions = [tensor._version for tensor in actual.updated()]
    launcher(*actual.arguments())
    assert_same_step(actual, expected)
    # Autograd knows what was written, and that the rest was not.
    changed = [t._version > v for t, v in zip(actual.updated(), versions, strict=True)]
    assert changed == _written(actual)


def _written(step: Step) -> list[bool]:
    """Of what a step may write, what it does."""
    params = [grad is not None and grad.numel() > 0 for grad in step.grads]
    return params + [any(params)] * (len(step.updated()) - len(params))


# --- The reference, bit for bit ---------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60)
@given(step=steps())
def test_the_kernel_is_the_reference(device: str, step: Step) -> None:
    _check(adamw.adamw if step.params else ops.adamw, device, step)


@settings(max_examples=150)
@given(step=steps())
def test_the_cpu_path_is_the_reference(step: Step) -> None:
    _check(cpu.adamw, "cpu", step)


@settings(max_examples=150)
@given(step=steps(), stochastic=st.booleans())
def test_the_cpu_path_takes_small_parameters_together(step: Step, stochastic: bool) -> None:
    """Where they have the same scalars, and nothing is rounded at random."""
    step.scalars[:] = step.scalars[:1].clone()
    _check(cpu.adamw, "cpu", replace(step, rng=step.rng if stochastic else None))


def _random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("stochastic", [False, True])
def test_slabs_of_the_cpu_path(
    monkeypatch: pytest.MonkeyPatch, bits: int, stochastic: bool
) -> None:
    """More than one, the last one short: states and random bits go on where the slab before ended."""
    monkeypatch.setattr(cpu_adamw, "_STEP_SLAB", 2048)
    shapes = ((5000,), (3, 7), (41, 100))
    params = [_random(*shape, dtype=torch.bfloat16) for shape in shapes]
    grads = [_random(*shape, dtype=torch.bfloat16, seed=1) for shape in shapes]
    rng = torch.tensor([3, 5]) if stochastic else None
    _check(cpu.adamw, "cpu", step_of(params, grads, bits, rng))


def _with_strides(bits: int) -> Step:
    """Parameters and gradients that are not contiguous, the last parameter without a gradient."""
    params = [_random(8, 300).mT, _random(600)[::2], _random(40, 4)[:, :3], _random(7, 9).mT]
    grads = [_random(*p.shape, seed=1) for p in params]
    grads[1], grads[3] = _random(300, 2, seed=2)[:, 0], None
    return step_of(params, grads, bits)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [32, 8])
def test_the_kernel_on_what_is_not_contiguous(device: str, bits: int) -> None:
    _check(adamw.adamw, device, _with_strides(bits))


@pytest.mark.parametrize("bits", [32, 8])
def test_the_cpu_path_on_what_is_not_contiguous(bits: int) -> None:
    """One by one, and those of a tile at most together."""
    step = _with_strides(bits)
    step.scalars[0, 0] = 0.5
    _check(cpu.adamw, "cpu", step)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [32, 8])
def test_many_tensors_over_many_steps(device: str, bits: int) -> None:
    """The list of work is used again, also after parameters of other sizes; who has a gradient changes."""
    sizes = [64 * (1 + i % 5) for i in range(30)]
    params = [_random(size, seed=i) for i, size in enumerate(sizes)]
    expected = step_of(params, [None] * 30, bits)
    actual = expected.on(device)
    for t in range(1, 4):
        grads = [None if (i + t) % 3 == 0 else _random(n, seed=t) for i, n in enumerate(sizes)]
        scalars = step_of(params, grads, step=t).scalars
        expected = replace(expected, grads=grads, scalars=scalars)
        moved = [None if g is None else g.to(device) for g in grads]
        actual = replace(actual, grads=moved, scalars=scalars)
        reference_adamw.adamw(*expected.arguments())
        adamw.adamw(*actual.arguments())
        assert_same_step(actual, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_each_parameter_has_its_own_scalars_and_random_bits(device: str) -> None:
    same, grad = (
        torch.full((512,), 1.0, dtype=torch.bfloat16),
        torch.ones(512, dtype=torch.bfloat16),
    )
    step = step_of([same.clone() for _ in range(3)], [grad] * 3, rng=torch.tensor([1, 2]))
    step.scalars[2, 0], step.scalars[2, 4] = 1.0, 0.0  # decay and step_size: it stays
    actual = step.on(device)
    adamw.adamw(*actual.arguments())
    first, second, third = (p.cpu() for p in actual.params)
    assert not torch.equal(first, second)
    assert torch.equal(third, same)


@pytest.mark.parametrize("device", DEVICES)
def test_ties_take_the_lower_code(device: str) -> None:
    """At each threshold the lower code. A 1 in each block makes its absmax 1."""
    cpu_device = torch.device("cpu")
    ends = torch.cat([formats.state_thresholds(True, cpu_device), torch.ones(1)])
    middle = formats.state_thresholds(False, cpu_device)[::16]
    pairs = [torch.tensor([0.0, 1.0]) for _ in middle]
    step = step_of([torch.ones(256), *map(torch.ones_like, pairs)], [ends, *pairs], 8)
    row = dict(zip(SCALARS, step.scalars.unbind(1), strict=True))
    row["weight1"][:] = 1.0  # m = g
    # v is 1 where it was, and weight2 where the gradient is 1.
    step.exp_avg_sq[1024::1024], step.exp_avg_sq_absmax[:] = 255, 1.0
    row["beta2"][:], row["weight2"][1:] = 1.0, middle
    _check(adamw.adamw, device, step)
    _check(cpu.adamw, "cpu", step)
    actual = step.on(device)
    adamw.adamw(*actual.arguments())
    assert actual.exp_avg[:255].tolist() == list(range(255))
    assert actual.exp_avg_sq[1025::1024].tolist() == list(range(0, 255, 16))


@triton.jit
def _round_kernel(x_ptr, out_ptr, N: tl.constexpr):
    """Each x fp32 [N] rounded at random, with the key 77."""
    element = tl.arange(0, N)
    key = tl.full((), 77, tl.int64)
    tl.store(out_ptr + element, adamw._round_at_random(tl.load(x_ptr + element), key, element))


@pytest.mark.parametrize("device", DEVICES)
def test_every_nan_stays(device: str) -> None:
    """Also one all of whose bits are set, which is what a GPU makes: added to, it runs over into -0."""
    patterns = torch.tensor([0x7FFF_FFFF, -1, 0x7F80_0001, 0x7FC0_0000], dtype=torch.int32)
    x = patterns.repeat(64).view(torch.float32).to(device)
    out = torch.zeros(256, dtype=torch.bfloat16, device=device)
    _round_kernel[(1,)](x, out, N=256)
    assert out.isnan().all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_gradient_that_is_not_a_number_shows_in_the_block(device: str) -> None:
    """In 8 bits it survives in its block's absmax, and in no other."""
    grad = _random(1024)
    grad[300] = torch.nan
    step = step_of([_random(1024, seed=1)], [grad], 8)
    _check(adamw.adamw, device, step)
    actual = step.on(device)
    adamw.adamw(*actual.arguments())
    for absmax in (actual.exp_avg_absmax, actual.exp_avg_sq_absmax):
        assert absmax.isnan().tolist() == [False, True, False, False]


# --- The op -----------------------------------------------------------------------------------------


def _step(bits: int = 32, dtype: torch.dtype = torch.float32, **changed: Any) -> Step:
    """Good arguments: three parameters of five tiles, the last one without a gradient."""
    shapes = ((3, 400), (5,), (1030,))
    params, grads = ([_random(*s, dtype=dtype, seed=i) for s in shapes] for i in (0, 1))
    grads[2] = None
    return replace(step_of(params, grads, bits), **changed)


def test_schema_face_reference_and_cpu_agree() -> None:
    schema = [argument.name for argument in torch.ops.qlora.adamw.default._schema.arguments]
    for backend in (ops, reference_adamw, cpu, adamw):
        assert list(inspect.signature(backend.adamw).parameters) == schema, backend.__name__


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(bits: int, dtype: torch.dtype) -> None:
    arguments = _step(bits, dtype, rng=torch.tensor([7, 11])).arguments()
    torch.library.opcheck(torch.ops.qlora.adamw.default, tuple(arguments))


@pytest.mark.parametrize("bits", [32, 8])
def test_the_face_takes_a_step(bits: int) -> None:
    _check(ops.adamw, "cpu", _step(bits))


@interpreted_only
@pytest.mark.parametrize("bits", [32, 8])
def test_cuda_goes_to_the_triton_launcher(bits: int) -> None:
    """What is registered for CUDA, run in Triton's interpreter on tensors of the CPU."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    overload = torch.ops.qlora.adamw.default
    _check(lambda *arguments: overload.redispatch(cuda, *arguments), "cpu", _step(bits))


def test_leaves_that_require_gradients_are_updated_in_place() -> None:
    step = _step()
    step.params = [param.requires_grad_() for param in step.params]
    before = [param.detach().clone() for param in step.params]
    ops.adamw(*step.arguments())
    assert [torch.equal(p, b) for p, b in zip(step.params, before, strict=True)] == [0, 0, 1]
    assert all(p.is_leaf for p in step.params)


def test_nothing_to_do() -> None:
    empty, none = torch.empty(0), torch.empty(0, 7)
    ops.adamw([], [], empty, empty, None, None, none, None)
    idle = _step(grads=[None] * 3)
    _check(ops.adamw, "cpu", idle)
    _check(adamw.adamw, "cpu", idle)


def _wrong(name: str, value: Any, error: type[Exception], message: str, bits: int = 32) -> Any:
    return pytest.param(name, value, error, message, bits, id=f"{name}: {message}")


ELEMENTS = 5 * formats.STATE_TILE
BF16 = torch.bfloat16
WRONG = [
    _wrong("grads", [None], ValueError, r"grads must have one entry for each of 3 params; got 1"),
    _wrong("params", [torch.ones(2, dtype=torch.int32)] * 3, TypeError, r"params\[0\] must have"),
    _wrong("params", [torch.ones(2).double()] * 3, TypeError, r"params\[0\] must have"),
    _wrong("params", [torch.ones(3, 400), torch.ones(5, dtype=BF16), torch.ones(1030)], TypeError,
           r"params\[1\] must have the dtype of params\[0\], torch.float32; got torch.bfloat16"),
    _wrong("params", [torch.ones(3, 400), torch.ones(5, device="meta"), torch.ones(1030)], ValueError,
           r"params\[1\] must be on the device of params\[0\], cpu; got meta"),
    _wrong("params", [torch.ones(1200), torch.ones(5), torch.ones(1030)], ValueError,
           r"grads\[0\] must have the shape of params\[0\], \(1200,\); got \(3, 400\)"),
    _wrong("grads", [None, None, torch.ones(1030, dtype=BF16)], TypeError, r"grads\[2\] must have"),
    _wrong("grads", [None, None, torch.ones(1030, device="meta")], ValueError, r"grads\[2\] must be"),
    _wrong("exp_avg", torch.zeros(ELEMENTS, dtype=BF16), TypeError, r"exp_avg must have one of the"),
    _wrong("exp_avg", torch.zeros(ELEMENTS - 1), ValueError, rf"exp_avg must have shape \({ELEMENTS},\)"),
    _wrong("exp_avg", torch.zeros(ELEMENTS, device="meta"), ValueError, r"exp_avg must be on the device"),
    _wrong("exp_avg", torch.zeros(2 * ELEMENTS)[::2], ValueError, r"exp_avg must be contiguous"),
    _wrong("exp_avg_sq", torch.zeros(ELEMENTS, dtype=torch.uint8), TypeError, r"exp_avg_sq must have dtype"),
    _wrong("exp_avg_sq", torch.zeros(5, 1024), ValueError, r"exp_avg_sq must have shape"),
    _wrong("exp_avg_absmax", torch.zeros(20), ValueError, r"exp_avg_absmax must be None for states in float32"),
    _wrong("exp_avg_sq_absmax", None, ValueError, r"exp_avg_sq_absmax must be given for states in uint8", 8),
    _wrong("exp_avg_absmax", torch.zeros(21), ValueError, r"exp_avg_absmax must have shape \(20,\)", 8),
    _wrong("exp_avg_absmax", torch.zeros(20, dtype=BF16), TypeError, r"exp_avg_absmax must have dtype", 8),
    _wrong("scalars", torch.zeros(2, 7), ValueError, r"scalars must have shape \(3, 7\)"),
    _wrong("scalars", torch.zeros(3, 7).double(), TypeError, r"scalars must have dtype torch.float32"),
    _wrong("scalars", torch.zeros(3, 7, device="meta"), ValueError, r"scalars must be on the CPU; got meta"),
    _wrong("rng", torch.tensor([7]), ValueError, r"rng must have shape \(2,\)"),
    _wrong("rng", torch.tensor([7.0, 1.0]), TypeError, r"rng must have dtype torch.int64"),
    _wrong("rng", torch.tensor([7, 1], device="meta"), ValueError, r"rng must be on the CPU; got meta"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "error", "message", "bits"), WRONG)
def test_refuses(name: str, value: Any, error: type[Exception], message: str, bits: int) -> None:
    step = _step(bits)
    with pytest.raises(error, match=f"^{message}"):
        ops.adamw(*replace(step, **{name: value}).arguments())


def test_refuses_to_round_float16_at_random() -> None:
    with pytest.raises(TypeError, match=r"^rng must be None for params in float16"):
        ops.adamw(*_step(dtype=torch.float16, rng=torch.tensor([7, 11])).arguments())
