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

SCHEMA = 2
_HEADER = ("", "p20 ms", "p50 ms", "p80 ms", "time / ours", "")


def begin(settings: Settings, device: torch.device, ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object of a run, without a case as yet.

    `ceilings` are those of `ceilings.measure`; `complete` becomes true at the end of a run of everything; `cases`
    is to be a list of what `case_record` gives.
    """
    return {
        "schema": SCHEMA,
        "date": date.today().isoformat(),
        "commit": machine.commit(),
        "device": machine.describe(device),
        "versions": machine.versions(),
        "settings": asdict(settings),
        "complete": False,
        "ceilings": dict(ceilings),
        "cases": [],
    }


def case_record(measurement: Measurement) -> dict[str, Any]:
    """One case as a JSON object.

    {group, name, parameters, input_sets, clock, bytes_moved, operations, required, most_temporary_bytes, timings},
    a timing being {contender, status, reason, is_yardstick, rounds, p20_ms, p50_ms, p80_ms, temporary_bytes,
    peak_bytes, time_over_ours, target, meets_target} and the first that of ours.
    """
    case = measurement.case
    return {
        "group": case.group,
        "name": case.name,
        "parameters": dict(case.parameters),
        "input_sets": case.input_sets,
        "clock": case.clock,
        "bytes_moved": case.bytes_moved,
        "operations": case.operations,
        "required": case.required,
        "most_temporary_bytes": case.most_temporary_bytes,
        "timings": [_timing(measurement, timing) for timing in measurement.timings],
    }


def _timing(measurement: Measurement, timing: Timing) -> dict[str, Any]:
    return {
        **asdict(timing),
        "time_over_ours": measurement.ratio(timing),
        "target": measurement.case.targets.get(timing.contender),
        "meets_target": measurement.meets_target(timing),
    }


def read(path: Path) -> dict[str, Any]:
    """Read a result file; raises ValueError if it is of another layout."""
    result = files.read_json(path)
    if result.get("schema") != SCHEMA:
        raise ValueError(f"{path}: schema must be {SCHEMA}; got {result.get('schema')!r}")
    return result


def failures(result: Mapping[str, Any]) -> list[str]:
    """What is amiss: ours not timed, or a required target missed."""
    found = []
    for case in result["cases"]:
        ours, *others = case["timings"]
        if ours["status"] != "timed":
            found.append(f"{case['name']}: {ours['contender']} {ours['status']}: {ours['reason']}")
        found += [
            f"{case['name']}: {other['contender']} takes {other['time_over_ours']:.2f} x our time,"
            f" required is at least {other['target']:.2f}"
            for other in others
            if case["required"] and other["meets_target"] is False
        ]
    return found


def shares(case: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, float]:
    """What part of our time the "copy" of the bytes and the "product"'s operations would take at the ceilings."""
    p50_ms = case["timings"][0]["p50_ms"]
    copy = ceilings.get("copy_gb_per_s")
    product = ceilings.get("product_tflop_per_s", {}).get(case["parameters"].get("dtype"))
    found = {}
    if p50_ms and case["bytes_moved"] and copy:
        found["copy"] = case["bytes_moved"] / (copy * 1e6) / p50_ms
    if p50_ms and case["operations"] and product:
        found["product"] = case["operations"] / (product * 1e9) / p50_ms
    return found


# --- The table --------------------------------------------------------------------------------------


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
    yield (_ceilings(result["ceilings"]),)
    for case in result["cases"]:
        yield ("",)
        yield (f"{case['group']}: {case['name']}{_details(case)}",)
        for timing in case["timings"]:
            yield _row(case, timing, result["ceilings"])


def _ceilings(ceilings: Mapping[str, Any]) -> str:
    speeds = [f"copy {ceilings['copy_gb_per_s']:.4g} GB/s"] if "copy_gb_per_s" in ceilings else []
    products = ceilings.get("product_tflop_per_s", {})
    speeds += [f"product in {dtype} {speed:.3g} TFLOP/s" for dtype, speed in products.items()]
    return f"ceilings: {', '.join(speeds) or 'not measured'}"


def _details(case: Mapping[str, Any]) -> str:
    weights = case["parameters"].get("weights")
    clock = {"graph": ", CUDA graph", "host": ", host time"}.get(case["clock"], "")
    return (f", {weights} weights" if weights else "") + clock


def _row(
    case: Mapping[str, Any], timing: Mapping[str, Any], ceilings: Mapping[str, Any]
) -> tuple[str, ...]:
    name = f"  {timing['contender']}"
    if timing["status"] != "timed":
        reason = f" ({timing['reason']})" if timing["reason"] else ""
        return (name, "-", "-", "-", "-", f"{timing['status']}{reason}")
    times = (_digits(timing[key]) for key in ("p20_ms", "p50_ms", "p80_ms"))
    ratio = timing["time_over_ours"]
    notes = ", ".join(_notes(case, timing, ceilings))
    return (name, *times, "-" if ratio is None else f"{ratio:.2f}", notes)


def _notes(
    case: Mapping[str, Any], timing: Mapping[str, Any], ceilings: Mapping[str, Any]
) -> Iterator[str]:
    is_ours = timing is case["timings"][0]
    if timing["is_yardstick"]:
        yield "yardstick"
    if timing["meets_target"] is not None:
        least = f"{'required' if case['required'] else 'target'} {timing['target']:.2f}"
        verdict = "met" if timing["meets_target"] else f"missed ({timing['time_over_ours']:.2f})"
        yield f"{least}: {verdict}"
    if is_ours:
        yield from (f"{share:.0%} of {name}" for name, share in shares(case, ceilings).items())
    if tokens := case["parameters"].get("tokens"):
        yield f"{1e3 * tokens / timing['p50_ms']:,.0f} tokens/s"
    if timing["peak_bytes"] is not None:
        yield f"{timing['peak_bytes'] / 2**20:.0f} MiB with its weights"
    if timing["temporary_bytes"] is not None:
        most = case["most_temporary_bytes"] if is_ours else None
        yield f"{timing['temporary_bytes'] / 2**20:.1f} MiB temporary{_bound(timing, most)}"


def _bound(timing: Mapping[str, Any], most: int | None) -> str:
    if most is None:
        return ""
    verdict = "met" if timing["temporary_bytes"] <= most else "missed"
    return f" (at most {most / 2**20:.0f}: {verdict})"


def _digits(milliseconds: float) -> str:
    """Four significant digits."""
    before_point = math.floor(math.log10(milliseconds)) + 1 if milliseconds > 0 else 1
    return f"{milliseconds:.{max(0, 4 - max(before_point, 1))}f}"
