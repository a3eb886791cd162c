"""Time and memory of a call: which clock a case gets, and on a GPU graphs, events and the peak of memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import clocks, harness
from benchmarks.harness import Case, Contender, Settings, measure

ROOT = Path(__file__).resolve().parents[1]
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


def test_all_that_a_call_returned_is_spoilt() -> None:
    codes, values = torch.arange(4, dtype=torch.uint8), torch.ones(3)
    for tensor in harness._tensors([(codes, values), values]):
        harness._spoil(tensor)
    assert (codes != torch.arange(4)).all()
    assert values.isnan().all()
    with pytest.raises(TypeError, match="must return tensors; got int"):
        list(harness._tensors([values, 1]))


def random_double(x: Tensor) -> Callable[[], Tensor]:
    return lambda: 2 * x + torch.rand(4)


def check_drawn_again(x: Tensor, result: Tensor) -> None:
    torch.manual_seed(harness.CHECK_SEED)
    check(x, result - torch.rand(4))


def test_of_a_replay_that_draws_the_first_is_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the others no more is known than that they were written."""
    ours = Contender("ours", random_double, check_drawn_again)
    case = replace(replayed(random_double), contenders=(ours,), draws=True)
    case = replace(case, inputs=lambda seed: torch.full((4,), 1024.0))  # rounds away nothing
    for forgotten, status in ((0, "timed"), (1, "wrong"), (3, "wrong")):
        monkeypatch.setattr(clocks, "capture", stand_in(forgotten))
        (timing,) = measure(case, QUICKLY, lambda call: 1.0).timings
        assert timing.status == status, timing.reason


def test_a_failed_capture_leaves_torch_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    usual, current, ended, modes = FakeStream("usual"), [], [], []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: usual)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: FakeStream("capture"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_stream", current.append)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool=None, stream=None: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(
        torch._C, "_cuda_endAllocateToPool", lambda *pool: ended.append(pool), raising=False
    )
    monkeypatch.setattr(clocks, "_NOT_CAPTURED", [])

    def breaks(after: int) -> Callable[[], float]:
        left = iter(range(after))
        return lambda: next(left)  # then raises StopIteration

    with pytest.raises(clocks.CannotCapture, match="cannot be captured"):
        clocks.capture([breaks(1)])  # found by the run that may not wait: no capture has begun
    assert (modes, current, ended) == (["error", 0], [], [])
    with pytest.raises(clocks.CannotCapture, match="cannot be captured"):
        clocks.capture([breaks(2)])
    assert (current, ended) == ([usual], [(0, (0, 7))])
    assert len(clocks._NOT_CAPTURED) == 1


class FakeStream(SimpleNamespace):
    device = torch.device("cpu", 0)

    def __init__(self, name: str) -> None:
        super().__init__(name=name, wait_stream=lambda other: None)


def test_why_a_device_takes_no_more_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert clocks.device_error(CUDA) == "CUDA error: an illegal memory access"
    assert clocks.device_error(CPU) == ""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert clocks.device_error(CUDA) == ""


def test_the_cache_is_read_over_before_the_first_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only read: lines that were written to would have to leave the cache while the call runs."""
    log: list[str] = []

    class Event(SimpleNamespace):
        def __init__(self, enable_timing: bool) -> None:
            super().__init__(
                record=lambda: log.append("event"),
                synchronize=lambda: log.append("wait"),
                elapsed_time=lambda end: 3.0,
            )

    clock = clocks.CudaClock(CPU)
    clock.__dict__["_buffer"] = SimpleNamespace(sum=lambda: log.append("read"))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert clock(lambda: log.append("call")) == pytest.approx(3e-3)
    assert log == ["read", "event", "call", "event", "wait"]


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
    """In a process of its own: what a failed capture leaves behind is not for the other tests."""
    program = f"from tests.{Path(__file__).stem} import fail_to_capture; fail_to_capture()"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def fail_to_capture() -> None:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(clocks, "_refuse_to_wait", lambda calls: None)
    x = torch.ones(4, device="cuda")
    with pytest.raises(clocks.CannotCapture, match="cannot be captured"):
        clocks.capture([lambda: x * x.sum().item()])
    monkeypatch.undo()
    with pytest.raises(clocks.CannotCapture, match="cannot be captured"):
        clocks.capture([lambda: x * x.sum().item()])
    assert (x + 1).sum().item() == 8  # the device goes on
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(4, device="cuda")
    torch.cuda.empty_cache()
    (ours,) = measure(
        replayed(lambda x: lambda: x * x.new_full((), 2.0).item(), CUDA), QUICKLY
    ).timings
    assert ours.status == "failed"
    (ours,) = measure(replayed(scale(2.0), CUDA), QUICKLY).timings
    assert ours.status == "timed", ours.reason
    assert ours.temporary_bytes == 0


@pytest.mark.gpu
def test_device_and_host_time() -> None:
    a = torch.randn(4096, 4096, device="cuda")
    for kind in (clocks.EAGER, clocks.HOST):
        assert 0 < clocks.clock_for(CUDA, kind)(lambda: a @ a) < 10


@pytest.mark.gpu
def test_peak_bytes() -> None:
    """A weight of 4 MiB, and two tensors of 4 MiB on top; what else is allocated does not count."""
    others = torch.ones(2**21, device="cuda")
    layer, x = (
        torch.nn.Linear(1024, 1024, bias=False, device="cuda"),
        others[: 2**20].view(1024, -1),
    )
    with torch.no_grad():
        layer(x)  # cuBLAS allocates its workspace at the first product
        assert clocks.peak_bytes(lambda: layer(x) + 1, layer) == pytest.approx(3 * 2**22, rel=0.1)


@pytest.mark.gpu
def test_temporary_bytes() -> None:
    """What is neither input nor result: one of two tensors of 4 MiB, or none."""
    x = torch.ones(2**20, device="cuda")
    assert clocks.temporary_bytes(lambda: (x + 1) * 2) == pytest.approx(2**22, rel=0.3)
    assert clocks.temporary_bytes(lambda: x + 1) == 0
    assert clocks.temporary_bytes(lambda: [x + 1, x + 2]) == 0
