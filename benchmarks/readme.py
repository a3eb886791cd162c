"""README's section on speed, written from the stored results alone.

python -m benchmarks readme [--check]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.plot import PLOTS, RESULTS
from qlora import files

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"

CUDA_TARGETS = (
    (
        "dequantize to bf16, NF4 + DQ, 8192 x 8192 and larger",
        "0.90 of a copy",
        "1.3 x bitsandbytes",
    ),
    ("quantize from bf16, NF4 + DQ", "0.80 of a copy", "2 x bitsandbytes"),
    ("decode, 1 token, in a CUDA graph", "3.2 x dense, 0.75 of a copy", "1.3 x bitsandbytes"),
    ("2 to 16 tokens", "2.5 x dense", "1.3 x bitsandbytes"),
    ("32 to 512 tokens", "0.95 x dense", "1 x bitsandbytes"),
    (
        "layer with LoRA of rank 64, forward and backward, 2048 to 16384 tokens, dropout 0 and 0.05",
        "0.90 x dense with LoRA fused by hand, 1.1 x dequantize + addmm",
        "1.25 x PEFT over bitsandbytes",
    ),
    ("temporary memory at any shape", "64 MB at most", "-"),
    (
        "decoder layer of Llama-3-8B's shape, forward and backward, 4 x 2048 tokens",
        "-",
        "1.3 x PEFT over bitsandbytes, with no more memory",
    ),
)
"""What is aimed at on an H100: (what, against the hardware and plain PyTorch, against peers). Once a CUDA
device has been measured, the targets that its file holds take this table's place."""

_TEMPORARY_LIMIT = 64 * 10**6
_NOT_MEASURED = "not measured"
_LEGEND = """\
Medians of one run; beside *ours*, each contender's time over ours: above 1, ours is faster. In brackets the least
ratio that is aimed at, in bold where it is missed; in italics yardsticks, which do less than the case asks for.
*Of the ceiling*: how much of the speed of a copy, or of a dense product, measured in the same run, ours reaches."""

Stored = Mapping[str, Mapping[str, Any]]
"""Results by the stem of their file."""


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
    """The results in a folder, but for quick runs; one of an older layout is named and left out."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem.endswith("-quick"):
            continue
        try:
            found[path.stem] = results.read(path)
        except ValueError as error:
            print(f"left out: {error}", file=sys.stderr)
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
            parts.append(_reached(result))
    if all(result["device"]["type"] != "cuda" for result in found.values()):
        parts += ["What is aimed at on an H100; **no CUDA device has been measured**:", _aims()]
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


def _case_row(case: Mapping[str, Any], ceilings: Mapping[str, Any]) -> tuple[str, ...]:
    ours, *others = case["timings"]
    name = f"{case['group']}: {case['name']}"
    ratios = ", ".join(filter(None, map(_ratio, others))) or "-"
    if ours["status"] != "timed":
        return (name, f"**{ours['status']}**", ratios, "-")
    return (name, _time(ours["p50_ms"]), ratios, _share(case, ours["p50_ms"], ceilings))


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


def _share(case: Mapping[str, Any], p50_ms: float, ceilings: Mapping[str, Any]) -> str:
    """The share of the ceiling that is nearer: how much of our time one of the two alone would take."""
    product = ceilings.get("product_tflop_per_s", {}).get(case["parameters"].get("dtype"))
    copy, shares = ceilings.get("copy_gb_per_s"), {}
    if copy and case["bytes_moved"]:
        shares["copy"] = case["bytes_moved"] / (copy * 1e6) / p50_ms
    if product and case["operations"]:
        shares["product"] = case["operations"] / (product * 1e9) / p50_ms
    if not shares:
        return "-"
    nearer = max(shares, key=shares.__getitem__)
    return f"{shares[nearer]:.0%} of {nearer}"


def _time(milliseconds: float) -> str:
    """Three significant digits or more."""
    value, unit = (milliseconds, "ms") if milliseconds >= 1 else (1e3 * milliseconds, "µs")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


# --- Targets on a GPU -------------------------------------------------------------------------------


def _aims() -> str:
    header = ("", "against the hardware and PyTorch", "against peers", "measured")
    return _table(header, [(*row, _NOT_MEASURED) for row in CUDA_TARGETS], ":-- :-- :-- :--")


def _reached(result: Mapping[str, Any]) -> str:
    """Of each target of the file: the ratios from the least to the greatest, and how many cases meet it."""
    found: dict[tuple[str, str, float], list[Mapping[str, Any]]] = {}
    for case in result["cases"]:
        for timing in case["timings"]:
            if timing["target"] is not None:
                key = (case["group"], timing["contender"], timing["target"])
                found.setdefault(key, []).append(timing)
    rows = [
        (group, contender, f"{target:.3g}", _range(timings), _met(timings))
        for (group, contender, target), timings in found.items()
    ]
    temporary = [case["timings"][0]["temporary_bytes"] for case in result["cases"]]
    if known := [number for number in temporary if number is not None]:
        met = sum(number <= _TEMPORARY_LIMIT for number in known)
        most = f"{max(known) / 1e6:.3g} MB at most"
        rows.append(("all", "temporary memory", "64 MB", most, f"{met} of {len(known)}"))
    return _table(("group", "against", "target", "measured", "met"), rows, ":-- :-- --: --: --:")


def _range(timings: Sequence[Mapping[str, Any]]) -> str:
    ratios = [t["time_over_ours"] for t in timings if t["time_over_ours"] is not None]
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else _NOT_MEASURED


def _met(timings: Sequence[Mapping[str, Any]]) -> str:
    known = [timing["meets_target"] for timing in timings if timing["meets_target"] is not None]
    return f"{sum(known)} of {len(known)}" if known else _NOT_MEASURED


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], alignment: str) -> str:
    lines = [header, alignment.split(), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
