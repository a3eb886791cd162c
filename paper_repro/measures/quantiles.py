"""Appendix E: NF4 from the quantiles of the normal distribution, and what equation 4 says instead."""

from __future__ import annotations

from statistics import NormalDist

OFFSET = 1 - (1 / 30 + 1 / 32) / 2  # outermost quantile of NF4, in the paper's own code

quantile = NormalDist().inv_cdf


def nf4_from_quantiles() -> list[float]:
    """NF4 from its definition: quantiles of N(0, 1), scaled to [-1, 1], with an exact zero.

    Eight values come from the upper half and seven from the lower, as 16 codes with a zero leave one
    half a value more.
    """
    upper = [quantile(OFFSET + (0.5 - OFFSET) * i / 8) for i in range(8)]
    lower = [-quantile(OFFSET + (0.5 - OFFSET) * i / 7) for i in range(7)]
    return sorted(value / upper[0] for value in [*upper, 0.0, *lower])


def equation_4() -> list[float]:
    """The finite values of the paper's equation 4 as it is printed, for 4 bits, scaled to [-1, 1].

    They are q_i = (Q(i / 17) + Q((i + 1) / 17)) / 2 with Q the quantiles of N(0, 1), which are infinite at 0
    and 1.
    """
    values = [(quantile(i / 17) + quantile((i + 1) / 17)) / 2 for i in range(1, 16)]
    return [value / values[-1] for value in values]
