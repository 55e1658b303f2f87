from __future__ import annotations

import numpy as np
import pytest

from benchmarks.statistics import (
    bootstrap,
    bootstrap_distribution,
    halves_agree,
    jackknife_error,
    percentile_estimate,
    percentile_rank,
    standard_error,
)


@pytest.mark.parametrize(
    ("n", "percentile", "rank"),
    [(662, 0.99, 1), (661, 0.99, 0), (1000, 0.99, 2), (1000, 0.90, 78), (10000, 0.99, 77), (24576, 0.90, 2348)],
)
def test_the_rank_is_that_of_mlperf(n: int, percentile: float, rank: int) -> None:
    assert percentile_rank(n, percentile) == rank


@pytest.mark.parametrize(("percentile", "n"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.99, 662), (0.999, 6636)])
def test_a_percentile_needs_this_many_samples(percentile: float, n: int) -> None:
    assert percentile_rank(n - 1, percentile) == 0
    assert percentile_rank(n, percentile) == 1


def test_too_few_samples_give_no_percentile() -> None:
    assert percentile_estimate([], 0.5) is None
    assert percentile_estimate(np.ones(661), 0.99) is None


def test_an_outlier_stays_in_the_tail() -> None:
    samples = np.ones(662)
    samples[0] = 10.0
    assert percentile_estimate(samples, 0.99) == 10.0


def test_the_estimate_is_below_the_true_percentile_in_at_most_one_run_of_a_hundred() -> None:
    rng = np.random.default_rng(5)
    low = [percentile_estimate(rng.random(800), 0.9) < 0.9 for _ in range(2000)]  # type: ignore[operator]
    assert np.mean(low) < 0.015


def test_the_bootstrap_of_a_mean_agrees_with_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    theory = values.std() / np.sqrt(len(values))
    drawn = bootstrap_distribution(values, np.mean, rng=np.random.default_rng(2), resamples=4000)
    assert drawn.std() == pytest.approx(theory, rel=0.05)


def test_a_bootstrap_that_drops_repeated_draws_fails_that_test() -> None:
    values = np.random.default_rng(1).normal(size=400)
    rows = np.column_stack([values, np.arange(len(values))])
    theory = values.std() / np.sqrt(len(values))
    drawn = bootstrap_distribution(
        rows, lambda r: np.unique(r, axis=0)[:, 0].mean(), rng=np.random.default_rng(2), resamples=2000
    )
    assert drawn.std() != pytest.approx(theory, rel=0.05)


def test_a_paired_interval_is_narrower_than_the_sum_of_both() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=200)
    pairs = np.column_stack([base, base + 0.1 + rng.normal(scale=0.01, size=200)])
    low, high = bootstrap(pairs, lambda p: (p[:, 1] - p[:, 0]).mean(), rng=rng)
    assert low < 0.1 < high
    assert high - low < 0.01


def test_halves_that_differ_by_more_than_a_twentieth_do_not_agree() -> None:
    assert halves_agree([10.0, 10.1, 9.9, 10.0] * 5)
    assert halves_agree([9.0, 11.0] * 6)
    assert not halves_agree([10.0] * 10 + [11.0] * 10)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=12)
    left_out = [np.delete(values, index).mean() for index in range(len(values))]
    assert jackknife_error(left_out) == pytest.approx(standard_error(values))


def test_an_error_needs_two_values() -> None:
    assert standard_error([1.0]) is None
    assert jackknife_error([1.0]) is None
    assert standard_error([1.0, 1.0]) == 0.0
