"""Timing contenders side by side: each is checked first, and a wrong one is not timed.

All contenders of a case run in turns within one process, in a new random order each round, so that whatever
drifts (clock rate, temperature, another program) hits all alike. One sample is the mean time of a call over
all input sets of the case, which are fresh random tensors.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import clocks
from benchmarks.clocks import Call, Clock, first_line

TIMED, WRONG, FAILED, NOT_INSTALLED = "timed", "wrong", "failed", "not installed"
_CPU = torch.device("cpu")
CHECK_SEED = 20230523
"""torch's generators are seeded with it before the call that is checked: a check can redraw its dropout."""


@dataclass(frozen=True)
class Contender:
    """One way to do what a case asks for.

    Attributes:
        name: as it stands in the table.
        prepare: takes one input set and returns the call to time; what it does itself is not timed.
        check: takes the input set and what the call returned; raises AssertionError if that is wrong. None
            marks a yardstick: a call that does less than the case asks for, to see what the hardware gives.
        requires: packages without which it is listed as not installed.
        model: what it trains, from the input set, if its weights are to count into its peak of memory.
    """

    name: str
    prepare: Callable[[Any], Call]
    check: Callable[[Any, Any], None] | None
    requires: tuple[str, ...] = ()
    model: Callable[[Any], nn.Module] | None = None

    @property
    def is_yardstick(self) -> bool:
        return self.check is None


@dataclass(frozen=True)
class Case:
    """Something to do, and who competes in it.

    Attributes:
        group: what `--only` chooses by.
        name: shapes and data type, short.
        parameters: the same, for the JSON.
        inputs: makes an input set from a seed.
        contenders: the first is ours.
        targets: by contender, the least ratio of its time to ours that is aimed at.
        required: whether a target that is missed is a failure of the run.
        input_sets: how many input sets there are.
        device: where it runs.
        clock: how it is timed: `clocks.EAGER`, `GRAPH` or `HOST`.
        bytes_moved: the fewest bytes that device memory must move, if there is a saying.
        operations: floating point operations of the products; None if there are none.
        most_temporary_bytes: what ours may hold beyond inputs and results, where that is bounded.
        draws: whether calls draw from torch's generators, so that only the first after a seed can be drawn again.
        gradients: whether autograd is on.
    """

    group: str
    name: str
    parameters: Mapping[str, Any]
    inputs: Callable[[int], Any]
    contenders: Sequence[Contender]
    targets: Mapping[str, float] = field(default_factory=dict)
    required: bool = False
    input_sets: int = 1
    device: torch.device = _CPU
    clock: str = clocks.EAGER
    bytes_moved: int | None = None
    operations: int | None = None
    most_temporary_bytes: int | None = None
    draws: bool = False
    gradients: bool = True


@dataclass(frozen=True)
class Settings:
    """How long to measure: rounds until a case has used its seconds, within these bounds.

    A contender that has alone used three times the seconds of the case sits out after `slow_rounds`.
    """

    seconds: float = 4.0
    min_rounds: int = 7
    max_rounds: int = 60
    warmup_rounds: int = 1
    slow_rounds: int = 3


@dataclass(frozen=True)
class Timing:
    """What became of one contender; the percentiles are None unless `status` is "timed".

    `temporary_bytes` is what one call held beyond inputs and result, `peak_bytes` all that it held with its
    weights; None where that is not measured.
    """

    contender: str
    status: str
    reason: str = ""
    is_yardstick: bool = False
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    temporary_bytes: int | None = None
    peak_bytes: int | None = None


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

    def meets_target(self, timing: Timing) -> bool | None:
        """Whether the ratio is at least the contender's target; None if there is no saying."""
        target, ratio = self.case.targets.get(timing.contender), self.ratio(timing)
        return None if target is None or ratio is None else ratio >= target


def measure(
    case: Case,
    settings: Settings,
    clock: Clock | None = None,
    report: Callable[[str], None] = lambda doing: None,
) -> Measurement:
    """Check all contenders of a case, then time those that were right.

    Args:
        clock: by default the one of the case's device and kind.
        report: is told what is being done, for a progress bar.
    """
    with torch.set_grad_enabled(case.gradients):
        report("inputs")
        try:
            inputs = [case.inputs(seed) for seed in range(case.input_sets)]
        except Exception as error:  # the case is listed, and the next one is measured
            reason = f"inputs: {_reason(error)}"
            timings = (Timing(c.name, FAILED, reason, c.is_yardstick) for c in case.contenders)
            return Measurement(case, tuple(timings))
        admitted: dict[str, Timing] = {}
        calls: dict[str, Call] = {}
        for contender in case.contenders:
            report(f"check {contender.name}")
            admitted[contender.name], call = _admit(case, contender, inputs)
            if call is not None:
                calls[contender.name] = call
        clock = clock or clocks.clock_for(case.device, case.clock)
        samples, reasons = _time_in_turns(calls, case.input_sets, settings, clock, report)
    for name, reason in reasons.items():
        admitted[name] = replace(admitted[name], status=FAILED, reason=reason)
    timings = (_with_percentiles(admitted[c.name], samples.get(c.name)) for c in case.contenders)
    return Measurement(case, tuple(timings))


# --- Who is timed -----------------------------------------------------------------------------------


def _admit(case: Case, contender: Contender, inputs: Sequence[Any]) -> tuple[Timing, Call | None]:
    """A contender's status, and a call of it on all input sets; None if it is not timed."""
    timing = Timing(contender.name, TIMED, is_yardstick=contender.is_yardstick)
    if missing := [package for package in contender.requires if find_spec(package) is None]:
        return replace(timing, status=NOT_INSTALLED, reason=", ".join(missing)), None
    try:
        calls = [contender.prepare(one) for one in inputs]
        torch.manual_seed(CHECK_SEED)
        result = calls[0]()
        if contender.check is not None:
            contender.check(inputs[0], result)
        del result
        if case.device.type == "cuda":
            timing = _with_memory(timing, contender, calls[0], inputs[0])
        if case.clock != clocks.GRAPH:
            return timing, partial(clocks.run_all, calls)
        return timing, _captured(case, contender, calls, inputs)
    except AssertionError as error:
        return replace(timing, status=WRONG, reason=first_line(error)), None
    except Exception as error:  # a peer may fail in any way, and the others can still be timed
        return replace(timing, status=FAILED, reason=_reason(error)), None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _with_memory(timing: Timing, contender: Contender, call: Call, one: Any) -> Timing:
    peak = None if contender.model is None else clocks.peak_bytes(call, contender.model(one))
    return replace(timing, temporary_bytes=clocks.temporary_bytes(call), peak_bytes=peak)


def _captured(
    case: Case, contender: Contender, calls: Sequence[Call], inputs: Sequence[Any]
) -> Call:
    """The replay of a graph of all calls, checked anew: a graph may hold less than the eager call did."""
    replay, results = clocks.capture(calls)
    if contender.check is not None:
        for tensor in _tensors(results):
            _spoil(tensor)
        torch.manual_seed(CHECK_SEED)
        replay()
        known = 1 if case.draws else len(results)
        for one, result in zip(inputs[:known], results[:known], strict=True):
            contender.check(one, result)
        for tensor in _tensors(results[known:]):
            if not tensor.isfinite().all():
                raise AssertionError("a replay leaves something out")
    return replay


def _tensors(result: Any) -> Iterator[Tensor]:
    """Those of what a call returned: a tensor, or lists or tuples of tensors."""
    if isinstance(result, (list, tuple)):
        for part in result:
            yield from _tensors(part)
    elif isinstance(result, Tensor):
        yield result
    else:
        raise TypeError(f"a captured call must return tensors; got {type(result).__name__}")


def _spoil(tensor: Tensor) -> None:
    """Overwrite it, so that what a replay does not write shows."""
    if tensor.is_floating_point():
        tensor.fill_(torch.nan)
    else:
        tensor.bitwise_not_()


# --- Rounds -----------------------------------------------------------------------------------------


def _time_in_turns(
    calls: Mapping[str, Call],
    input_sets: int,
    settings: Settings,
    clock: Clock,
    report: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of a call on one input set, by contender, a sample for each round; and why others failed.

    Who fails has no samples and is not called again.
    """
    reasons: dict[str, str] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    used = dict.fromkeys(calls, 0.0)
    order, rounds = random.Random(0), -settings.warmup_rounds
    with _no_garbage_collection():
        while samples and _goes_on(rounds, sum(used.values()), settings):
            for name in order.sample(list(samples), len(samples)):
                if _sits_out(len(samples[name]), used[name], settings):
                    continue
                report(f"{name}, round {max(rounds, 0) + 1}")
                try:
                    seconds = clock(calls[name])
                except Exception as error:  # out of memory, or worse: the others go on
                    reasons[name] = _reason(error)
                    del samples[name]
                    continue
                if rounds >= 0:
                    samples[name].append(seconds / input_sets)
                    used[name] += seconds
            rounds += 1
    return samples, reasons


def _goes_on(rounds: int, spent: float, settings: Settings) -> bool:
    if rounds < settings.min_rounds:
        return True
    return rounds < settings.max_rounds and spent < settings.seconds


def _sits_out(rounds: int, used: float, settings: Settings) -> bool:
    return rounds >= settings.slow_rounds and used >= 3 * settings.seconds


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


def _with_percentiles(timing: Timing, samples: Sequence[float] | None) -> Timing:
    if samples is None:
        return timing
    p20, p50, p80 = (1e3 * percentile(samples, percent) for percent in (20, 50, 80))
    return replace(timing, rounds=len(samples), p20_ms=p20, p50_ms=p50, p80_ms=p80)


def percentile(samples: Sequence[float], percent: float) -> float:
    """The value below which `percent` of the samples lie, interpolated between neighbours."""
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])
