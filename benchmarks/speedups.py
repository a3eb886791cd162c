"""Speed-ups as bars: how many times our time each contender takes, and what is aimed at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.figures import Bar, Row

_COLUMN_INCHES, _COLUMN_ROWS, _MOST_COLUMNS = 7.0, 90, 3
_YARDSTICK_SPAN = 4
"""The scale reaches for yardsticks up to this many times our time, or that part of it: they do less, and some
take next to nothing, beside which all peers would look alike."""
_SUBTITLE = f"""\
time / our time: right of the line, ours is faster; a black tick is what is aimed at, red numbers miss it
yardsticks (grey) do less than the case asks for: their bars may be cut off beyond {1 / _YARDSTICK_SPAN:g} and {_YARDSTICK_SPAN}"""
_PANEL_ROWS = 34
"""Rows after which a group goes on in another panel, which may stand in the next column."""
_CONTINUED = ", continued"
_MARGIN_ROWS = 4
"""Rows that a panel's title and axis take."""

Panel = tuple[str, list[Row]]


def bars(result: Mapping[str, Any]) -> dict[str, list[Row]]:
    """By group: time over ours of all that were timed beside ours."""
    groups: dict[str, list[Row]] = {}
    for case in result["cases"]:
        timed = [t for t in case["timings"][1:] if t["time_over_ours"] is not None]
        if timed:
            groups.setdefault(case["group"], []).append(Row(case["name"], [*map(_bar, timed)]))
    return groups


def _bar(timing: Mapping[str, Any]) -> Bar:
    ratio, target = timing["time_over_ours"], timing["target"]
    text = f"{ratio:.2f}" + (f", aim {target:.2f}" if target is not None else "")
    missed = timing["meets_target"] is False
    return Bar(figures.label(timing), ratio, text, target, missed, timing["is_yardstick"])


def draw(result: Mapping[str, Any], groups: Mapping[str, list[Row]], path: Path) -> Path:
    """Write the PNG: a panel for each group, in columns."""
    columns = _columns(_panels(groups))
    tallest = max(sum(map(_height, column)) for column in columns)
    palette = figures.colors(result)
    shown = {bar.contender for rows in groups.values() for row in rows for bar in row.bars}
    size = (_COLUMN_INCHES * len(columns), 1.4 + figures.BAR_INCHES * tallest)
    with figures.figure(result, _SUBTITLE, path, *size) as figure:
        figures.legend(figure, {n: color for n, color in palette.items() if n in shown}, {})
        parts = figure.subfigures(1, len(columns), squeeze=False)[0]
        for part, panels in zip(parts, columns, strict=True):
            for axes, (title, rows) in zip(_stack(part, panels, tallest), panels, strict=True):
                figures.draw_bars(axes, rows, palette, origin=1.0)
                _scale(axes, limits(groups[title.removesuffix(_CONTINUED)]))
                axes.set_title(title, loc="left", fontweight="bold")
    return path


def _panels(groups: Mapping[str, list[Row]]) -> list[Panel]:
    """One for each group, and more for a group of many cases."""
    panels: list[Panel] = []
    for group, rows in groups.items():
        count = math.ceil(figures.height(rows) / _PANEL_ROWS)
        size = math.ceil(len(rows) / count)
        for start in range(0, len(rows), size):
            title = f"{group}{_CONTINUED}" if start else group
            panels.append((title, rows[start : start + size]))
    return panels


def _height(panel: Panel) -> int:
    return figures.height(panel[1]) + _MARGIN_ROWS


def _columns(panels: Sequence[Panel]) -> list[list[Panel]]:
    """The panels in order, in as few columns as keep the figure from becoming long, about equally full."""
    total = sum(map(_height, panels))
    count = min(_MOST_COLUMNS, math.ceil(total / _COLUMN_ROWS))
    columns: list[list[Panel]] = [[] for _ in range(count)]
    above = 0
    for panel in panels:
        middle = above + _height(panel) / 2
        columns[int(middle / total * count)].append(panel)
        above += _height(panel)
    return [column for column in columns if column]


def _stack(figure: Any, panels: Sequence[Panel], tallest: int) -> list[Any]:
    """Axes one below the other, as high as their rows; what a shorter column leaves over stays empty."""
    heights = [*map(_height, panels)]
    rest = tallest - sum(heights)
    grid = figure.add_gridspec(
        len(heights) + bool(rest), 1, height_ratios=heights + [rest] * bool(rest)
    )
    if rest:
        figure.add_subplot(grid[-1]).axis("off")
    return [figure.add_subplot(grid[i]) for i in range(len(panels))]


def limits(rows: Sequence[Row]) -> tuple[float, float]:
    """The least and the greatest ratio that a group's axes show, the same in all its panels."""
    bars = [bar for row in rows for bar in row.bars]
    values = [_within_span(bar.value) if bar.is_yardstick else bar.value for bar in bars]
    values += [bar.aim for bar in bars if bar.aim is not None]
    return min(0.8, min(values) / 1.1), max(1.25, max(values) * 1.1)


def _within_span(ratio: float) -> float:
    return min(max(ratio, 1 / _YARDSTICK_SPAN), _YARDSTICK_SPAN)


def _scale(axes: Any, shown: tuple[float, float]) -> None:
    """Logarithmic, so that twice as fast is as long as twice as slow."""
    axes.set_xscale("log")
    axes.set_xlim(*shown)
    figures.log_ticks(axes.xaxis)
    axes.axvline(1, color="black", linewidth=0.8)
