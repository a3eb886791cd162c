"""The roofline: what each contender achieves, under the ceilings that were measured in the same run.

A case's operations and bytes are the fewest that it can be done with, the same for all its contenders: a
contender that moves more bytes stands lower, not further left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import Bar, Row

_MARKERS = "osD^vPX"
_CEILING = "#555555"
_WIDTH, _ROOF_INCHES = 14.0, 4.6
_LABEL_ROOM = 1.25
"""How many times as far right the next label must stand."""
_SUBTITLE = """\
lines: what was measured in the same run; m: tokens, written where there is room at the rightmost of our points with as many
bytes are the fewest with NF4 weights, for every contender: one that moves more stands lower, not further left"""


@dataclass(frozen=True)
class Point:
    """A contender of a case that multiplies.

    Attributes:
        x: operations per byte.
        y: TFLOP/s.
        m: tokens, of ours alone.
    """

    dtype: str
    group: str
    contender: str
    x: float
    y: float
    m: int | None = None


def points(result: Mapping[str, Any]) -> list[Point]:
    """Of all that did the whole work of a case: a yardstick does less."""
    return [
        Point(
            case["parameters"]["dtype"],
            case["group"],
            figures.label(timing),
            case["operations"] / case["bytes_moved"],
            case["operations"] / timing["p50_ms"] / 1e9,
            case["parameters"].get("m") if timing is case["timings"][0] else None,
        )
        for case in result["cases"]
        if case["operations"] and case["bytes_moved"]
        for timing in case["timings"]
        if timing["p50_ms"] and not timing["is_yardstick"]
    ]


def conversions(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By group, for cases that multiply nothing: GB/s, and the share of a copy's."""
    ceiling = result["ceilings"].get("copy_gb_per_s")
    groups: dict[str, list[Row]] = {}
    for case in result["cases"]:
        timed = [t for t in case["timings"] if t["p50_ms"]]
        if case["bytes_moved"] and not case["operations"] and timed:
            bars = [_bar(t, case["bytes_moved"] / t["p50_ms"] / 1e6, ceiling) for t in timed]
            groups.setdefault(case["group"], []).append(Row(case["name"], bars))
    return groups


def _bar(timing: Mapping[str, Any], gb_per_s: float, ceiling: float | None) -> Bar:
    text = figures.digits(gb_per_s) + (f", {gb_per_s / ceiling:.0%}" if ceiling else "")
    return Bar(figures.label(timing), gb_per_s, text)


def draw(
    result: Mapping[str, Any],
    multiplied: Sequence[Point],
    converted: Mapping[str, list[Row]],
    path: Path,
) -> Path:
    """Write the PNG: a roofline for each dtype, and below them bars for each group of conversions."""
    dtypes = list(dict.fromkeys(point.dtype for point in multiplied))
    heights = []
    if dtypes:
        heights.append(_ROOF_INCHES)
    if converted:
        heights.append(0.7 + figures.BAR_INCHES * max(map(figures.height, converted.values())))
    markers = dict(zip(dict.fromkeys(point.group for point in multiplied), cycle(_MARKERS)))
    copy = _copy(result)
    with figures.figure(result, _SUBTITLE, path, _WIDTH, 1.4 + sum(heights)) as figure:
        palette = figures.colors(result)
        figures.legend(figure, _shown(palette, multiplied, converted), markers)
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if dtypes:
            for axes, dtype in zip(_beside(parts[0], len(dtypes)), dtypes, strict=True):
                chosen = [point for point in multiplied if point.dtype == dtype]
                unit = _unit(chosen)
                title = _draw_roof(axes, chosen, result["ceilings"], copy, unit)
                axes.set_title(title, loc="left", fontweight="bold")
                _draw_points(axes, chosen, palette, markers, unit)
        if converted:
            for axes, group in zip(_beside(parts[-1], len(converted)), converted, strict=True):
                figures.draw_bars(axes, converted[group], palette, origin=0.0)
                _draw_copy(axes, group, result["ceilings"].get("copy_gb_per_s"), copy)
    return path


def _copy(result: Mapping[str, Any]) -> str:
    """What the copy's line is called: a CPU copies quicker what its cache holds."""
    return "copy" if result["device"]["type"] == "cuda" else "large copy (out of cache)"


def _unit(chosen: Sequence[Point]) -> tuple[str, float]:
    """Of operations per second, and how many of it a TFLOP/s is."""
    return ("TFLOP/s", 1.0) if max(point.y for point in chosen) >= 1 else ("GFLOP/s", 1e3)


def _shown(
    palette: Mapping[str, str], multiplied: Sequence[Point], converted: Mapping[str, list[Row]]
) -> dict[str, str]:
    """The colors that occur."""
    names = {point.contender for point in multiplied}
    names |= {bar.contender for rows in converted.values() for row in rows for bar in row.bars}
    return {name: color for name, color in palette.items() if name in names}


def _beside(figure: Any, count: int) -> Sequence[Any]:
    return figure.subplots(1, count, squeeze=False)[0]


def _draw_roof(
    axes: Any,
    chosen: Sequence[Point],
    ceilings: Mapping[str, Any],
    copy_name: str,
    unit: tuple[str, float],
) -> str:
    """The lower of two lines: bytes at the speed of a copy, operations at that of a product. Returns a title."""
    dtype, (unit_name, factor) = chosen[0].dtype, unit
    copy = ceilings.get("copy_gb_per_s")
    slope = copy and copy / 1e3 * factor
    product = ceilings.get("product_tflop_per_s", {}).get(dtype)
    product = product and product * factor
    low, high = min(p.x for p in chosen) / 2, max(p.x for p in chosen) * 2
    line = {"color": _CEILING, "linewidth": 1.2}
    if copy and product:
        ridge = product / slope
        low, high = min(low, ridge / 2), max(high, ridge * 2)
        axes.plot([low, ridge, high], [low * slope, product, product], **line)
    elif copy:
        axes.plot([low, high], [low * slope, high * slope], **line)
    elif product:
        axes.plot([low, high], [product, product], **line)
    axes.set_xlim(low, high)
    title = dtype
    if copy:
        title += f", {copy_name} {figures.digits(copy)} GB/s"
    if product:
        title += f", dense product {figures.digits(product)} {unit_name}"
    return title


def _draw_points(
    axes: Any,
    chosen: Sequence[Point],
    palette: Mapping[str, str],
    markers: Mapping[str, str],
    unit: tuple[str, float],
) -> None:
    """Ours last, on top of the others."""
    from matplotlib.patheffects import withStroke

    order, (unit_name, factor) = list(palette), unit
    for point in sorted(chosen, key=lambda point: -order.index(point.contender)):
        style = {"color": palette[point.contender], "edgecolors": "white", "linewidths": 0.3}
        marker = markers[point.group]
        axes.scatter(point.x, point.y * factor, s=22, marker=marker, zorder=3, **style)
    for point in labelled(chosen):
        place = {"xytext": (5, -3), "textcoords": "offset points", "fontsize": 6.5, "zorder": 4}
        place["path_effects"] = [withStroke(linewidth=2, foreground="white")]  # over other points
        axes.annotate(f"m = {point.m:,}", (point.x, point.y * factor), **place)
    axes.set_xscale("log")
    axes.set_yscale("log")
    figures.log_ticks(axes.xaxis)
    figures.log_ticks(axes.yaxis)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel(unit_name)


def labelled(chosen: Sequence[Point]) -> list[Point]:
    """The rightmost of our points for each number of tokens, but for those with another close at their right."""
    rightmost: dict[int, Point] = {}
    for point in chosen:
        if point.m is not None:
            rightmost[point.m] = max(point, rightmost.get(point.m, point), key=lambda one: one.x)
    found: list[Point] = []
    for point in sorted(rightmost.values(), key=lambda one: -one.x):
        if not found or point.x * _LABEL_ROOM <= found[-1].x:
            found.append(point)
    return found


def _draw_copy(axes: Any, group: str, gb_per_s: float | None, copy_name: str) -> None:
    title = group
    if gb_per_s:
        axes.axvline(gb_per_s, color=_CEILING, linewidth=1.2)
        title += f", line: {copy_name} {figures.digits(gb_per_s)} GB/s"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("GB/s of the bytes that must be moved")
    figures.plain_numbers(axes.xaxis)
