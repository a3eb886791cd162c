"""Statistics of paired measurements: two models on the same tokens, two methods with the same seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

DRAWS, AT_ONCE, SEED = 10_000, 100, 0


@dataclass(frozen=True)
class Interval:
    """A mean, or of `bootstrap_median` a median, and the 95 % interval that a bootstrap gives it."""

    mean: float
    low: float
    high: float

    def scaled(self, factor: float) -> Interval:
        """The same in another unit: a share times 100 is in percentage points."""
        return Interval(factor * self.mean, factor * self.low, factor * self.high)

    def percent(self) -> str:
        return f"{self:+.1%}"

    def __format__(self, spec: str) -> str:
        """Each of the three by `spec`, "+.4f" unless given."""
        mean, low, high = (format(x, spec or "+.4f") for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self, "")


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None) -> Interval:
    """The weighted mean of values, and its percentile interval over resampled items (Efron 1979).

    Args:
        values: one number for each item that is drawn anew: differences of two models on the same window.
        weights: what each counts for: its tokens. The same for all unless given.

    Raises:
        ValueError: fewer than two values: there is nothing to draw.
    """
    value, weight = np.asarray(values, float), np.ones(len(values))
    if weights is not None:
        weight = np.asarray(weights, float)
    total = value * weight
    bounds = _bounds(len(value), lambda drawn: total[drawn].sum(1) / weight[drawn].sum(1))
    return Interval(float(total.sum() / weight.sum()), *bounds)


def bootstrap_median(values: Sequence[float]) -> Interval:
    """The median of values, and its percentile interval over resampled items."""
    value = np.asarray(values, float)
    bounds = _bounds(len(value), lambda drawn: np.median(value[drawn], axis=1))
    return Interval(float(np.median(value)), *bounds)


def _bounds(count: int, estimate: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of an estimate over resampled items.

    Args:
        count: how many items there are.
        estimate: from the indices (draws, count) of the items that were drawn, one number for each draw.
    """
    if count < 2:
        raise ValueError(f"values must have at least two items to resample, got {count}")
    random = np.random.default_rng(SEED)
    draws = (  # all at once takes a gigabyte for a few thousand items
        random.integers(count, size=(AT_ONCE, count)) for _ in range(DRAWS // AT_ONCE)
    )
    low, high = np.quantile(np.concatenate([*map(estimate, draws)]), (0.025, 0.975))
    return float(low), float(high)


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
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return Spread(statistics.fmean(values), deviation)


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """p of Student's paired t-test, two-sided: one and other measured with the same seeds."""
    from scipy.stats import ttest_rel

    return float(ttest_rel(one, other).pvalue)


def p_in_words(p: float) -> str:
    """Three decimals, or that it is below them."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"
