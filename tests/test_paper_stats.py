"""Statistics of paired measurements, against cases whose answer is known."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from paper_repro.harness import stats


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.3, 1.0, size=400)
    interval = stats.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.01)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.01)


def test_an_interval_is_the_same_each_time() -> None:
    values = [0.1, 0.2, -0.3, 0.5]
    assert stats.bootstrap(values) == stats.bootstrap(values)


def test_weights_count_as_that_many_items() -> None:
    assert stats.bootstrap([1.0, 4.0], [2, 1]).mean == pytest.approx(2.0)
    assert stats.bootstrap([1.0, 4.0], [3, 3]) == stats.bootstrap([1.0, 4.0])


@pytest.mark.parametrize("resample", [stats.bootstrap, stats.bootstrap_median])
def test_one_value_has_no_interval(resample: Callable[[list[float]], stats.Interval]) -> None:
    with pytest.raises(ValueError, match="at least two items to resample, got 1"):
        resample([1.0])


def test_the_interval_of_a_median_is_that_of_its_ranks() -> None:
    """Of 101 values, ranks 41 and 61 are 1.96 standard deviations of a binomial from the middle."""
    values = (
        np.random.default_rng(2).permutation(101).astype(float) ** 3
    )  # skewed: ranks alone count
    interval = stats.bootstrap_median(values)
    assert interval.mean == 50**3
    assert interval.low ** (1 / 3) == pytest.approx(40, abs=1.5)
    assert interval.high ** (1 / 3) == pytest.approx(60, abs=1.5)


def test_an_interval_is_shown_in_any_unit() -> None:
    interval = stats.Interval(0.0123, -0.0051, 0.02)
    assert str(interval) == f"{interval}" == "+0.0123 [-0.0051, +0.0200]"
    assert interval.percent() == "+1.2% [-0.5%, +2.0%]"
    assert f"{interval.scaled(100):+.2f}" == "+1.23 [-0.51, +2.00]"


def test_the_gap_is_paired() -> None:
    """Parts differ far more from each other than the models do."""
    one = {"parts": [(2.0, 10), (4.0, 10)]}
    other = {"parts": [(1.5, 10), (3.5, 10)]}
    gap = stats.gap(one, other)
    assert (gap.mean, gap.low, gap.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="same tokens"):
        stats.gap(one, {"parts": [(1.5, 10), (3.5, 9)]})


def test_spread_is_the_sample_deviation() -> None:
    spread = stats.spread([1.0, 2.0, 3.0])
    assert (spread.mean, spread.deviation) == (2.0, 1.0)
    assert str(spread) == "2.00 ± 1.00"
    assert stats.spread([5.0]).deviation == 0.0


def test_pairing_sees_what_seeds_hide() -> None:
    one, other = [1.0, 2.0, 3.0], [1.1, 2.1, 3.12]
    assert stats.paired_p(one, other) < 0.01
    assert stats.paired_p(one, [1.5, 1.5, 3.0]) > 0.5
