"""The plots of `beyond`, and what its tables share with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from paper_repro.beyond_errors import BLOCKSIZE, CODES, COMPARED, LABELS, NORMAL, OF_NORMAL
from paper_repro.beyond_models import LARGEST
from paper_repro.harness import draw
from paper_repro.harness.draw import BLUE, GREY, LIGHT, ORANGE
from paper_repro.harness.experiment import Result
from paper_repro.harness.panels import panels
from paper_repro.harness.stats import gap
from paper_repro.measures.in_data_type import BASE

STYLES = {
    "nf4": {"color": ORANGE, "linestyle": "-"},
    "af4": {"color": BLUE, "linestyle": "-"},
    "least_absolute": {"color": BLUE, "linestyle": ":"},
    "least_squared": {"color": GREY, "linestyle": "-"},
    "least_squared_free": {"color": GREY, "linestyle": ":"},
}
MARKERS = {NORMAL: "o", "minilm": "s", "whisper": "^", "own": "D", "smollm2": "v"}
COLORS = {NORMAL: ORANGE, "minilm": BLUE, "whisper": GREY, "own": "black", "smollm2": LIGHT}

TICKS = (4.002, 4.008, 4.03, 4.127, 4.5, 5)  # bits, on an axis that is logarithmic in bits - 4


def relative(found: Mapping[str, Any], code: str, key: str, to: str = "nf4") -> float:
    """An error of one codebook relative to another's; below 0 is better."""
    return found[code][key] / found[to][key] - 1


def front(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points that no other has both no more bits and no more error than, from the fewest bits on."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda p: (p["bits"], p["rmse"])):
        if not best or point["rmse"] < best[-1]["rmse"]:
            best.append(point)
    return best


def show_normal(result: Result, path: Path) -> Path:
    with draw.panels(path, 2) as axes:
        for panel, (key, title) in zip(
            axes, (("mse", "squared error"), ("mae", "absolute error")), strict=True
        ):
            for code in OF_NORMAL:
                found = [relative(result["normal"][str(s)], code, key) * 100 for s in COMPARED]
                panel.plot(
                    COMPARED, found, marker="o", markersize=4, **STYLES[code], label=CODES[code]
                )
            panel.set_xscale("log", base=2)
            panel.set_xticks(COMPARED, [str(size) for size in COMPARED])
            panel.set(title=title, xlabel="block size")
        axes[0].set_ylabel("above NF4's, %")
        handles, labels = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return path


def show_bits(result: Result, path: Path) -> Path:
    with draw.figure(path, height=4.2) as axes:
        for source, found in result["sources"].items():
            for double in (True, False) if source == NORMAL else (True,):
                points = [p for p in found["sizes"] if p["double_quant"] is double]
                axes.plot(
                    [p["bits"] - 4 for p in points],
                    [p["rmse"] * 100 for p in points],
                    MARKERS[source],
                    markersize=5,
                    color=COLORS[source],
                    markerfacecolor=COLORS[source] if double else "white",
                    label=LABELS[source] if double else f"{LABELS[source]}, scales in fp32",
                )
        best = front(result["sources"][NORMAL]["sizes"])
        bits, errors = [p["bits"] - 4 for p in best], [p["rmse"] * 100 for p in best]
        axes.plot(bits, errors, color=ORANGE, linewidth=1, zorder=0)
        for point in best:
            if point["double_quant"]:
                at = (point["bits"] - 4, point["rmse"] * 100)
                label = str(point["blocksize"])
                axes.annotate(
                    label, at, (0, -14), textcoords="offset points", ha="center", color=ORANGE
                )
        axes.set_xscale("log")
        axes.set_xticks([bits - 4 for bits in TICKS], [f"{bits:g}" for bits in TICKS])
        axes.minorticks_off()
        axes.margins(y=0.12)
        axes.set(xlabel="bits per parameter", ylabel="relative RMSE, %")
        axes.legend(frameon=False)
    return path


def show_codes(result: Result, path: Path) -> Path:
    with draw.figure(path, height=3.6) as axes:
        for place, (source, found) in enumerate(result["sources"].items()):
            changes = [relative(found["codes"], code, "rmse") * 100 for code in CODES]
            axes.plot(
                changes,
                [row + 0.12 * place for row in range(len(CODES))],
                MARKERS[source],
                color=COLORS[source],
                label=LABELS[source],
                markersize=6,
            )
        axes.axvline(0, color=ORANGE, linewidth=1, zorder=0)
        axes.set_yticks(range(len(CODES)), list(CODES.values()))
        axes.invert_yaxis()
        axes.set_xlabel("relative RMSE of the weights above NF4's, %")
        axes.legend(frameon=False, loc="lower right")
    return path


def show_perplexity(of: Mapping[str, Any], path: Path) -> Path:
    above = {
        f"blocks of {size}": {
            CODES[code]: gap(of[f"{code}@{size}"], of[BASE])
            for code in CODES
            if f"{code}@{size}" in of
        }
        for size in (BLOCKSIZE, LARGEST)
    }
    return panels(path, list(CODES.values()), above, "nats per token above the base", line=0)
