"""Results as JSON, and as a table on the terminal. The JSON alone is enough for every plot and table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.harness import Measurement, Settings, Timing
from qlora import files

SCHEMA = 1
_HEADER = ("", "p20 ms", "p50 ms", "p80 ms", "time / ours", "")


def record(
    measurements: Sequence[Measurement], settings: Settings, device: torch.device
) -> dict[str, Any]:
    """Everything that was measured, as a JSON object.

    `cases` is a list of {group, name, parameters, input_sets, timings}, a timing being {contender, status,
    reason, is_yardstick, rounds, p20_ms, p50_ms, p80_ms, time_over_ours, limit, keeps_limit} and the first that of ours.
    """
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "commit": machine.commit(),
        "device": machine.describe(device),
        "versions": machine.versions(),
        "settings": asdict(settings),
        "cases": [
            {
                "group": m.case.group,
                "name": m.case.name,
                "parameters": dict(m.case.parameters),
                "input_sets": m.case.input_sets,
                "timings": [_timing(m, timing) for timing in m.timings],
            }
            for m in measurements
        ],
    }


def _timing(measurement: Measurement, timing: Timing) -> dict[str, Any]:
    ratio = measurement.ratio(timing)
    return {
        **asdict(timing),
        "time_over_ours": ratio,
        "limit": measurement.case.limits.get(timing.contender),
        "keeps_limit": measurement.keeps_limit(timing),
    }


def read(path: Path) -> dict[str, Any]:
    """Read a result file; raises ValueError if it is of another layout."""
    result = files.read_json(path)
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}; got {result.get('schema')!r}")
    return result


def failures(result: Mapping[str, Any]) -> list[str]:
    """What is amiss: ours not timed, or a limit not kept."""
    found = []
    for case in result["cases"]:
        ours, *others = case["timings"]
        if ours["status"] != "timed":
            found.append(f"{case['name']}: {ours['contender']} {ours['status']}: {ours['reason']}")
        for other in others:
            if other["keeps_limit"] is False:
                taken = 1 / other["time_over_ours"]
                found.append(
                    f"{case['name']}: ours takes {taken:.2f} x {other['contender']},"
                    f" the limit is {other['limit']:g}"
                )
    return found


def table(result: Mapping[str, Any]) -> str:
    """One table of all cases, a block for each."""
    rows = list(_rows(result))
    cells = [row for row in rows if len(row) == len(_HEADER)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(_HEADER))]
    return "\n".join(
        (_aligned(row, widths) if len(row) == len(_HEADER) else row[0]).rstrip() for row in rows
    )


def _aligned(row: tuple[str, ...], widths: Sequence[int]) -> str:
    name, *numbers, note = row
    columns = [f"{number:>{w}}" for number, w in zip(numbers, widths[1:], strict=False)]
    return "  ".join([f"{name:<{widths[0]}}", *columns, note])


def _rows(result: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    yield _HEADER
    for case in result["cases"]:
        yield ("",)
        yield (f"{case['group']}: {case['name']}{_weights(case['parameters'])}",)
        for timing in case["timings"]:
            yield _row(timing)


def _weights(parameters: Mapping[str, Any]) -> str:
    return f", {parameters['weights']} weights" if "weights" in parameters else ""


def _row(timing: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"  {timing['contender']}"
    if timing["status"] != "timed":
        reason = f" ({timing['reason']})" if timing["reason"] else ""
        return (name, "-", "-", "-", "-", f"{timing['status']}{reason}")
    times = (_digits(timing[key]) for key in ("p20_ms", "p50_ms", "p80_ms"))
    ratio = timing["time_over_ours"]
    return (name, *times, "-" if ratio is None else f"{ratio:.2f}", _note(timing))


def _note(timing: Mapping[str, Any]) -> str:
    if timing["keeps_limit"] is not None:
        taken = f"ours takes {1 / timing['time_over_ours']:.2f} x"
        verdict = "kept" if timing["keeps_limit"] else "NOT KEPT"
        return f"{taken}, limit {timing['limit']:g}: {verdict}"
    return "yardstick" if timing["is_yardstick"] else ""


def _digits(milliseconds: float) -> str:
    """Four significant digits."""
    before_point = math.floor(math.log10(milliseconds)) + 1 if milliseconds > 0 else 1
    return f"{milliseconds:.{max(0, 4 - max(before_point, 1))}f}"
