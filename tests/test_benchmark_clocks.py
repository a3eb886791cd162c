"""Time and memory of a call: which clock a case gets, and on a GPU graphs, events and the peak of memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import clocks, harness
from benchmarks.harness import Case, Contender, Settings, measure

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
QUICKLY = Settings(seconds=0.0, min_rounds=1, max_rounds=1)


def test_the_clock_of_a_case() -> None:
    assert clocks.clock_for(CPU) is clocks.clock_for(CPU, clocks.HOST) is clocks.cpu_clock
    assert clocks.clock_for(CUDA, clocks.HOST) is clocks.host_clock
    for kind in (clocks.EAGER, clocks.GRAPH):
        assert isinstance(clocks.clock_for(CUDA, kind), clocks.CudaClock)


def test_wall_clock() -> None:
    assert 0.02 <= clocks.cpu_clock(lambda: time.sleep(0.02)) < 1.0


def test_the_host_clock_starts_idle_and_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synchronized before and after, never within: only the call itself is timed."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: (events.append("sync"), time.sleep(0.2)))
    seconds = clocks.host_clock(lambda: events.append("call"))
    assert events == ["sync", "call", "sync"]
    assert seconds < 0.2


def test_an_error_in_one_line() -> None:
    assert clocks.first_line(ValueError("\n first\nsecond")) == "first"
    assert clocks.first_line(ValueError()) == "no message"


# --- Graphs, with a stand-in ------------------------------------------------------------------------


def scale(factor: float) -> Callable[[Tensor], Callable[[], Tensor]]:
    return lambda x: lambda: factor * x


def check(x: Tensor, result: Tensor) -> None:
    if not torch.equal(result, 2 * x):
        raise AssertionError("not twice the input")


def replayed(prepare: Any, device: torch.device = CPU) -> Case:
    return Case(
        "doubling",
        "4",
        {},
        lambda seed: torch.full((4,), float(seed + 1), device=device),
        (Contender("ours", prepare, check),),
        input_sets=3,
        clock=clocks.GRAPH,
        device=device,
    )


def stand_in(forgotten: int = 0) -> Callable[[list], tuple]:
    """A capture whose replay leaves out the last results, as a launch on another stream would be."""

    def capture(calls: list[Callable[[], Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        results = [call() for call in calls]

        def replay() -> None:
            for call, result in list(zip(calls, results, strict=True))[: len(calls) - forgotten]:
                result.copy_(call())

        return replay, results

    return capture


def test_a_replay_is_timed_over_all_input_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "capture", stand_in())
    (ours,) = measure(replayed(scale(2.0)), QUICKLY, lambda call: call() or 6.0).timings
    assert (ours.status, ours.p50_ms) == ("timed", 2000.0)


def test_a_replay_that_leaves_something_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "capture", stand_in(forgotten=1))
    (ours,) = measure(replayed(scale(2.0)), QUICKLY, lambda call: 1.0).timings
    assert (ours.status, ours.reason) == ("wrong", "not twice the input")


def test_what_cannot_be_captured_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(calls: list) -> None:
        raise clocks.CannotCapture("cannot be captured: it waits")

    monkeypatch.setattr(clocks, "capture", capture)
    (ours,) = measure(replayed(scale(2.0)), QUICKLY, lambda call: 1.0).timings
    assert (ours.status, ours.reason) == ("failed", "CannotCapture: cannot be captured: it waits")


def test_one_tensor_is_spoilt() -> None:
    tensor = torch.ones(3)
    harness._spoil(tensor)
    assert tensor.isnan().all()
    with pytest.raises(TypeError, match="must return one tensor; got list"):
        harness._spoil([tensor])


# --- On a GPU ---------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_a_graph_holds_all_calls() -> None:
    inputs = [torch.full((1000,), float(i), device="cuda") for i in range(3)]
    replay, results = clocks.capture([lambda x=x: 2 * x for x in inputs])
    for x, result in zip(inputs, results, strict=True):
        result.zero_()
        x.add_(1)
    replay()
    for i, result in enumerate(results):
        assert (result == 2 * (i + 1)).all()


@pytest.mark.gpu
def test_a_call_that_waits_cannot_be_captured() -> None:
    x = torch.ones(4, device="cuda")
    with pytest.raises(clocks.CannotCapture, match="cannot be captured"):
        clocks.capture([lambda: x * x.sum().item()])
    assert (x + 1).sum().item() == 8  # the device goes on
    (ours,) = measure(
        replayed(lambda x: lambda: x * x.new_full((), 2.0).item(), CUDA), QUICKLY
    ).timings
    assert ours.status == "failed"
    (ours,) = measure(replayed(scale(2.0), CUDA), QUICKLY).timings
    assert ours.status == "timed", ours.reason
    assert ours.temporary_bytes == 0


@pytest.mark.gpu
def test_device_and_host_time() -> None:
    """Much work in one launch: the device needs far longer than the host."""
    a = torch.randn(4096, 4096, device="cuda")
    on_device, on_host = (clocks.clock_for(CUDA, kind) for kind in (clocks.EAGER, clocks.HOST))
    for clock in (on_device, on_host):
        clock(lambda: a @ a)
    work = min(on_device(lambda: [a @ a for _ in range(4)]) for _ in range(3))
    launch = min(on_host(lambda: a @ a) for _ in range(3))
    assert work > 4 * launch
    assert work > 0.5e-3
    many = min(on_device(lambda: [a @ a for _ in range(16)]) for _ in range(3))
    assert many == pytest.approx(4 * work, rel=0.5)


@pytest.mark.gpu
def test_temporary_bytes() -> None:
    """What is neither input nor result: one of two tensors of 4 MiB, or none."""
    x = torch.ones(2**20, device="cuda")
    assert clocks.temporary_bytes(lambda: (x + 1) * 2) == pytest.approx(2**22, rel=0.3)
    assert clocks.temporary_bytes(lambda: x + 1) == 0
    assert clocks.temporary_bytes(lambda: [x + 1, x + 2]) == 0
