"""What the plots have in common: a figure that becomes a file, colors, a legend, panels of bars."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from qlora import files

BAR_INCHES = 0.125
"""Height of a row."""

_STYLE = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
_OURS = "#17365d"
_PEERS = (
    *("#e08214", "#4d9a4d", "#b2457f", "#2a9d9d", "#8c6bb1", "#a6761d", "#f4a6a0", "#6baed6"),
    *("#d4c21a", "#d6453d", "#a8d98a", "#5c4033", "#3f6fd1", "#cdb4e8", "#0b6e4f", "#ff5fb0"),
    *("#9acd00", "#c9a06a", "#7b1e3a"),
)
_YARDSTICKS = ("#9a9a9a", "#c4c4c4", "#e0e0e0")
_MISSED = "#b2182b"
_TICKS = ((12, (1, 2, 5)), (3, (1, 1.5, 2, 3, 4, 6, 8)), (0, (1, 1.25, 1.5, 2, 3, 4, 6, 8)))
"""On a logarithmic axis, if its end is more than so many times its start."""
_NAME_CHARACTERS = 36


@dataclass(frozen=True)
class Bar:
    """A bar, the text at its right and, where something is aimed at, a tick."""

    contender: str
    value: float
    text: str
    aim: float | None = None
    missed: bool = False
    is_yardstick: bool = False


@dataclass(frozen=True)
class Row:
    """A case and its bars."""

    case: str
    bars: Sequence[Bar]


def height(rows: Sequence[Row]) -> int:
    """Of a panel, in bars: there is a gap after each case."""
    return sum(_span(row) + 1 for row in rows)


def _span(row: Row) -> int:
    """Of a case, in bars: a name takes up to two lines."""
    return max(2, len(row.bars))


def colors(result: Mapping[str, Any]) -> dict[str, str]:
    """By label, one color throughout: ours dark, yardsticks grey."""
    chosen: dict[str, str] = {}
    peers, yardsticks = cycle(_PEERS), cycle(_YARDSTICKS)
    for case in result["cases"]:
        for place, timing in enumerate(case["timings"]):
            if label(timing) not in chosen:
                others = yardsticks if timing["is_yardstick"] else peers
                chosen[label(timing)] = next(others) if place else _OURS
    return chosen


def label(timing: Mapping[str, Any]) -> str:
    """A contender as the plots call it: whole models say of what bytes they are, single layers do not."""
    name = timing["contender"].removesuffix(" NF4+DQ")
    return f"{name} (yardstick)" if timing["is_yardstick"] else name


def digits(value: float) -> str:
    """Three significant digits or more, with commas between thousands."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


@contextmanager
def figure(
    result: Mapping[str, Any], subtitle: str, path: Path, width: float, height: float
) -> Iterator[Any]:
    """An empty figure, its size in inches, titled with the device; it becomes the PNG `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(_STYLE):
        drawn = pyplot.figure(figsize=(width, height), layout="constrained")
        drawn.suptitle(f"{_title(result)}\n{subtitle}", x=0.01, ha="left", fontsize=9)
        try:
            yield drawn
            with files.new_file(path) as temporary:
                drawn.savefig(temporary, dpi=120, format="png")
        finally:
            pyplot.close(drawn)


def _title(result: Mapping[str, Any]) -> str:
    device = result["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    made = f"{result['date']}, commit {result['commit']}, torch {result['versions']['torch']}"
    return f"{device['name']}{threads} ({made})"


def legend(figure: Any, palette: Mapping[str, str], markers: Mapping[str, str]) -> None:
    """Below everything: colors by label, and markers by what they stand for."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(color=color, label=name) for name, color in palette.items()]
    for name, marker in markers.items():
        handles.append(Line2D([], [], color="black", marker=marker, linestyle="", label=name))
    columns = max(2, int(figure.get_figwidth() / 2.4))
    figure.legend(handles=handles, loc="outside lower left", ncols=columns, frameon=False)


def draw_bars(axes: Any, rows: Sequence[Row], palette: Mapping[str, str], origin: float) -> None:
    """Horizontal bars from `origin` on, a block for each case, the first at the top."""
    top, ticks = 0.0, []
    for row in rows:
        ticks.append(top + (_span(row) - 1) / 2)
        for y, bar in enumerate(row.bars, start=1):
            y += ticks[-1] - (len(row.bars) + 1) / 2
            color = palette[bar.contender]
            axes.barh(y, bar.value - origin, left=origin, color=color, height=0.9)
            color = _MISSED if bar.missed else "black"
            where = {"transform": axes.get_yaxis_transform(), "va": "center"}
            axes.text(1.01, y, bar.text, color=color, fontsize=6.5, **where)
            if bar.aim is not None:
                axes.plot([bar.aim] * 2, [y - 0.5, y + 0.5], color="black", linewidth=1.8)
        top += _span(row) + 1
    axes.set_yticks(ticks, [_wrapped(row.case) for row in rows], fontsize=7)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(top - 1.3, -0.7)


def _wrapped(name: str) -> str:
    """On several lines if it is long, broken after commas alone."""
    fixed = name.replace(" ", "\N{NO-BREAK SPACE}").replace(",\N{NO-BREAK SPACE}", ", ")
    return textwrap.fill(fixed, _NAME_CHARACTERS)


def log_ticks(axis: Any) -> None:
    """1, 2, 5, 10, 20, ... written out; more between them if the axis is short."""
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=next(t for least, t in _TICKS if high / low > least)))
    axis.set_minor_locator(NullLocator())
    plain_numbers(axis)


def plain_numbers(axis: Any) -> None:
    """Ticks without powers of ten, with commas between thousands."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
