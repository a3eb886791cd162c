"""The plots of `datatypes`: codebooks, and errors on several kinds of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_repro.harness import draw
from paper_repro.measures.in_data_type import LABELS, NF4

MARKS = {NF4: "D", "e2m1": "o", "int4": "s", "fp4": "^", "e3m0": "v"}
HOLLOW = ("int4", "fp4")


def codebooks(values: Mapping[str, Sequence[float]], path: Path) -> Path:
    """Values of each data type as ticks, from the top down, over the density of normal weights."""
    with draw.figure(path, height=4.2) as axes:
        # The largest of 64 normal numbers is about 2.4 standard deviations: so dense are scaled weights.
        grid = [i / 100 for i in range(-110, 111)]
        density = [len(values) * math.exp(-((2.4 * x) ** 2) / 2) for x in grid]
        axes.fill_between(grid, density, color=draw.LIGHT, alpha=0.5, linewidth=0)
        for height, name in enumerate(reversed(values)):
            color = _color(name)
            axes.vlines(values[name], height + 0.15, height + 0.85, color=color, linewidth=1.8)
            axes.text(-1.16, height + 0.5, LABELS[name], ha="right", va="center", color=color)
        axes.set(xlim=(-1.14, 1.14), ylim=(0, len(values)), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("weight / largest weight of its block")
    return path


def errors(found: Mapping[str, Mapping[str, float]], path: Path) -> Path:
    """Relative RMSE in per cent: a row for each kind of numbers, in it a mark for each data type."""
    with draw.figure(path, height=3.2) as axes:
        for name, mark in MARKS.items():
            color = _color(name)
            axes.plot(
                [of[name] for of in found.values()],
                range(len(found)),
                mark,
                color=color,
                markerfacecolor="none" if name in HOLLOW else color,
                label=LABELS[name],
            )
        axes.set_yticks(range(len(found)), found)
        axes.invert_yaxis()
        axes.grid(axis="y", color=draw.LIGHT, linewidth=0.8)
        axes.set_xlabel("relative RMSE, %")
        axes.set_xlim(left=0)
        axes.legend(frameon=False, ncols=len(MARKS), loc="lower center", bbox_to_anchor=(0.4, 1))
    return path


def _color(name: str) -> str:
    return draw.ORANGE if name == NF4 else draw.BLUE
