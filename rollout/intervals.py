"""Confidence intervals of a mean, for evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev
from typing import Literal, NamedTuple

from scipy.special import stdtrit


class MeanInterval(NamedTuple):
    """A mean and the bounds of its confidence interval, in the values' own unit."""

    mean: float
    low: float
    high: float


def interval_method(values: Sequence[float]) -> Literal["wilson", "t"]:
    """Which interval :func:`mean_interval` takes: "wilson" where every value is 0 or 1, else "t"."""
    return "wilson" if all(value in (0, 1) for value in values) else "t"


def mean_interval(values: Sequence[float], level: float = 0.95) -> MeanInterval:
    """Mean with a two-sided confidence interval.

    Values that are all 0 or 1 get the Wilson score interval (Wilson, 1927), which stays within [0, 1] and has a width
    at 0 of n and n of n too. Any others get Student's t interval, mean ± t · s / sqrt(n).

    Values must be independent: several completions of one prompt are one value, their mean.

    Args:
        values: [n] finite, n >= 1. A single value that is not 0 or 1 has no variance to go by: (value, -inf, inf).
        level: share of such intervals that cover the true mean, within (0, 1).
    Raises:
        ValueError: no values, one that is not finite, or a level outside (0, 1).
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"a confidence level must lie between 0 and 1; got {level}")
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("a mean needs at least one value")
    for index, value in enumerate(numbers):
        if not math.isfinite(value):
            raise ValueError(f"value {index} of {len(numbers)} is {value}; every value must be finite")
    n, mean, upper_tail = len(numbers), fmean(numbers), (1.0 + level) / 2.0
    if interval_method(numbers) == "wilson":
        z = NormalDist().inv_cdf(upper_tail)
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        # Rounding must not put the mean of all zeros or all ones outside its own interval.
        return MeanInterval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))
    if n == 1:
        return MeanInterval(mean, -math.inf, math.inf)
    half = float(stdtrit(n - 1, upper_tail)) * stdev(numbers) / math.sqrt(n)
    return MeanInterval(mean, mean - half, mean + half)
