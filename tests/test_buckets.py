"""The flat buffers of an optimizer's state: what they hold, how large they are, in which order they move."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora import buckets, unified
from qlora.buckets import state_bytes
from qlora.kernels.formats import STATE_TILE, state_zero_code
from qlora.paged import PagedAdamW
from tests.optimizers import DEVICES, assert_same, parameters, run, small_buckets


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


def test_a_bucket_comes_back_after_it_went_whatever_the_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name,
            record_event=lambda: f"evicted on {name}",
            wait_event=lambda event: log.append(f"{name}: wait for {event}"),
        )

    def migrate(to: str) -> Any:
        return lambda buffer, *rest: log.append(f"{rest[-1].name}: {to}")

    monkeypatch.setattr(unified, "prefetch", migrate("fetch"))
    monkeypatch.setattr(unified, "evict", migrate("evict"))
    bucket = buckets.new_bucket(parameters([(3,)]), 32, paged=False)
    bucket.prefetch(stream("side"))
    bucket.evict(stream("main"))
    bucket.prefetch(stream("side"))
    assert log == [
        *["side: fetch"] * 2,
        *["main: evict"] * 2,
        "side: wait for evicted on main",
        *["side: fetch"] * 2,
    ]
