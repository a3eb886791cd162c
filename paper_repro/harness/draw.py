"""How plots look. Each module draws its own with `figure`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qlora import files

BLUE, ORANGE, GREY, LIGHT = "#2f6db3", "#d9772b", "#5a5a5a", "#b9cfe8"

STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "paper_repro",
}


@contextmanager
def figure(path: Path, width: float = 7.2, height: float = 3.6) -> Iterator[Any]:
    """matplotlib's axes to draw on, as the one panel of `panels`."""
    with panels(path, 1, width, height) as (axes,):
        yield axes


@contextmanager
def panels(
    path: Path, count: int, width: float = 7.2, height: float = 3.6, sharey: bool = False
) -> Iterator[list[Any]]:
    """Axes beside each other, in inches together; saved to `path`, an .svg, when the block ends well.

    The same drawing gives the same bytes: no date, names of elements from a fixed salt.

    Raises:
        ValueError: `path` does not end in .svg.
    """
    if path.suffix != ".svg":
        raise ValueError(f"path must end in .svg, got {path.name}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        drawn, axes = pyplot.subplots(
            1, count, figsize=(width, height), sharey=sharey, squeeze=False, layout="constrained"
        )
        try:
            yield list(axes[0])
            with files.new_file(path) as temporary:
                drawn.savefig(temporary, format="svg", metadata={"Date": None})
        finally:
            pyplot.close(drawn)
