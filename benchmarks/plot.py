"""Speed-up bars from result files alone: how many times our time each contender takes.

python -m benchmarks plot [results/DEVICE.json ...]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from qlora import files

FOLDER = Path(__file__).resolve().parent
RESULTS, PLOTS = FOLDER / "results", FOLDER / "plots"

_COLORS = ("#2f6db3", "#d9772b", "#7a9a3a", "#8a5aa8", "#5a5a5a")
_YARDSTICK = "#c9c9c9"


def bars(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, float, bool]]]]:
    """What is drawn: (case, [(contender, its time over ours, whether it is a yardstick)]), without ours."""
    drawn = []
    for case in result["cases"]:
        others = [
            (timing["contender"], timing["time_over_ours"], timing["is_yardstick"])
            for timing in case["timings"][1:]
            if timing["time_over_ours"] is not None
        ]
        if others:
            drawn.append((f"{case['group']}: {case['name']}", others))
    return drawn


def draw(result: Mapping[str, Any], path: Path) -> Path:
    """Write the plot of one result file as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = bars(result)
    if not drawn:
        raise ValueError(
            f"{path.stem}: there is nothing to draw, no contender was timed beside ours"
        )
    lines = sum(len(others) + 1 for _, others in drawn)
    colors = _colors(drawn)
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.2 * lines), layout="constrained")
        try:
            _draw_bars(axes, drawn, colors)
            _label(axes, result)
            with files.new_file(path) as temporary:
                figure.savefig(temporary, dpi=130, format="png")
        finally:
            pyplot.close(figure)
    return path


def _colors(drawn: Sequence[tuple[str, list[tuple[str, float, bool]]]]) -> dict[str, str]:
    """One color for a contender throughout."""
    peers = dict.fromkeys(
        name for _, others in drawn for name, _, is_yardstick in others if not is_yardstick
    )
    return {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(peers)}


def _draw_bars(
    axes: Any,
    drawn: Sequence[tuple[str, list[tuple[str, float, bool]]]],
    colors: Mapping[str, str],
) -> None:
    y, ticks, labelled = 0.0, [], set()
    for case, others in drawn:
        ticks.append((y + (len(others) - 1) / 2, case))
        for name, ratio, is_yardstick in others:
            color = _YARDSTICK if is_yardstick else colors[name]
            label = f"{name} (yardstick)" if is_yardstick else name
            axes.barh(y, ratio, color=color, label=None if label in labelled else label)
            axes.text(ratio, y, f" {ratio:.2f}", va="center", fontsize=7)
            labelled.add(label)
            y += 1
        y += 1
    axes.set_yticks(*zip(*ticks, strict=True))
    axes.set_ylim(y - 1.4, -0.6)


def _label(axes: Any, result: Mapping[str, Any]) -> None:
    device = result["device"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time / our time: right of the line, ours is faster")
    axes.set_title(f"{device['name']}{threads}, commit {result['commit']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)


def main(argv: list[str]) -> int:
    """Draw the plots of the given result files, by default of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=main.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="result files")
    parser.add_argument("--output", type=Path, default=PLOTS, help="folder for the PNG files")
    options = parser.parse_args(argv)
    for path in options.files or sorted(RESULTS.glob("*.json")):
        print(draw(results.read(path), options.output / f"{path.stem}.png"))
    return 0
