"""4-bit codebooks from their definitions: AF4, the least absolute error, and the least squared error (Lloyd-Max).

All are fixed points of one iteration: each value moves to the centre of the scaled weights that round to it. The
centre is their median for the absolute error, their mean for the squared one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

import qlora
from qlora.kernels import reference
from qlora.kernels.formats import FORMATS

CELLS = 8192  # equal parts of [-1, 1] in which scaled weights are counted
MAXIMA = 2000  # equally likely maxima of a block, over which its density is averaged
ENOUGH, MOST_STEPS = 1e-9, 20_000
NF4_VALUES = tuple(FORMATS["nf4"].values)
ZERO = NF4_VALUES.index(0.0)
KEPT = (-1.0, 0.0, 1.0)
EDGES = np.linspace(-1, 1, CELLS + 1)
AF4_PUBLISHED: dict[int, tuple[float, ...]] = {  # by block size; Yoshida 2023, arXiv 2306.06965
    64: (
        *(-1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0),
        *(0.04273164, 0.12934483, 0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0),
    ),
    4096: (
        *(-1.0, -0.5379003, -0.38399174, -0.27664257, -0.18850865, -0.10999076, -0.03618635, 0.0),
        *(0.03129431, 0.09480323, 0.16126887, 0.23343416, 0.31577979, 0.41743354, 0.56468758, 1.0),
    ),
}


@dataclass(frozen=True)
class Mass:
    """How much scaled weights count, by where they lie: fp64 [CELLS], even within a cell; it sums to 1."""

    cells: np.ndarray

    def median(self, edges: np.ndarray) -> np.ndarray:
        """Of the mass between neighbouring edges: fp64 [edges - 1]."""
        total = np.concatenate([[0.0], np.cumsum(self.cells)])
        below = np.interp(edges, EDGES, total)
        return np.interp((below[1:] + below[:-1]) / 2, total, EDGES)

    def mean(self, edges: np.ndarray) -> np.ndarray:
        """Likewise; where there is no mass, the middle."""
        centres = (EDGES[1:] + EDGES[:-1]) / 2
        first = np.concatenate([[0.0], np.cumsum(self.cells * centres)])
        total = np.concatenate([[0.0], np.cumsum(self.cells)])
        mass = np.diff(np.interp(edges, EDGES, total))
        middle = (edges[1:] + edges[:-1]) / 2
        moment = np.diff(np.interp(edges, EDGES, first))
        return np.divide(moment, mass, out=middle, where=mass > 1e-15)


@cache
def normal_mass(blocksize: int, power: float) -> Mass:
    """Of normal weights divided by the largest magnitude M of their block; each counts M^power.

    Power 0: the scaled weights themselves. Power 2: an error of e in a scaled weight is one of M e in the
    weight, so that this gives the squared error of weights.

    M has the distribution function (2 Phi(m) - 1)^blocksize. One weight of a block lies at -1 or 1; given M the
    others are normal numbers cut off at M.
    """
    from scipy.stats import norm

    likely = (np.arange(MAXIMA) + 0.5) / MAXIMA
    maxima = norm.isf((1 - likely ** (1 / blocksize)) / 2)
    below = np.zeros(CELLS + 1)
    for largest in maxima:
        cut = norm.cdf(largest * EDGES) / (2 * norm.cdf(largest) - 1)
        below += largest**power * cut
    cells = np.diff(below) / MAXIMA * (blocksize - 1) / blocksize
    cells[[0, -1]] += (maxima**power).mean() / blocksize / 2
    return Mass(cells / cells.sum())


def weights_mass(weights: Iterable[torch.Tensor], blocksize: int) -> Mass:
    """Of given weights, each counting the square of its block's largest magnitude, for the weights' squared error."""
    cells = torch.zeros(CELLS, dtype=torch.float64)
    for weight in weights:
        scaled, absmax = reference.normalize(reference.to_blocks(weight, blocksize))
        counts = absmax.double().square()[:, None].expand_as(scaled).flatten()[: weight.numel()]
        cell = ((scaled + 1) * (CELLS / 2)).long().clamp_(0, CELLS - 1).flatten()
        cells += torch.bincount(cell[: weight.numel()].cpu(), counts.cpu(), CELLS)
    return Mass((cells / cells.sum()).numpy())


def least_absolute(blocksize: int) -> tuple[float, ...]:
    """The least expected |x - q(x)| of a scaled normal weight x, with -1, 0 and 1 kept."""
    return _fixed_point(normal_mass(blocksize, 0).median, KEPT)


def af4(blocksize: int) -> tuple[float, ...]:
    """AF4 (Yoshida 2023), as its values were made: the values beside 0 as though 0 took no weights.

    Each value is the median of what lies between the midpoints to its neighbours, but for those beside 0:
    theirs lies between a midpoint and 0 itself. Rounding gives some of it to 0, so this is not `least_absolute`.
    """
    mass = normal_mass(blocksize, 0)

    def medians(edges: np.ndarray) -> np.ndarray:
        edges[[ZERO, ZERO + 1]] = 0.0
        return mass.median(edges)

    return _fixed_point(medians, KEPT)


def lloyd_max(mass: Mass, kept: Sequence[float] = KEPT) -> tuple[float, ...]:
    """The least squared error on `mass` (Lloyd 1982, Max 1960), but for the values that are kept.

    With -1 and 1 kept, the largest weight of a block decodes to itself; with 0 kept, so does a zero.
    """
    return _fixed_point(mass.mean, kept)


def _fixed_point(
    centres: Callable[[np.ndarray], np.ndarray], kept: Sequence[float]
) -> tuple[float, ...]:
    """From NF4 on, move the values that are not kept to the centres of their shares of [-1, 1] until they rest."""
    values = np.array(NF4_VALUES)
    free = ~np.isin(values, kept)
    for _ in range(MOST_STEPS):
        edges = np.concatenate([[-1.0], (values[1:] + values[:-1]) / 2, [1.0]])
        moved = np.where(free, centres(edges), values)
        step, values = np.abs(moved - values).max(), moved
        if step < ENOUGH:
            return tuple(values.tolist())
    raise RuntimeError(f"values still move by {step:.1e} after {MOST_STEPS} steps")


def register(values: Sequence[float]) -> str:
    """Make values a data type; returns its name, which holds for these values alone."""
    name = f"codebook-{hashlib.sha256(repr(tuple(values)).encode()).hexdigest()[:12]}"
    qlora.register_format(name, values)
    return name
