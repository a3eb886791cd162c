"""What a call takes: time on the host or the device, as eager launches or as a CUDA graph, and memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call and returns how many seconds it took."""

EAGER, GRAPH, HOST = "eager", "graph", "host"
"""How a case is timed: launched from Python, replayed from a captured CUDA graph, or the launch itself."""


class CannotCapture(RuntimeError):
    """A call does what a CUDA graph cannot hold."""


def clock_for(device: torch.device, kind: str = EAGER) -> Clock:
    """The clock of a case on a device; a graph's replay is timed like any other call."""
    if device.type != "cuda":
        return cpu_clock
    return host_clock if kind == HOST else CudaClock(device)


def cpu_clock(call: Call) -> float:
    """Wall-clock time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def host_clock(call: Call) -> float:
    """Time until the call returns, from an idle device on: what Python and the launches cost, not the work."""
    torch.cuda.synchronize()
    seconds = cpu_clock(call)
    torch.cuda.synchronize()
    return seconds


class CudaClock:
    """Time between two events on the current stream: the GPU's own clock.

    Before the first event a buffer far larger than the cache is filled. That leaves nothing of the last call in
    the cache, and keeps the GPU busy while the first launches are queued, so that they are not timed.
    """

    FILLED_BYTES = 512 * 2**20

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty(self.FILLED_BYTES, dtype=torch.uint8, device=self.device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.zero_()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3


def run_all(calls: Sequence[Call]) -> list[Any]:
    """Run one after another; returns what each returned."""
    return [call() for call in calls]


def capture(calls: Sequence[Call]) -> tuple[Call, list[Any]]:
    """One CUDA graph of all calls: its replay, and the results that each replay writes anew.

    Raises CannotCapture with the reason.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run_all(calls)  # whatever is compiled, or allocated for good, at the first call on a stream
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            results = run_all(calls)
    except Exception as error:
        raise CannotCapture(f"cannot be captured: {first_line(error)}") from error
    return graph.replay, results


def temporary_bytes(call: Call) -> int:
    """The most device memory that one call holds beyond its inputs and its result; run it once before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result  # held until here: it counts as allocated
    return extra


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
