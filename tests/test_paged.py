"""PagedAdamW: torch's AdamW in numbers and manners, its state where it is said to be and gone when it is gone."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora import buckets, paged
from qlora.kernels import ops
from qlora.kernels.formats import STATE_TILE, state_zero_code
from qlora.paged import PagedAdamW, state_bytes
from tests.on_device import compiled_only
from tests.strategies import seeds

SHAPES = ((3, 5), (1000, 3), (), (0,), (1024,), (2, 3, 4, 5), (257,), (2100,))
EPS = torch.finfo(torch.float32).eps

on_gpu = [pytest.mark.gpu, compiled_only]
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]


def parameters(
    shapes: Any = SHAPES, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    return [torch.nn.Parameter(value.to(device, dtype)) for value in values]


def set_gradients(params: list[Any], step: int, missing: float = 0.0, seed: int = 0) -> None:
    """The same for the same step, wherever the parameters are; some are None."""
    generator = torch.Generator().manual_seed(1000 * seed + step)
    for p in params:
        scale = 10 ** (2 * torch.rand((), generator=generator).item() - 1)
        grad = scale * torch.randn(p.shape, generator=generator)
        absent = torch.rand((), generator=generator).item() < missing
        p.grad = None if absent else grad.to(p.device, p.dtype)


def run(
    optimizer: torch.optim.Optimizer, steps: range, missing: float = 0.0, seed: int = 0
) -> torch.optim.Optimizer:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        torch.manual_seed(step)
        set_gradients(params, step, missing, seed)
        optimizer.step()
    return optimizer


def contents(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters and states, in order, on the CPU."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [optimizer.state.get(p, {}) for p in params]
    named = [tensor for state in states for _, tensor in sorted(state.items())]
    return [tensor.detach().cpu().clone() for tensor in (*params, *named)]


def assert_same(left: torch.optim.Optimizer, right: torch.optim.Optimizer) -> None:
    """Bit for bit, parameters and states."""
    pairs = list(zip(contents(left), contents(right), strict=True))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@contextmanager
def small_buckets(size: int) -> Iterator[list[int]]:
    """Buckets of at most `size` bytes; yields how many parameters each kernel call gets."""
    calls: list[int] = []

    def adamw(params: list[Tensor], *arguments: Any) -> None:
        calls.append(len(params))
        ops.adamw(params, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "BUCKET_BYTES", size)
        patch.setattr(paged, "ops", SimpleNamespace(adamw=adamw))
        yield calls


# --- As torch's AdamW -------------------------------------------------------------------------------


@given(
    seed=seeds,
    rates=st.tuples(st.floats(1e-5, 1e-1), st.floats(1e-5, 1e-1)),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.9), (0.95, 0.95)]),
    missing=st.sampled_from([0.0, 0.4]),
    clip=st.booleans(),
)
@settings(max_examples=25)
def test_equals_torch(
    seed: int,
    rates: tuple[float, float],
    decay: float,
    betas: tuple[float, float],
    missing: float,
    clip: bool,
) -> None:
    """Two groups, gradients that are missing now and then: but for a few roundings a step."""
    optimizers, steps = [], 6
    for kind in (PagedAdamW, torch.optim.AdamW):
        params = parameters()
        groups = [{"params": params[:3], "lr": rates[0]}, {"params": params[3:], "eps": 1e-6}]
        optimizer = kind(groups, lr=rates[1], betas=betas, weight_decay=decay)
        for step in range(steps):
            set_gradients(params, step, missing, seed)
            if clip:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        optimizers.append(optimizer)
    ours, theirs = optimizers
    for mine, its in zip(ours.param_groups, theirs.param_groups, strict=True):
        reach = mine["lr"] / (1 - betas[1]) ** 0.5  # the furthest that a step goes
        for p, q in zip(mine["params"], its["params"], strict=True):
            assert (ours.state[p] == {}) == (theirs.state[q] == {})
            for key, expected in theirs.state[q].items():
                assert ours.state[p][key].dtype == torch.float32
                largest = expected.abs().max() if expected.numel() else 0.0
                assert torch.allclose(
                    ours.state[p][key], expected, rtol=8 * steps * EPS, atol=30 * EPS * largest
                )
            bound = 8 * steps * EPS * (q.abs() + reach)
            assert ((p - q).abs() <= bound).all()


def test_a_parameter_without_a_gradient_is_left_alone() -> None:
    params = parameters()
    optimizer = PagedAdamW(params)
    params[1].grad = torch.ones_like(params[1])
    before = [p.detach().clone() for p in params]
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    assert changed == [i == 1 for i in range(len(params))]
    assert list(optimizer.state) == [params[1]]
    assert optimizer.state_bytes == state_bytes([3000], 32)


@pytest.mark.parametrize("bits", [32, 8])
def test_eight_bits_and_schedules_learn(bits: int) -> None:
    """A regression that has a solution, with closure, scheduler, hooks and a group that comes later."""
    torch.manual_seed(0)
    x, w = torch.randn(256, 40), torch.randn(40, 8)
    first, second = torch.nn.Parameter(torch.zeros(40, 8)), torch.nn.Parameter(torch.zeros(8))
    optimizer = PagedAdamW([("w", first)], lr=torch.tensor(0.1), weight_decay=0.0, bits=bits)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (x @ first + second - x @ w - 1).square().mean()
        loss.backward()
        return loss

    losses = []
    for step in range(200):
        if step == 2:
            optimizer.add_param_group({"params": [("b", second)], "lr": 0.2})
            scheduler.base_lrs.append(0.2)
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < 0.01 * losses[0]
    assert seen == ["before", "after"] * 200
    assert optimizer.state[first]["step"] == 200
    assert optimizer.state[second]["step"] == 198
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.1 * 0.98**200, rel=1e-4)
    assert optimizer.param_groups[1]["param_names"] == ["b"]
    optimizer.zero_grad()
    assert first.grad is None


def test_stochastic_rounding_keeps_small_steps() -> None:
    """A step of a hundredth of the last bit: to nearest it is lost, at random it arrives on average."""
    moved = {}
    for rounding in (False, True):
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = PagedAdamW([p], lr=2**-8 / 50, weight_decay=0.0, stochastic_rounding=rounding)
        torch.manual_seed(0)
        for _ in range(50):
            p.grad = torch.ones_like(p)
            optimizer.step()
        moved[rounding] = 1 - p.float().mean().item()
        assert optimizer.state[p]["exp_avg"].dtype == torch.float32
    assert moved[False] == 0
    assert moved[True] == pytest.approx(2**-8, rel=0.05)


def test_randomness_comes_from_torch_and_only_where_it_is_wanted() -> None:
    def outcome(seed: int, **options: Any) -> tuple[Tensor, Tensor]:
        p = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = PagedAdamW([p], **options)
        p.grad = torch.ones_like(p)
        torch.manual_seed(seed)
        optimizer.step()
        return p.detach(), torch.get_rng_state()

    untouched = torch.Generator().manual_seed(1).get_state()
    assert torch.equal(outcome(1)[1], untouched)
    assert not torch.equal(outcome(1, stochastic_rounding=True)[1], untouched)
    first, again, other = (outcome(i, stochastic_rounding=True)[0] for i in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    with small_buckets(1):
        pair = [torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16)) for _ in range(2)]
        for p in pair:
            p.grad = torch.ones_like(p)
        PagedAdamW(pair, stochastic_rounding=True).step()
    assert not torch.equal(*pair), "each bucket has random numbers of its own"


# --- State: saved and loaded ------------------------------------------------------------------------


def test_states_go_to_torch_and_come_from_it() -> None:
    ours, theirs = PagedAdamW(parameters()), torch.optim.AdamW(parameters())
    run(ours, range(3), missing=0.2)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    assert [g["lr"] for g in theirs.param_groups] == [1e-3]
    for p, q in zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True):
        q.data.copy_(p)
        for key, value in ours.state[p].items():
            assert torch.equal(theirs.state[q][key], value)
    back = PagedAdamW([p.detach().clone().requires_grad_() for p in ours.param_groups[0]["params"]])
    back.load_state_dict(theirs.state_dict())
    assert_same(back, ours)
    assert_same(run(back, range(3, 6)), run(ours, range(3, 6)))
    run(theirs, range(3, 6))
    for p, q in zip(contents(ours), contents(theirs), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


def test_state_of_16_bit_parameters_stays_in_32_bits() -> None:
    optimizer = run(PagedAdamW(parameters(dtype=torch.bfloat16)), range(2))
    other = PagedAdamW(parameters(dtype=torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(
        optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True
    ):
        for key, value in optimizer.state[p].items():
            assert other.state[q][key].dtype == torch.float32
            assert torch.equal(other.state[q][key], value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"bits": 32}),
        (torch.float32, {"bits": 8}),
        (torch.float16, {"bits": 8}),
        (torch.bfloat16, {"bits": 32, "stochastic_rounding": True}),
        (torch.bfloat16, {"bits": 8, "stochastic_rounding": True}),
    ],
)
def test_a_resumed_optimizer_is_bit_identical(
    device: str, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    def make(params: list[Any]) -> PagedAdamW:
        groups = [{"params": params[:4], "weight_decay": 0.1}, {"params": params[4:], "lr": 0.02}]
        return PagedAdamW(groups, lr=0.05, **options)

    whole = run(make(parameters(dtype=dtype, device=device)), range(3))
    saved = copy.deepcopy(whole.state_dict())
    values = [p.detach().clone() for group in whole.param_groups for p in group["params"]]
    resumed = make([torch.nn.Parameter(value) for value in values])
    resumed.load_state_dict(saved)
    assert_same(resumed, whole)
    assert_same(run(resumed, range(3, 6)), run(whole, range(3, 6)))
    for value in (t for state in saved["state"].values() for t in state.values()):
        value.fill_(99)  # the caller's: nothing of it is kept
    assert_same(resumed, whole)
    resumed.load_state_dict(resumed.state_dict())
    assert_same(resumed, whole)
    assert resumed.state_bytes == whole.state_bytes


def test_hooks_of_loading_are_called_and_may_change_the_state() -> None:
    optimizer, seen = run(PagedAdamW(parameters()), range(1)), []
    saved = optimizer.state_dict()

    def before(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return state | {"param_groups": [group | {"lr": 7.0} for group in state["param_groups"]]}

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append(1))
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert seen == [1]
    assert saved["param_groups"][0]["lr"] == 1e-3


def test_a_copy_has_state_of_its_own() -> None:
    optimizer = run(PagedAdamW(parameters(), bits=8), range(2))
    twin = copy.deepcopy(optimizer)
    assert_same(twin, optimizer)
    kept = contents(optimizer)
    run(twin, range(2, 3))
    assert all(map(torch.equal, contents(optimizer), kept))
    assert_same(run(optimizer, range(2, 3)), twin)


def test_state_that_is_cleared_starts_afresh_and_replaced_is_refused() -> None:
    fresh, optimizer = PagedAdamW(parameters()), run(PagedAdamW(parameters()), range(2))
    params = optimizer.param_groups[0]["params"]
    for p, q in zip(params, fresh.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    optimizer.state.clear()
    assert_same(run(optimizer, range(1)), run(fresh, range(1)))
    assert optimizer.state_bytes == fresh.state_bytes
    del optimizer.state[params[1]]
    run(optimizer, range(1, 2))
    assert optimizer.state[params[1]]["step"] == 1
    assert optimizer.state[params[0]]["step"] == 2
    optimizer.state[params[0]]["exp_avg"] = torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match="the state of a parameter was replaced"):
        optimizer.step()


def _with(state: dict[str, Any], index: int, **changes: Any) -> dict[str, Any]:
    states = dict(state["state"])
    states[index] = {k: v for k, v in (states[index] | changes).items() if v is not None}
    return state | {"state": states}


def _groups(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return state | {"param_groups": [group | changes for group in state["param_groups"]]}


@pytest.mark.parametrize(
    ("bits", "change", "message"),
    [
        (32, lambda s: {"state": s["state"]}, "must have param_groups"),
        (32, lambda s: _groups(s, params=[0]), r"groups of \[3\] parameters; got \[1\]"),
        (32, lambda s: _groups(s, amsgrad=True), "amsgrad must be False"),
        (32, lambda s: _groups(s, maximize=True), "maximize must be False"),
        (32, lambda s: _groups(s, capturable=True), "capturable must be False"),
        (32, lambda s: _groups(s, lr=-1.0), r"lr must be at least 0 and finite; got -1\.0"),
        (32, lambda s: _with(s, 1, exp_avg=None), "parameter 1 lacks exp_avg"),
        (32, lambda s: _with(s, 1, step=None), "parameter 1 lacks step"),
        (32, lambda s: _with(s, 1, step=1.5), "step must be a whole number"),
        (32, lambda s: _with(s, 1, step="1"), "step must be a number"),
        (32, lambda s: _with(s, 1, max_exp_avg_sq=torch.ones(4)), "state of amsgrad"),
        (32, lambda s: _with(s, 1, momentum=torch.ones(4)), "unknown state momentum"),
        (32, lambda s: _with(s, 1, exp_avg=torch.ones(5)), r"must have shape \(4, 2\); got \(5,\)"),
        (32, lambda s: _with(s, 1, exp_avg=[1.0]), "exp_avg must be a tensor; got list"),
        (32, lambda s: _with(s, 1, exp_avg=torch.ones(4, 2).int()), "must be floating point"),
        (32, lambda s: _with(s, 1, exp_avg_absmax=torch.ones(1)), "8-bit state, and .* bits=32"),
        (
            32,
            lambda s: s | {"state": {7: {"step": 1}}},
            "parameter 7 has state, and is in no group",
        ),
        (8, lambda s: _with(s, 1, exp_avg_absmax=None), "parameter 1 lacks exp_avg_absmax"),
        (8, lambda s: _with(s, 1, exp_avg=torch.ones(4, 2)), r"8-bit codes \(torch\.uint8\)"),
        (8, lambda s: _with(s, 2, exp_avg_absmax=torch.ones(2)), r"shape \(3,\); got \(2,\)"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(bits: int, change: Any, message: str) -> None:
    optimizer = run(PagedAdamW(parameters([(3,), (4, 2), (600,)]), bits=bits), range(2))
    groups, kept = copy.deepcopy(optimizer.state_dict()["param_groups"]), contents(optimizer)
    other = run(PagedAdamW(parameters([(3,), (4, 2), (600,)]), bits=bits, lr=5.0), range(4))
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.load_state_dict(change(other.state_dict()))
    assert all(map(torch.equal, contents(optimizer), kept))
    assert optimizer.state_dict()["param_groups"] == groups


def test_states_of_other_bits_are_refused() -> None:
    """In both directions, in words."""
    shapes = [(3,)]
    long, short = (run(PagedAdamW(parameters(shapes), bits=b), range(1)) for b in (32, 8))
    with pytest.raises(
        ValueError, match="parameter 0 has 8-bit state, and this optimizer has bits=32"
    ):
        long.load_state_dict(short.state_dict())
    with pytest.raises(ValueError, match=r"lacks exp_avg_absmax, .*, as 8-bit state has"):
        short.load_state_dict(long.state_dict())


# --- Buckets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [32, 8])
def test_results_do_not_depend_on_buckets(bits: int, device: str) -> None:
    whole = run(PagedAdamW(parameters(device=device), bits=bits), range(3), missing=0.3)
    for size in (1, state_bytes([1000, 1000, 1000], bits), 2**20):
        with small_buckets(size) as calls:
            split = run(PagedAdamW(parameters(device=device), bits=bits), range(3), missing=0.3)
        assert_same(split, whole)
        assert split.state_bytes == whole.state_bytes
        if size == 1:
            assert set(calls) == {1}


def test_a_bucket_takes_no_more_than_it_may() -> None:
    tile = state_bytes([1], 32)
    shapes = [(1024,), (1025,), (1,), (5000,), (1,), (2,), (3,)]
    with small_buckets(3 * tile) as calls:
        run(PagedAdamW(parameters(shapes)), range(1))
    assert calls == [2, 1, 1, 3], "tiles: 1 + 2, 1, 5 on their own, 1 + 1 + 1"


def test_fresh_state_is_zero_and_so_is_what_lies_between() -> None:
    fresh = buckets.new_bucket(parameters([(1025,), (3,)]), 8, paged=False).buffers
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        assert fresh[name].shape == (3 * STATE_TILE,)
        assert (fresh[name] == state_zero_code(signed)).all()
        assert not fresh[f"{name}_absmax"].any()


def test_dtypes_have_buckets_of_their_own_and_share_nothing() -> None:
    params = parameters([(5,), (6,)]) + parameters([(7,), (8,)], torch.bfloat16)
    params = [params[i] for i in (0, 2, 1, 3)]
    with small_buckets(2**20) as calls:
        optimizer = run(PagedAdamW(params), range(2))
    assert calls == [2, 2, 2, 2]
    states = [t for state in optimizer.state.values() for t in state.values()]
    places = sorted((t.data_ptr(), t.numel() * t.element_size()) for t in states)
    assert all(a + size <= b for (a, size), (b, _) in pairwise(places))


@given(numels=st.lists(st.integers(0, 5000), max_size=6), bits=st.sampled_from([32, 8]))
@settings(max_examples=30)
def test_state_bytes_are_what_is_allocated(numels: list[int], bits: int) -> None:
    params = [torch.nn.Parameter(torch.zeros(n)) for n in (*numels, 1)]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = PagedAdamW(params, bits=bits)
    assert optimizer.state_bytes == 0
    with small_buckets(20_000):
        optimizer.step()
    views = [t for s in optimizer.state.values() for k, t in s.items() if k != "step"]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in views}
    assert sum(storages.values()) == optimizer.state_bytes == state_bytes([*numels, 1], bits)


def test_eight_bits_take_a_quarter() -> None:
    assert state_bytes([2**20], 32) == 8 * 2**20
    assert state_bytes([2**20], 8) == 2 * 2**20 + 2 * 4 * 2**20 // 256
    assert state_bytes([], 8) == 0
    with pytest.raises(ValueError, match="bits must be 32 or 8; got 16"):
        state_bytes([1], 16)


# --- Paging -----------------------------------------------------------------------------------------


def test_the_next_bucket_is_fetched_while_one_is_updated(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of two streams, with what each waits for."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.last = name, "nothing"

        def run(self, what: str) -> None:
            self.last = what
            log.append(f"{self.name}: {what}")

        def wait_stream(self, other: Any) -> None:
            self.run(f"wait for {other.last}")

        def wait_event(self, event: str) -> None:
            self.run(f"wait for {event}")

        def record_event(self) -> str:
            return self.last

    main, side = Stream("main"), Stream("side")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)

    def work(name: str, paged: bool = True) -> Any:
        bucket = SimpleNamespace(paged=paged, prefetch=lambda stream: stream.run(f"fetch {name}"))
        return SimpleNamespace(bucket=bucket, name=name)

    for item in paged._prefetched([work("a"), work("b"), work("c")], torch.device("cuda", 0)):
        main.run(f"update {item.name}")
    assert log == [
        "side: wait for nothing",
        "side: fetch a",
        "side: wait for nothing",
        "side: fetch b",
        "main: wait for fetch a",
        "main: update a",
        "side: wait for update a",
        "side: fetch c",
        "main: wait for fetch b",
        "main: update b",
        "main: wait for fetch c",
        "main: update c",
    ]


def test_the_cpu_has_plain_memory_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "qlora.paged"), small_buckets(1):
        one = run(PagedAdamW(parameters(), bits=8), range(2))
        one.evict()
        one.prefetch()
        run(one, range(2, 4))
        one.load_state_dict(one.state_dict())
        other = run(PagedAdamW(parameters(), bits=8, paged=False), range(4))
    assert_same(one, other)
    assert [record.message for record in caplog.records] == [
        "PagedAdamW: no paging on the CPU, the optimizer's state is in plain memory"
    ]


@pytest.mark.parametrize("bits", [32, 8])
def test_state_goes_with_the_optimizer(bits: int) -> None:
    """At once, without the garbage collector, a hundred times."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            optimizer = run(PagedAdamW(parameters([(5,), (6,)]), bits=bits), range(1))
            held = [
                weakref.ref(b) for bucket in optimizer._buckets() for b in bucket.buffers.values()
            ]
            assert all(ref() is not None for ref in held)
            del optimizer
            assert all(ref() is None for ref in held)
    finally:
        gc.enable()


# --- Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, r"lr must be at least 0 and finite; got -1\.0"),
        ({"lr": float("nan")}, ValueError, "lr must be at least 0 and finite; got nan"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be one number; got a tensor of shape \(2,\)"),
        ({"lr": "fast"}, TypeError, "lr must be a number; got 'fast'"),
        ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] must be at least 0 and below 1; got 1\.0"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers"),
        ({"amsgrad": True}, ValueError, "amsgrad must be False"),
        ({"bits": 4}, ValueError, "bits must be 32 or 8; got 4"),
    ],
)
def test_wrong_options_are_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        PagedAdamW(parameters(), **options)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        ({"maximize": True}, ValueError, "maximize must be False"),
        ({"differentiable": True}, ValueError, "differentiable must be False"),
        (
            {"params": torch.zeros(2, dtype=torch.float64)},
            TypeError,
            r"params\[0\] .* torch\.float64",
        ),
        ({"params": torch.zeros(2, dtype=torch.complex64)}, TypeError, r"got torch\.complex64"),
        ({"params": torch.zeros(2, device="meta")}, ValueError, "on the CPU or a GPU; got meta"),
        ({"params": torch.zeros(2).to_sparse()}, TypeError, r"must be dense; got .*sparse"),
        (
            {"params": torch.zeros(2, dtype=torch.float16)},
            TypeError,
            "stochastic_rounding is for bf",
        ),
    ],
)
def test_a_group_that_is_refused_is_not_added(
    group: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = PagedAdamW(parameters(), stochastic_rounding=True)
    with pytest.raises(error, match=message):
        optimizer.add_param_group({"params": torch.zeros(2)} | group)
    assert len(optimizer.param_groups) == 1


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_that_is_named_twice_is_refused() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="params must not name a parameter twice"):
        PagedAdamW([p, p])


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    table = torch.nn.Embedding(4, 3, sparse=True)
    other = torch.nn.Parameter(torch.zeros(2))
    other.grad = torch.ones(2)
    table(torch.tensor([1])).sum().backward()
    optimizer = PagedAdamW([other, table.weight])
    with pytest.raises(TypeError, match="the gradient of parameter 1 must be dense; got layout"):
        optimizer.step()
    assert not other.any()
    assert not optimizer.state


# --- On a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@compiled_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_paged_unpaged_and_cpu_are_bit_identical(bits: int, dtype: torch.dtype) -> None:
    options = {"bits": bits, "stochastic_rounding": dtype == torch.bfloat16}
    with small_buckets(state_bytes([2000, 2000], bits)):
        on_cpu = run(PagedAdamW(parameters(dtype=dtype), **options), range(4), missing=0.2)
        for paging in (True, False):
            params = parameters(dtype=dtype, device="cuda")
            optimizer = PagedAdamW(params, **options, paged=paging)
            for step in range(4):
                run(optimizer, range(step, step + 1), missing=0.2)
                optimizer.evict()
                if step == 2:
                    optimizer.prefetch()
            assert_same(optimizer, on_cpu)


@pytest.mark.gpu
@compiled_only
def test_eviction_makes_room() -> None:
    free = torch.cuda.mem_get_info()[0]
    numel = min(2**26, free // 64) // 1024 * 1024  # 8 bytes of state each
    optimizer = PagedAdamW([torch.nn.Parameter(torch.zeros(numel, device="cuda"))])
    run(optimizer, range(1))
    optimizer.prefetch()
    torch.cuda.synchronize()
    resident = torch.cuda.mem_get_info()[0]
    optimizer.evict()
    torch.cuda.synchronize()
    assert torch.cuda.mem_get_info()[0] - resident > 0.9 * optimizer.state_bytes


@pytest.mark.gpu
@compiled_only
def test_no_optimizer_leaks_on_the_gpu() -> None:
    numel = min(2**24, torch.cuda.mem_get_info()[0] // 256)
    p = torch.nn.Parameter(torch.zeros(numel, device="cuda"))
    p.grad = torch.ones_like(p)
    first = None
    for _ in range(100):
        PagedAdamW([p]).step()
        torch.cuda.synchronize()
        first = first or torch.cuda.mem_get_info()[0]
    assert abs(torch.cuda.mem_get_info()[0] - first) < 8 * numel, "less than one is missing"
