"""The plots. Each function draws one PNG and returns its path."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BLUE, ORANGE, GREY, LIGHT = "#2f6db3", "#d9772b", "#5a5a5a", "#b9cfe8"


@contextmanager
def _figure(path: Path, width: float = 7.2, height: float = 3.6) -> Iterator[Any]:
    """Axes to draw on; saved to `path` when the block ends well."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        try:
            yield axes
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
        finally:
            pyplot.close(figure)


def codebooks(values: Mapping[str, Sequence[float]], labels: Mapping[str, str], path: Path) -> Path:
    """Values of each data type as ticks, over the density of normal weights."""
    with _figure(path, height=4.2) as axes:
        # The largest of 64 normal numbers is about 2.4 standard deviations: so dense are scaled weights.
        spread = 1 / 2.4
        grid = [i / 100 for i in range(-110, 111)]
        density = [len(labels) * math.exp(-((x / spread) ** 2) / 2) for x in grid]
        axes.fill_between(grid, density, color=LIGHT, alpha=0.5, linewidth=0)
        for height, (name, label) in enumerate(reversed(labels.items())):
            color = ORANGE if name == "nf4" else BLUE
            axes.vlines(values[name], height + 0.15, height + 0.85, color=color, linewidth=1.8)
            axes.text(-1.16, height + 0.5, label, ha="right", va="center", color=color)
        axes.set(xlim=(-1.14, 1.14), ylim=(0, len(labels)), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("weight / largest weight of its block")
    return path


def bits_per_parameter(bits: Mapping[str, float], path: Path) -> Path:
    """Stacked bars: 4 bits of code, and the scales on top."""
    labels = {"nf4": "NF4", "nf4+dq": "NF4 + double\nquantization"}
    with _figure(path, height=2.6) as axes:
        for row, (name, label) in enumerate(reversed(labels.items())):
            axes.barh(row, 4, color=BLUE, height=0.6)
            axes.barh(row, bits[name] - 4, left=4, color=ORANGE, height=0.6)
            axes.text(2, row, "4 code", ha="center", va="center", color="white")
            note = f"{bits[name]:.3f}  ({bits[name] - 4:.3f} scales)"
            axes.text(bits[name] + 0.05, row, note, va="center", color=GREY)
            axes.text(-0.06, row, label, ha="right", va="center")
        axes.set(xlim=(0, 5.8), yticks=[], xlabel="bits per parameter")
    return path


def memory(
    bars: Mapping[str, Mapping[str, Sequence[float]]], parts: Sequence[str], path: Path
) -> Path:
    """For each model a stack of parts in MiB for the paper and one for the planner."""
    colors = (BLUE, ORANGE, "#e8b88a", LIGHT, GREY)
    with _figure(path, height=4.2) as axes:
        for place, stacks in enumerate(bars.values()):
            for offset, sizes in zip((-0.21, 0.21), stacks.values(), strict=True):
                bottom = 0.0
                for part, size, color in zip(parts, sizes, colors, strict=True):
                    label = part if place == 0 and offset < 0 else None
                    axes.bar(place + offset, size / 1024, 0.38, bottom, color=color, label=label)
                    bottom += size / 1024
                over = {"facecolor": "white", "edgecolor": "none", "pad": 0.2}
                label = f"{bottom:.1f}"
                axes.text(place + offset, bottom + 0.9, label, ha="center", color=GREY, bbox=over)
        for gibibytes in (24, 48):
            axes.axhline(gibibytes, color="black", linewidth=0.8, linestyle="--")
            axes.text(-0.48, gibibytes + 0.4, f"{gibibytes} GiB", color="black")
        ticks = [f"{model}\npaper | planned" for model in bars]
        axes.set_xticks(range(len(bars)), ticks)
        axes.set(ylabel="GiB", ylim=(0, 54))
        axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0.12, 0.86))
    return path


def perplexity_bars(bars: Mapping[str, float], base: float, path: Path) -> Path:
    with _figure(path) as axes:
        colors = [ORANGE if label.startswith("NF4") else BLUE for label in bars]
        axes.bar(range(len(bars)), bars.values(), color=colors, width=0.65)
        for position, value in enumerate(bars.values()):
            axes.text(position, value, f"{value:.2f}", ha="center", va="bottom", color=GREY)
        axes.axhline(base, color="black", linewidth=1, linestyle="--")
        axes.text(len(bars) + 0.1, base, f"base {base:.2f}", ha="right", va="bottom")
        axes.set_xticks(range(len(bars)), [label.replace(" (", "\n(") for label in bars])
        axes.set(ylabel="perplexity", xlim=(-0.5, len(bars) + 0.1))
    return path


def loss_curves(curves: Mapping[str, Sequence[float]], path: Path) -> Path:
    with _figure(path) as axes:
        for (label, losses), color in zip(curves.items(), (GREY, ORANGE), strict=False):
            steps = range(1, len(losses) + 1)
            axes.plot(steps, losses, color=color, alpha=0.3, linewidth=1)
            axes.plot(
                steps, _running_mean(losses), color=color, linewidth=2, label=f"LoRA over {label}"
            )
        axes.set(xlabel="step", ylabel="training loss, nats per token")
        axes.legend(frameon=False)
    return path


def _running_mean(values: Sequence[float], width: int = 10) -> list[float]:
    spans = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(span) / len(span) for span in spans]
