"""The figures of a study: what each run reached, and the paired differences between arms. Pure functions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scipy import stats

CONFIDENCE = 0.95


class Run(NamedTuple):
    """One training: an arm with a seed, and the accuracy that it reached; mAP as fractions of 1."""

    arm: str
    seed: int
    map50_95: float
    map50: float
    seconds_per_step: float
    """Time of the training, validation included, by its batches; of a killed one that went on, of all its parts."""


class Difference(NamedTuple):
    """Paired differences of mAP50-95, `arm` minus `against`, as fractions of 1."""

    arm: str
    against: str
    mean: float
    low: float | None
    """Lower end of the 95 % interval by Student's t; None for a single pair."""
    high: float | None
    pairs: int
    wins: int
    """Pairs in which `arm` was better."""


def paired(arm: str, against: str, runs: Sequence[Run]) -> Difference | None:
    """The difference of two arms over the seeds that both have; None where they share none."""
    reached = {(run.arm, run.seed): run.map50_95 for run in runs}
    seeds = [seed for name, seed in reached if name == arm and (against, seed) in reached]
    gaps = [reached[arm, seed] - reached[against, seed] for seed in seeds]
    if not gaps:
        return None
    mean, half = statistics.fmean(gaps), half_width(gaps)
    low, high = (None, None) if half is None else (mean - half, mean + half)
    return Difference(arm, against, mean, low, high, len(gaps), sum(gap > 0 for gap in gaps))


def half_width(values: Sequence[float]) -> float | None:
    """Half of the mean's 95 % interval by Student's t; None of a single value."""
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)
    return float(quantile * statistics.stdev(values) / math.sqrt(len(values)))


def summary(
    arms: Mapping[str, Any], runs: Sequence[Run], *, seeds: int, failed: Mapping[str, str], **about: Any
) -> dict[str, Any]:
    """The content of study.json. Each two arms stand there once, the later one against the earlier.

    Args:
        arms: name -> settings, in the order of the recipe.
        failed: "<arm>-<seed>" -> the last lines that the run printed.
        about: what else a reader must know: epochs, split, image size, student, the teacher with its accuracy, digest
            of the data, and how each arm trains.
    """
    names = list(arms)
    pairs = [(arm, against) for i, arm in enumerate(names) for against in names[:i]]
    differences = [found for pair in pairs if (found := paired(*pair, runs))]
    return {
        "arms": names,
        "seeds": seeds,
        **about,
        "settings": dict(arms),
        "differences": [difference._asdict() for difference in differences],
        "runs": [run._asdict() for run in runs],
        "failed": dict(failed),
    }


def means(runs: Sequence[Mapping[str, Any]], arm: str, key: str = "map50_95") -> float | None:
    """The mean of one column over the runs of an arm; None where it has no run."""
    values = [run[key] for run in runs if run["arm"] == arm]
    return statistics.fmean(values) if values else None
