"""What a call takes: time on the host or the device, as eager launches or as a CUDA graph, and memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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

    Before the first event a buffer far larger than the cache is read. That leaves nothing of the last call in the
    cache, nor anything that would have to be written back first, and keeps the GPU busy while the first launches
    are queued, so that they are not timed.
    """

    READ_BYTES = 2**30

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.zeros(self.READ_BYTES // 4, device=self.device)

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._buffer.sum()
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
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        run_all(calls)  # whatever is compiled, or allocated for good, at the first call on a stream
        _refuse_to_wait(calls)
    usual.wait_stream(stream)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            results = run_all(calls)
    except Exception as error:
        _recover(graph, pool, usual)
        raise CannotCapture(f"cannot be captured: {first_line(error)}") from error
    return graph.replay, results


def _refuse_to_wait(calls: Sequence[Call]) -> None:
    """Find a call that waits for the device before a capture does, after which torch is in disorder."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run_all(calls)
    except Exception as error:
        raise CannotCapture(f"cannot be captured: {first_line(error)}") from error
    finally:
        torch.cuda.set_sync_debug_mode(mode)


_NOT_CAPTURED: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: torch's allocators may go on asking them."""


def _recover(graph: torch.cuda.CUDAGraph, pool: Any, usual: torch.cuda.Stream) -> None:
    """Undo what `torch.cuda.graph` leaves behind when a capture fails.

    That is its stream, an allocator that takes the capture to be under way, and generators that do, too, until
    another capture ends.
    """
    _NOT_CAPTURED.append(graph)
    torch.cuda.set_stream(usual)
    try:
        torch._C._cuda_endAllocateToPool(usual.device.index, pool)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=usual.device)
    except RuntimeError:  # the device is beyond recovery: `device_error` tells
        torch.cuda.set_stream(usual)


def device_error(device: torch.device) -> str:
    """Why the device takes no more work, as after an access out of bounds; empty if it does.

    Frees what a case has left in the allocator: the next one allocates other sizes.
    """
    if device.type != "cuda":
        return ""
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        return first_line(error)
    return ""


def temporary_bytes(call: Call) -> int:
    """The most device memory that one call holds beyond its inputs and its result; run it once before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    del result  # held until here: it counts as allocated
    return extra


def peak_bytes(call: Call, model: nn.Module) -> int:
    """The most device memory that a call holds with its model: the weights, and all that comes on top."""
    before = torch.cuda.memory_allocated()
    clone = copy.deepcopy(model)  # the weights themselves may be shared with other models
    held = torch.cuda.memory_allocated() - before
    del clone
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return held + torch.cuda.max_memory_allocated() - before


def first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
