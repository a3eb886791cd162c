"""Draws the pictures of these pages: `python docs/draw.py [FOLDER]`, by default docs/pictures.

Needs matplotlib. What is drawn of a data type is read from `qlora.kernels.formats`.
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("svg")
mpl.rcParams.update(
    {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "qlora",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
)

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from qlora.kernels import formats  # noqa: E402

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#cbd5e0"


def nf4() -> Any:
    """The 16 values and the borders between them, under the density of normalized weights."""
    values, borders = formats.FORMATS["nf4"].values, formats.FORMATS["nf4"].thresholds
    figure, axes = plt.subplots(figsize=(7.5, 2.6))
    x = torch.linspace(-1, 1, 101)
    density = torch.exp(-((x * 2.6) ** 2) / 2)  # a block of 64 reaches 2.6 standard deviations
    axes.fill_between(x, density, color=GREY, alpha=0.5)
    for border in borders.tolist():
        height = math.exp(-((border * 2.6) ** 2) / 2)
        axes.plot([border, border], [0, height], color="white", linewidth=1.5)
    axes.vlines(values, 0, 1.04, color=BLUE, linewidth=0.8)
    for code, value in enumerate(values):
        axes.text(value, 1.08, f"{code:x}", ha="center", color=BLUE, family="monospace")
    axes.set(ylim=(0, 1.2), xlim=(-1.05, 1.05), yticks=[], xlabel="weight / absmax")
    axes.spines["left"].set_visible(False)
    axes.set_title(
        "NF4: blue the values with their codes, white the borders between them", fontsize=9
    )
    return figure


def _box(axes: Any, x: float, y: float, width: float, text: str, color: str = GREY) -> None:
    axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=color, edgecolor="white", alpha=0.7))
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center")


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#4a5568"})


def _canvas(width: float, height: float) -> tuple[Any, Any]:
    figure, axes = plt.subplots(figsize=(7.5, 7.5 * height / width))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def bytes_() -> Any:
    """From weights to packed codes, scales, and scales of scales."""
    figure, axes = _canvas(15, 5.6)
    _box(axes, 0.2, 4.5, 6.6, "64 weights")
    _box(axes, 7.0, 4.5, 6.6, "64 weights")
    axes.text(13.9, 4.9, "...", va="center")
    for start in (0.2, 7.0):
        _arrow(axes, (start + 2, 4.45), (start + 2, 3.85))
        _arrow(axes, (start + 5.7, 4.45), (start + 5.7, 3.85))
        for i, text in enumerate(("f6", "7c", "08", "...")):
            _box(axes, start + i * 1.1, 3.0, 1.0, text, BLUE)
        _box(axes, start + 4.9, 3.0, 1.7, "absmax", ORANGE)
        _arrow(axes, (start + 5.7, 2.95), (7.4 if start < 1 else 9.4, 2.35))
    axes.text(13.9, 3.4, "...", va="center")
    _box(axes, 4.6, 1.5, 7.4, "256 scales, minus the mean of all", ORANGE)
    _arrow(axes, (6.0, 1.45), (4.6, 0.85))
    _arrow(axes, (8.6, 1.45), (8.6, 0.85))
    _arrow(axes, (11.0, 1.45), (12.4, 0.85))
    _box(axes, 2.2, 0.0, 4.6, "256 codes of 8 bits", ORANGE)
    _box(axes, 7.0, 0.0, 3.6, "absmax of 256, fp32", ORANGE)
    _box(axes, 10.8, 0.0, 3.6, "mean, one fp32", ORANGE)
    axes.text(0.2, 2.5, "32 bytes, two codes each", color=BLUE, va="center")
    return figure


def ranks() -> Any:
    """A part of [-1, 1] with its cells, the thresholds of NF4, and the rank at the lower end of each cell."""
    form, low, high = formats.FORMATS["nf4"], -0.2, 0.25
    edges = [(2 * i - 1) / (formats.CELLS - 1) - 1 for i in range(1, formats.CELLS)]
    figure, axes = plt.subplots(figsize=(7.5, 2.4))
    borders = [low, *(edge for edge in edges if low < edge < high), high]
    for left, right in pairwise(borders):
        middle = torch.tensor([(left + right) / 2])
        rank = form.cell_ranks[formats.cell(middle)].item()
        axes.add_patch(Rectangle((left, 0), right - left, 1, facecolor=GREY, edgecolor="white"))
        axes.text(middle.item(), 0.2, str(rank), ha="center", va="center", fontsize=8)
    inside = [t for t in form.thresholds.tolist() if low < t < high]
    axes.vlines(inside, 0.4, 1.25, color=ORANGE)
    for threshold in inside:
        number = form.thresholds.tolist().index(threshold)
        axes.text(threshold, 1.3, f"t{number}", ha="center", color=ORANGE)
    axes.set(xlim=(low, high), ylim=(0, 1.7), yticks=[], xlabel="weight / absmax")
    axes.spines["left"].set_visible(False)
    axes.set_title(
        "In each cell its table entry b; the code is b, or b + 1 right of threshold t[b]",
        fontsize=9,
    )
    return figure


def layer() -> Any:
    """What each of the three kernels of a layer does with the packed weight."""
    figure, axes = _canvas(15, 6.2)
    rows = (
        (
            "few tokens\nup to 16",
            ("16 bytes of W", "prmt:\n16-bit values", "tensor core", "sum of a block\n* scale"),
        ),
        (
            "in between",
            (
                "tile of W",
                "look-up * scale",
                "tensor core,\nW from registers",
                "sum begins with\nthe adapter",
            ),
        ),
        (
            "many tokens\nfrom 1024",
            (
                "slab of W,\n32 MB",
                "look-up * scale",
                "cuBLAS,\nslab in cache",
                "adapter added\nto the result",
            ),
        ),
    )
    for number, (name, steps) in enumerate(rows):
        y = 4.6 - 2.0 * number
        axes.text(0.1, y + 0.4, name, va="center", fontweight="bold")
        for i, text in enumerate(steps):
            x = 2.7 + i * 3.1
            color = (GREY, BLUE, ORANGE, GREY)[i]
            axes.add_patch(
                Rectangle((x, y - 0.2), 2.6, 1.2, facecolor=color, edgecolor="white", alpha=0.7)
            )
            axes.text(x + 1.3, y + 0.4, text, ha="center", va="center", fontsize=8)
            if i:
                _arrow(axes, (x - 0.48, y + 0.4), (x - 0.02, y + 0.4))
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path(__file__).parent / "pictures"
    parser.add_argument("folder", nargs="?", type=Path, default=default, help="where they go")
    folder = parser.parse_args().folder
    folder.mkdir(exist_ok=True)
    for name, draw in (("nf4", nf4), ("bytes", bytes_), ("ranks", ranks), ("layer", layer)):
        figure = draw()
        figure.savefig(folder / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)


if __name__ == "__main__":
    main()
