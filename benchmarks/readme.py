"""README's section on speed, written from the stored results alone.

python -m benchmarks readme [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import figures, results
from benchmarks.harness import Measurement, Timing
from benchmarks.plot import PLOTS, RESULTS
from benchmarks.suite import GROUPS, all_cases
from qlora import files

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

_NOT_MEASURED = "not measured"
_LEGEND = """\
Medians of one run; beside *ours*, each contender's time over ours: above 1, ours is faster. In brackets the least
ratio that is aimed at, in bold where it is missed; in italics yardsticks, which do less than the case asks for.
*Of the ceiling*: how much of the speed of a copy, or of a dense product, measured in the same run, ours reaches."""
_TARGETS_LEGEND = """\
The targets, as the least ratio of a contender's time (or peak memory) to ours; of a case that could not be measured none
is met:"""
_NO_GPU = """\
What is aimed at on an H100 in bf16, NF4 with double quantization, as the least ratio of a contender's time (or peak
memory) to ours; **no CUDA device has been measured**:"""

Stored = Mapping[str, Mapping[str, Any]]
"""Results by the stem of their file."""
Row = tuple[str, ...]


def main(argv: list[str]) -> int:
    """Write the stored results into README.md."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=main.__doc__)
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit with 1 if README.md is out of date",
    )
    options = parser.parse_args(argv)
    old = README.read_text(encoding="utf-8")
    new = updated(old, section(stored()))
    if new == old:
        print("README.md is up to date")
    elif options.check:
        print("README.md is out of date: run python -m benchmarks readme", file=sys.stderr)
        return 1
    else:
        files.write_text(README, new)
        print("README.md is written")
    return 0


def stored(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results in a folder, but for partial and quick runs; one of an older layout is named and left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        try:
            result = results.read(path)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
            continue
        if result.get("complete", True):
            found[path.stem] = result
    return found


def updated(text: str, new: str) -> str:
    """`text` with `new` between its two markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md must have the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def section(found: Stored) -> str:
    """The whole section: each device's table, and the targets for a GPU."""
    parts = [_LEGEND] if found else []
    for stem, result in found.items():
        parts += [_heading(stem, result), _cases(result)]
        if result["device"]["type"] == "cuda":
            parts += [_TARGETS_LEGEND, _targets(result["cases"])]
    if all(result["device"]["type"] != "cuda" for result in found.values()):
        parts += [_NO_GPU, _targets(unmeasured())]
    return "\n\n".join(parts)


# --- A device ---------------------------------------------------------------------------------------


def _heading(stem: str, result: Mapping[str, Any]) -> str:
    device, versions = result["device"], result["versions"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    power = f", {device['power_limit_w']:g} W" if device.get("power_limit_w") else ""
    there = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    missing = ", ".join(name for name, number in versions.items() if not number)
    lines = [
        f"**{device['name']}{threads}{power}**, commit `{result['commit']}`, {result['date']}",
        f"({', '.join(_links(stem))}).",
        f"{there}{f'; without {missing}' if missing else ''}.",
    ]
    return "\n".join([" ".join(lines[:2]), lines[2][0].upper() + lines[2][1:]])


def _links(stem: str) -> Iterator[str]:
    yield f"[data](benchmarks/results/{stem}.json)"
    for name, file in (("speed-ups", f"{stem}.png"), ("roofline", f"{stem}-roofline.png")):
        if (PLOTS / file).is_file():
            yield f"[{name}](benchmarks/plots/{file})"


def _cases(result: Mapping[str, Any]) -> str:
    rows = [_case_row(case, result["ceilings"]) for case in result["cases"]]
    return _table(
        ("", "ours", "the others' time / ours", "of the ceiling"), rows, ":-- --: :-- --:"
    )


def _case_row(case: Mapping[str, Any], ceilings: Mapping[str, Any]) -> Row:
    ours, *others = case["timings"]
    name = f"{case['group']}: {case['name']}"
    ratios = ", ".join(filter(None, map(_ratio, others))) or "-"
    if ours["status"] != "timed":
        return (name, f"**{ours['status']}**", ratios, "-")
    return (name, _time(ours["p50_ms"]), ratios, _share(case, ceilings))


def _ratio(timing: Mapping[str, Any]) -> str | None:
    """A contender's ratio and target, or why there is none; None if there is nothing to say."""
    ratio, target, met = (timing[key] for key in ("time_over_ours", "target", "meets_target"))
    if ratio is None and timing["status"] == "not installed" and target is None:
        return None
    text = f"{timing['contender']} {timing['status'] if ratio is None else f'{ratio:.2f}'}"
    if target is not None:
        text += f" ({'<' if met is False else '≥'} {target:.3g})"
    if met is False:
        text = f"**{text}**"
    return f"*{text}*" if timing["is_yardstick"] else text


def _share(case: Mapping[str, Any], ceilings: Mapping[str, Any]) -> str:
    """The share of the ceiling that is nearer."""
    shares = results.shares(case, ceilings)
    if not shares:
        return "-"
    nearer = max(shares, key=shares.__getitem__)
    return f"{shares[nearer]:.0%} of {nearer}"


def _time(milliseconds: float) -> str:
    value, unit = (milliseconds, "ms") if milliseconds >= 1 else (1e3 * milliseconds, "µs")
    return f"{figures.digits(value)} {unit}"


# --- Targets on a GPU -------------------------------------------------------------------------------


def unmeasured() -> list[dict[str, Any]]:
    """The cases of a GPU as a result would hold them before anything is timed. It takes no GPU to list them."""
    device, dtypes = torch.device("cuda"), [torch.bfloat16]
    return [
        results.case_record(
            Measurement(case, tuple(Timing(c.name, _NOT_MEASURED) for c in case.contenders))
        )
        for case in all_cases(device, dtypes, list(GROUPS), quick=False)
    ]


def _targets(cases: Sequence[Mapping[str, Any]]) -> str:
    """A row for each target: the least and the greatest ratio that was measured, and how many cases meet it."""
    rows = [*_ratio_rows(cases), *_peak_rows(cases), *_temporary_rows(cases)]
    return _table(("", "against", "target", "measured", "met"), rows, ":-- :-- --: --: --:")


def _ratio_rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Time over ours: one row for each target of a contender in a group, of all cases that aim at it."""
    alike: dict[tuple[str, str, float], list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for case in cases:
        for timing in case["timings"]:
            if timing["target"] is not None:
                key = (case["group"], timing["contender"], timing["target"])
                alike.setdefault(key, []).append((case, timing))
    for (group, contender, target), found in alike.items():
        ratios = [t["time_over_ours"] for _, t in found if t["time_over_ours"] is not None]
        met = sum(timing["meets_target"] is True for _, timing in found)
        what = f"{group}{_tokens([case for case, _ in found])}"
        yield (what, contender, f"{target:.3g}", *_outcome(ratios, met, len(found)))


def _tokens(cases: Sequence[Mapping[str, Any]]) -> str:
    """How many tokens, of cases that multiply."""
    counts = {case["parameters"].get("m", case["parameters"].get("tokens")) for case in cases}
    counts.discard(None)
    if not counts or cases[0]["group"] in ("quantize", "dequantize"):
        return ""
    least, most = min(counts), max(counts)
    return f", {least} to {most} tokens" if least < most else f", {most} token{'s' * (most > 1)}"


def _peak_rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """Of a decoder layer: no more memory, weights included, than the peer that is aimed at."""
    for case in cases:
        ours, *others = case["timings"]
        for other in others:
            if case["group"] == "decoder" and other["target"] is not None:
                peaks = [other.get("peak_bytes"), ours.get("peak_bytes")]
                ratios = [peaks[0] / peaks[1]] if all(peaks) else []
                outcome = _outcome(ratios, sum(ratio >= 1 for ratio in ratios), 1)
                yield ("decoder, peak memory", other["contender"], "1", *outcome)


def _temporary_rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[Row]:
    """What ours held beyond inputs and results, of the cases that bound it: one row for each bound."""
    bounded: dict[int, list[int | None]] = {}
    for case in cases:
        if (most := case.get("most_temporary_bytes")) is not None:
            bounded.setdefault(most, []).append(case["timings"][0]["temporary_bytes"])
    for most, numbers in bounded.items():
        known = [number for number in numbers if number is not None]
        measured, met = _NOT_MEASURED, _NOT_MEASURED
        if known:
            measured = f"{max(known) / 2**20:.3g} MiB at most"
            met = f"{sum(number <= most for number in known)} of {len(numbers)}"
        yield ("temporary memory, any shape", "-", f"{most / 2**20:.3g} MiB", measured, met)


def _outcome(ratios: Sequence[float], met: int, count: int) -> tuple[str, str]:
    """Of `count` cases: those that could not be measured do not meet a target either."""
    if not ratios:
        return (_NOT_MEASURED, _NOT_MEASURED)
    least, most = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    return (least if least == most else f"{least} to {most}", f"{met} of {count}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    lines = [header, alignment.split(), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
