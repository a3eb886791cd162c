"""Timing contenders side by side: each is checked first, and a wrong one is not timed.

All contenders of a case run in turns within one process, in a new random order each round, so that whatever
drifts (clock rate, temperature, another program) hits all alike. One sample is the mean time of a call over
all input sets of the case, which are fresh random tensors and together larger than a cache.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]
Clock = Callable[[Call], float]
"""Runs a call and returns how many seconds it took."""

TIMED, WRONG, FAILED, NOT_INSTALLED = "timed", "wrong", "failed", "not installed"


class WrongResult(AssertionError):
    """A contender's result is off by more than the case allows."""


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks for.

    Attributes:
        name: as it stands in the table.
        prepare: takes one input set and returns the call to time; what it does itself is not timed.
        requires: packages without which it is listed as not installed.
        tensors: what the call returns, as the tensors that `Case.check` expects. None marks a yardstick:
            a call that does less than the case asks for and is not checked, to see what the hardware gives.
    """

    name: str
    prepare: Callable[[Any], Call]
    requires: tuple[str, ...] = ()
    tensors: Callable[[Any], list[Tensor]] | None = list


@dataclass(frozen=True)
class Case:
    """Something to do, and who competes in it.

    Attributes:
        group: what `--only` chooses by.
        name: shapes and data type, short.
        parameters: the same, for the JSON.
        inputs: makes an input set from a seed.
        check: takes an input set and a contender's tensors; raises AssertionError if they are wrong.
        contenders: the first is ours.
        limits: by contender, what ours may take at most of its time.
        input_sets: how many input sets there are.
    """

    group: str
    name: str
    parameters: Mapping[str, Any]
    inputs: Callable[[int], Any]
    check: Callable[[Any, list[Tensor]], None]
    contenders: Sequence[Contender]
    limits: Mapping[str, float] = field(default_factory=dict)
    input_sets: int = 1


@dataclass(frozen=True)
class Settings:
    """How long to measure: rounds until a case has used its seconds, within these bounds."""

    seconds: float = 4.0
    min_rounds: int = 7
    max_rounds: int = 60
    warmup_rounds: int = 1


@dataclass(frozen=True)
class Timing:
    """What became of one contender; the percentiles are None unless `status` is "timed"."""

    contender: str
    status: str
    reason: str = ""
    is_yardstick: bool = False
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None


@dataclass(frozen=True)
class Measurement:
    """A case and the timings of its contenders, ours first."""

    case: Case
    timings: tuple[Timing, ...]

    @property
    def ours(self) -> Timing:
        return self.timings[0]

    def ratio(self, timing: Timing) -> float | None:
        """Median time of a contender over ours: above 1, ours is faster."""
        if self.ours.p50_ms is None or timing.p50_ms is None:
            return None
        return timing.p50_ms / self.ours.p50_ms

    def keeps_limit(self, timing: Timing) -> bool | None:
        """Whether ours takes at most `limits` times the contender's time; None if there is no saying."""
        limit, ratio = self.case.limits.get(timing.contender), self.ratio(timing)
        return None if limit is None or ratio is None else 1 / ratio <= limit


# --- Clocks -----------------------------------------------------------------------------------------


def cpu_clock(call: Call) -> float:
    """Wall-clock time."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock(call: Call) -> float:
    """Time between two events on the current stream: the GPU's own clock, without the launch of the first."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> Clock:
    return cuda_clock if device.type == "cuda" else cpu_clock


# --- Measuring --------------------------------------------------------------------------------------


def measure(
    case: Case,
    settings: Settings,
    clock: Clock,
    report: Callable[[str], None] = lambda doing: None,
) -> Measurement:
    """Check all contenders of a case, then time those that were right.

    Args:
        clock: see `clock_for`.
        report: is told what is being done, for a progress bar.
    """
    report("inputs")
    inputs = [case.inputs(seed) for seed in range(case.input_sets)]
    calls: dict[str, list[Call]] = {}
    refused: dict[str, Timing] = {}
    for contender in case.contenders:
        report(f"check {contender.name}")
        outcome = _admit(case, contender, inputs)
        if isinstance(outcome, Timing):
            refused[contender.name] = outcome
        else:
            calls[contender.name] = outcome
    samples = _time_in_turns(calls, settings, clock, report)
    timings = (refused.get(c.name) or _timing(c, samples[c.name]) for c in case.contenders)
    return Measurement(case, tuple(timings))


def _admit(case: Case, contender: Contender, inputs: Sequence[Any]) -> list[Call] | Timing:
    """The calls of a contender, one for each input set, or why it is not timed."""
    yardstick = contender.tensors is None
    if missing := [package for package in contender.requires if not _installed(package)]:
        return Timing(contender.name, NOT_INSTALLED, ", ".join(missing), yardstick)
    try:
        calls = [contender.prepare(one) for one in inputs]
        result = calls[0]()
        if contender.tensors is not None:
            case.check(inputs[0], contender.tensors(result))
    except AssertionError as error:
        return Timing(contender.name, WRONG, _first_line(error), yardstick)
    except Exception as error:  # a peer may fail in any way, and the others can still be timed
        reason = f"{type(error).__name__}: {_first_line(error)}"
        return Timing(contender.name, FAILED, reason, yardstick)
    return calls


def _time_in_turns(
    calls: Mapping[str, list[Call]],
    settings: Settings,
    clock: Clock,
    report: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of a call, by contender, a sample for each round."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, spent, rounds = random.Random(0), 0.0, -settings.warmup_rounds
    with _no_garbage_collection():
        while calls and _goes_on(rounds, spent, settings):
            for name in order.sample(list(calls), len(calls)):
                report(f"{name}, round {max(rounds, 0) + 1}")
                seconds = clock(lambda sets=calls[name]: _run_all(sets))
                if rounds >= 0:
                    samples[name].append(seconds / len(calls[name]))
                    spent += seconds
            rounds += 1
    return samples


def _goes_on(rounds: int, spent: float, settings: Settings) -> bool:
    if rounds < settings.min_rounds:
        return True
    return rounds < settings.max_rounds and spent < settings.seconds


def _run_all(calls: Iterable[Call]) -> None:
    for call in calls:
        call()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection would be charged to whoever happens to run."""
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _timing(contender: Contender, samples: Sequence[float]) -> Timing:
    return Timing(
        contender.name,
        TIMED,
        is_yardstick=contender.tensors is None,
        rounds=len(samples),
        p20_ms=1e3 * percentile(samples, 20),
        p50_ms=1e3 * percentile(samples, 50),
        p80_ms=1e3 * percentile(samples, 80),
    )


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, interpolated between neighbours."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _installed(package: str) -> bool:
    return find_spec(package) is not None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
