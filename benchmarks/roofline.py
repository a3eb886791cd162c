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
_SUBTITLE = "lines: what was measured in the same run"


@dataclass(frozen=True)
class Point:
    """A contender of a case that multiplies.

    Attributes:
        x: operations per byte.
        y: TFLOP/s.
    """

    dtype: str
    group: str
    contender: str
    x: float
    y: float


def points(result: Mapping[str, Any]) -> list[Point]:
    """Of all that did the whole work of a case: a yardstick does less."""
    return [
        Point(
            case["parameters"]["dtype"],
            case["group"],
            timing["contender"],
            case["operations"] / case["bytes_moved"],
            case["operations"] / timing["p50_ms"] / 1e9,
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
    text = _digits(gb_per_s) + (f", {gb_per_s / ceiling:.0%}" if ceiling else "")
    return Bar(timing["contender"], gb_per_s, text)


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
    with figures.figure(result, _SUBTITLE, path, _WIDTH, 1.2 + sum(heights)) as figure:
        palette = figures.colors(result)
        figures.legend(figure, _shown(palette, multiplied, converted), markers)
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        if dtypes:
            for axes, dtype in zip(_beside(parts[0], len(dtypes)), dtypes, strict=True):
                chosen = [point for point in multiplied if point.dtype == dtype]
                _draw_roof(axes, dtype, chosen, result["ceilings"])
                _draw_points(axes, chosen, palette, markers)
        if converted:
            for axes, group in zip(_beside(parts[-1], len(converted)), converted, strict=True):
                figures.draw_bars(axes, converted[group], palette, origin=0.0)
                _draw_copy(axes, group, result["ceilings"])
    return path


def _shown(
    palette: Mapping[str, str], multiplied: Sequence[Point], converted: Mapping[str, list[Row]]
) -> dict[str, str]:
    """The colors that occur."""
    names = {point.contender for point in multiplied}
    names |= {bar.contender for rows in converted.values() for row in rows for bar in row.bars}
    return {name: color for name, color in palette.items() if name in names}


def _beside(figure: Any, count: int) -> Sequence[Any]:
    return figure.subplots(1, count, squeeze=False)[0]


def _draw_roof(axes: Any, dtype: str, chosen: Sequence[Point], ceilings: Mapping[str, Any]) -> None:
    """The lower of two lines: bytes at the speed of a copy, operations at the speed of a product."""
    copy = ceilings.get("copy_gb_per_s")
    product = ceilings.get("product_tflop_per_s", {}).get(dtype)
    low, high = min(p.x for p in chosen) / 2, max(p.x for p in chosen) * 2
    title = dtype
    line = {"color": _CEILING, "linewidth": 1.2}
    if copy and product:
        ridge = 1e3 * product / copy
        low, high = min(low, ridge / 2), max(high, ridge * 2)
        axes.plot([low, ridge, high], [low * copy / 1e3, product, product], **line)
    elif copy:
        axes.plot([low, high], [low * copy / 1e3, high * copy / 1e3], **line)
    elif product:
        axes.plot([low, high], [product, product], **line)
    if copy:
        title += f", copy {_digits(copy)} GB/s"
    if product:
        title += f", dense product {_digits(product)} TFLOP/s"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlim(low, high)


def _draw_points(
    axes: Any, chosen: Sequence[Point], palette: Mapping[str, str], markers: Mapping[str, str]
) -> None:
    """Ours last, on top of the others."""
    order = list(palette)
    for point in sorted(chosen, key=lambda point: -order.index(point.contender)):
        style = {"color": palette[point.contender], "edgecolors": "white", "linewidths": 0.3}
        axes.scatter(point.x, point.y, s=22, marker=markers[point.group], zorder=3, **style)
    axes.set_xscale("log")
    axes.set_yscale("log")
    figures.log_ticks(axes.xaxis)
    figures.log_ticks(axes.yaxis)
    axes.grid(color="#e8e8e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("operations per byte that must be moved")
    axes.set_ylabel("TFLOP/s")


def _draw_copy(axes: Any, group: str, ceilings: Mapping[str, Any]) -> None:
    title = group
    if copy := ceilings.get("copy_gb_per_s"):
        axes.axvline(copy, color=_CEILING, linewidth=1.2)
        title += f", line: copy {_digits(copy)} GB/s"
    axes.set_title(title, loc="left", fontweight="bold")
    axes.set_xlabel("GB/s of the bytes that must be moved")


def _digits(value: float) -> str:
    """Three significant digits, in thousands."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
