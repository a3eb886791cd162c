"""A plot of values with their intervals: a row for each data type, a panel for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from paper_repro.harness import draw
from paper_repro.harness.stats import Interval


def panels(
    path: Path,
    rows: Sequence[str],
    found: Mapping[str, Mapping[str, Interval]],
    xlabel: str,
    line: float,
) -> Path:
    """Panels beside each other, each with its own scale, as what they show differs in size and not in order.

    Args:
        path: an .svg file.
        rows: labels of the data types, from the top; those that begin with NF4 stand out.
        found: for each panel, by its title, an interval for each row that it has; a title that begins with
            "paper" is of the paper's values.
        line: where a vertical line is drawn: what the values are seen against.
    """
    height = 1.1 + 0.32 * len(rows)
    with draw.panels(path, len(found), height=height, sharey=True) as axes:
        axes[0].figure.supxlabel(xlabel, fontsize=10)
        for panel, (title, values) in zip(axes, found.items(), strict=True):
            panel.axvline(line, color=draw.GREY, linewidth=0.8, linestyle="--")
            for row, label in enumerate(rows):
                if label in values:
                    color = draw.ORANGE if label.startswith("NF4") else draw.BLUE
                    color = draw.GREY if title.startswith("paper") else color
                    of = values[label]
                    panel.hlines(row, of.low, of.high, color=color, linewidth=2)
                    panel.plot(of.mean, row, "o", color=color)
            panel.set_title(title, fontsize=10)
            panel.margins(x=0.12)
            panel.locator_params(axis="x", nbins=4)
            panel.set(yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.5, -0.5))
            panel.label_outer()
    return path
