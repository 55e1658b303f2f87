"""Percentiles that take the number of samples into account, and intervals by resampling. Pure NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.99
"""Probability that the printed percentile is not below the true one."""
STEADY_TOLERANCE = 0.05

Statistic = Callable[[NDArray[np.float64]], Any]


@lru_cache(maxsize=256)
def percentile_rank(n: int, percentile: float) -> int:
    """The rank of the sample that is MLPerf's early-stopping estimate: 1 is the highest of n, 0 is "n too small".

    The largest t with P(Binomial(n, 1 - percentile) <= t) <= 1 - CONFIDENCE: with that confidence, more than t samples
    in n lie above the true percentile, so the t-th highest is not below it. `percentile` is a fraction.
    """
    if n < 1:
        return 0
    k = np.arange(1, n + 1)
    log_ways = np.concatenate([[0.0], np.cumsum(np.log((n - k + 1) / k))])
    hits = np.arange(n + 1)
    log_mass = log_ways + hits * math.log1p(-percentile) + (n - hits) * math.log(percentile)
    below = np.cumsum(np.exp(log_mass))
    return max(int(np.searchsorted(below, 1 - CONFIDENCE, side="right")) - 1, 0)


def percentile_estimate(samples: ArrayLike, percentile: float) -> float | None:
    """A bound that the true percentile does not exceed, at 99 % confidence; None if there are too few samples.

    The fewest are 11, 64, 130 and 662 for p50, p90, p95 and p99. No sample is clipped or trimmed: an outlier is part
    of the tail that is measured.
    """
    values = np.asarray(samples, np.float64)
    rank = percentile_rank(values.size, percentile)
    return float(np.partition(values, -rank)[-rank]) if rank else None


class Interval(NamedTuple):
    low: float
    high: float


def bootstrap(samples: ArrayLike, statistic: Statistic, *, rng: np.random.Generator) -> Interval:
    """95 % percentile-bootstrap interval of `statistic`, which gets (n, ...) drawn with replacement along axis 0.

    For a difference, let a sample be the pair: rows of (n, 2) are drawn together.
    """
    drawn = bootstrap_distribution(samples, statistic, rng=rng)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Interval(float(low), float(high))


def bootstrap_distribution(
    samples: ArrayLike, statistic: Statistic, *, rng: np.random.Generator, resamples: int = 1000
) -> NDArray[np.float64]:
    """The statistic of each resample, (resamples,). A sample counts as often as it is drawn."""
    values = np.asarray(samples, np.float64)
    draws = (values[rng.integers(0, len(values), len(values))] for _ in range(resamples))
    return np.array([statistic(draw) for draw in draws])


def standard_error(samples: ArrayLike) -> float | None:
    """Standard error of the mean of independent samples; None of fewer than two."""
    values = np.asarray(samples, np.float64)
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None


def jackknife_error(left_out: ArrayLike) -> float | None:
    """Standard error of a statistic from its values with each group of the data left out; None of fewer than two.

    sqrt((g - 1) / g · sum of squared deviations from their mean); Efron and Tibshirani 1993, chapter 11.
    """
    values = np.asarray(left_out, np.float64)
    return float(math.sqrt((values.size - 1) * values.var())) if values.size > 1 else None


def halves_agree(values: ArrayLike) -> bool:
    """Whether the medians of the first and the second half differ by at most 5 %; true of fewer than two values."""
    whole = np.asarray(values, np.float64)
    if whole.size < 2:
        return True
    first, second = (float(np.median(half)) for half in np.array_split(whole, 2))
    return abs(first - second) <= STEADY_TOLERANCE * min(first, second)
