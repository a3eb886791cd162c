"""PagedAdamW's step: torch's AdamW in numbers and manners, its state where it is said to be."""

from __future__ import annotations

import gc
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qlora import paged, unified
from qlora.kernels.formats import STATE_TILE
from qlora.paged import PagedAdamW, state_bytes
from tests.managed import free_bytes, sent_to, take
from tests.on_device import compiled_only
from tests.optimizers import assert_same, parameters, run, set_gradients, small_buckets
from tests.strategies import seeds

EPS = torch.finfo(torch.float32).eps

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


@pytest.mark.parametrize("bits", [32, 8])
def test_a_default_device_changes_nothing(bits: int) -> None:
    """Seeds, scalars, states and numbers that are loaded are made where they belong."""
    kept: list[PagedAdamW] = []
    for device in ("meta", "cpu"):
        params = parameters(dtype=torch.bfloat16)
        set_gradients(params, 0)
        torch.manual_seed(0)
        with torch.device(device):
            optimizer = PagedAdamW(params, bits=bits, stochastic_rounding=True)
            optimizer.step()
            state = optimizer.state_dict()
            for values in state["state"].values():
                values["step"] = int(values["step"])
            optimizer.load_state_dict(state)
            optimizer.step()
        kept.append(optimizer)
    assert_same(*kept)


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
    """In a process, however many optimizers there are."""
    paged._say_not_paged.cache_clear()
    with caplog.at_level(logging.INFO, "qlora.paged"), small_buckets(1):
        one = run(PagedAdamW(parameters(), bits=8), range(2))
        one.evict()
        one.prefetch()
        run(one, range(2, 4))
        one.load_state_dict(one.state_dict())
        other = run(PagedAdamW(parameters(), bits=8, paged=False), range(4))
        run(PagedAdamW(parameters()), range(1))
    assert_same(one, other)
    assert [record.message for record in caplog.records] == [
        "PagedAdamW: no paging on the CPU, the optimizer's state is in plain memory"
    ]


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
@pytest.mark.parametrize("bits", [32, 8])
def test_states_are_where_they_were_sent(bits: int) -> None:
    optimizer = PagedAdamW(parameters([(2**20,)] * 3, device="cuda"), bits=bits)

    def places() -> set[int]:
        return {sent_to(b) for bucket in optimizer._buckets() for b in bucket.buffers.values()}

    with small_buckets(state_bytes([2**20], bits)):
        run(optimizer, range(1))
        there = {torch.cuda.current_device()}
        assert places() == there
        optimizer.evict()
        assert places() == {unified.HOST}
        optimizer.prefetch()
        assert places() == there
        optimizer.evict()
        run(optimizer, range(1, 2))
        assert places() == there


@pytest.mark.gpu
@compiled_only
def test_states_make_room_and_come_back_unchanged() -> None:
    """Plain memory gets more than is free; the next step has the bits of an optimizer that kept its states."""
    # 8 bytes of state an element, and with gradients 32 in all for the two: half of what is free at most.
    numel = min(2**25, free_bytes() // 64 // 4) // STATE_TILE * STATE_TILE
    pair = []
    for paging in (True, False):
        params = [torch.nn.Parameter(torch.full((numel,), 1.0, device="cuda")) for _ in range(4)]
        for i, p in enumerate(params):
            p.grad = torch.arange(numel, device="cuda").remainder_(251 + i).float()
        pair.append(PagedAdamW(params, paged=paging))
        pair[-1].step()
    optimizer, twin = pair
    optimizer.prefetch()
    # Half of the states: the driver never hands out the last of what it counts as free.
    take(free_bytes() + optimizer.state_bytes // 2)
    for each in pair:
        each.step()
    for p, q in zip(*(each.param_groups[0]["params"] for each in pair), strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, twin.state[q][name])


@pytest.mark.gpu
@compiled_only
def test_no_optimizer_leaks_on_the_gpu() -> None:
    gc.collect()  # what earlier tests left would come back in between
    numel = min(2**24, torch.cuda.mem_get_info()[0] // 256)
    p = torch.nn.Parameter(torch.zeros(numel, device="cuda"))
    p.grad = torch.ones_like(p)
    first = None
    for _ in range(100):
        PagedAdamW([p]).step()
        torch.cuda.synchronize()
        first = first or torch.cuda.mem_get_info()[0]
    assert first - torch.cuda.mem_get_info()[0] < 8 * numel, "less than one is missing"
