"""Statistics of paired measurements: two models on the same tokens, two methods with the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS, AT_ONCE, SEED = 10_000, 100, 0


@dataclass(frozen=True)
class Interval:
    """A mean and the 95 % interval that a bootstrap gives it."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """The weighted mean of values, and its percentile interval over resampled items (Efron 1979).

    Args:
        values: one number for each item that is drawn anew: differences of two models on the same window.
        weights: what each counts for: its tokens. The same for all unless given.

    Raises:
        ValueError: fewer than two values: there is nothing to draw.
    """
    if len(values) < 2:
        raise ValueError(f"values must have at least two items to resample, got {len(values)}")
    value, weight = np.asarray(values, float), np.ones(len(values))
    if weights is not None:
        weight = np.asarray(weights, float)
    total, random = value * weight, np.random.default_rng(SEED)
    means = []
    for _ in range(DRAWS // AT_ONCE):  # all at once takes a gigabyte for a few thousand items
        drawn = random.integers(len(value), size=(AT_ONCE, len(value)))
        means.append(total[drawn].sum(1) / weight[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), (0.025, 0.975))
    return Interval(float(total.sum() / weight.sum()), float(low), float(high))


def gap(one: dict[str, Any], other: dict[str, Any]) -> Interval:
    """Nats per token of one measurement of `perplexity.measure` above another's, on the same parts."""
    pairs = list(zip(one["parts"], other["parts"], strict=True))
    if any(first[1] != second[1] for first, second in pairs):
        raise ValueError("one and other must be measured on the same tokens, part by part")
    return bootstrap([a[0] - b[0] for a, b in pairs], [a[1] for a, _ in pairs])


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds."""

    mean: float
    deviation: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.deviation:.2f}"


def spread(values: Sequence[float]) -> Spread:
    mean = sum(values) / len(values)
    squares = sum((value - mean) ** 2 for value in values)
    return Spread(mean, math.sqrt(squares / max(len(values) - 1, 1)))


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """p of Student's paired t-test, two-sided: one and other measured with the same seeds."""
    from scipy.stats import ttest_rel

    return float(ttest_rel(one, other).pvalue)


def p_in_words(p: float) -> str:
    """Three decimals, or that it is below them."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"
