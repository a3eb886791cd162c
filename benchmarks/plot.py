"""Two plots of a result, from its file alone: speed-ups over each peer, and a roofline.

python -m benchmarks plot [results/DEVICE.json ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import results, roofline, speedups

FOLDER = Path(__file__).resolve().parent
RESULTS, PLOTS = FOLDER / "results", FOLDER / "plots"


def draw(result: Mapping[str, Any], path: Path) -> list[Path]:
    """Write the speed-ups as the PNG `path` and the roofline beside it, and say which there were to draw."""
    drawn = []
    if bars := speedups.bars(result):
        drawn.append(speedups.draw(result, bars, path))
    points, conversions = roofline.points(result), roofline.conversions(result)
    if points or conversions:
        beside = path.with_name(f"{path.stem}-roofline.png")
        drawn.append(roofline.draw(result, points, conversions, beside))
    if not drawn:
        raise ValueError(f"{path.stem}: there is nothing to draw, nothing was timed beside ours")
    return drawn


def main(argv: list[str]) -> int:
    """Draw the plots of the given result files, by default of all. The exit status is 2 if one could not be."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks plot", description=main.__doc__)
    parser.add_argument("files", nargs="*", type=Path, metavar="JSON", help="result files")
    parser.add_argument("--output", type=Path, default=PLOTS, help="folder for the PNG files")
    options = parser.parse_args(argv)
    status = 0
    for path in options.files or sorted(RESULTS.glob("*.json")):
        try:
            for drawn in draw(results.read(path), options.output / f"{path.stem}.png"):
                print(drawn)
        except ImportError:
            print("plots need matplotlib, which is not installed", file=sys.stderr)
            return 2
        except (OSError, ValueError) as error:  # the other files can still be drawn
            print(f"not drawn: {error}", file=sys.stderr)
            status = 2
    return status
