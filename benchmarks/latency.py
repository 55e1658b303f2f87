"""How long a detector takes, from a decoded frame to final boxes, and which of two runs is faster.

The timed span starts at a uint8 frame in host memory and ends with boxes in host memory: preprocessing, copies,
the network, suppression and postprocessing are inside; decoding the picture is not. Clocks are arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.statistics import Interval, bootstrap, halves_agree, is_steady, percentile_estimate
from runtime.errors import UsageError

Clock = Callable[[], int]
"""Nanoseconds that never go back."""
Frame = NDArray[np.uint8]
WINDOW = 5
"""Calls of one warm-up window."""
WINDOW_TOLERANCE = 0.1
MAX_WARMUP_MS = 10_000.0
SAME_TOLERANCE = 0.05
NS_PER_MS = 1e6


class Timed(Protocol):
    """The three spans of a detector."""

    def preprocess(self, frame: Frame) -> Any: ...

    def infer(self, prepared: Any) -> Any: ...

    def postprocess(self, raw: Any, prepared: Any) -> Any: ...


@dataclass(frozen=True)
class Span:
    """Milliseconds of one timed span. Percentiles are None where n is too small to vouch for them."""

    n: int
    mean: float
    std: float
    min: float
    max: float
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    samples: tuple[float, ...] = field(repr=False)
    """All of them, in the order measured; nothing is clipped."""

    @classmethod
    def of(cls, samples_ms: ArrayLike) -> Span:
        """Errors: ValueError without a sample."""
        values = np.asarray(samples_ms, np.float64)
        percentiles = {f"p{p}": percentile_estimate(values, p / 100) for p in (50, 90, 95, 99)}
        return cls(
            n=values.size,
            mean=float(values.mean()),
            std=float(values.std(ddof=1)) if values.size > 1 else 0.0,
            min=float(values.min()),
            max=float(values.max()),
            samples=tuple(values.tolist()),
            **percentiles,
        )


class Warmup(NamedTuple):
    """What ran before the first sample; `settled` says whether two successive windows agreed."""

    calls: int
    ms: float
    settled: bool


@dataclass(frozen=True)
class Latency:
    """The spans of the same calls; `end_to_end` contains the other three and, with an interval, the wait in the queue.

    `steady` says whether the medians of the first and the second half of the samples agree within 5 %.
    """

    preprocess: Span
    inference: Span
    postprocess: Span
    end_to_end: Span
    warmup: Warmup
    steady: bool
    interval_ms: float | None = None


def measure(
    detector: Timed,
    frames: Iterable[Frame],
    *,
    samples: int = 200,
    warmup_ms: float = 200.0,
    interval_ms: float | None = None,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> Latency:
    """Time `samples` detections over `frames` (uint8 (H, W, 3) BGR, used in turn), after a warm-up.

    Without `interval_ms` a frame comes when the last one is done. With it, frames come at that interval as from a
    camera, and a latency counts from the moment its frame was due: a slow frame also delays those that wait behind it.
    """
    queue = cycle(_at_least_one(frames))
    warm = warm_up(lambda: _timestamps(detector, next(queue), clock), warmup_ms, clock)
    due = _due_times(clock(), interval_ms, samples)
    stamps = np.array([_timestamps(detector, next(queue), clock, at, sleep) for at in due], np.int64)
    preprocess_ms, inference_ms, postprocess_ms = np.diff(stamps[:, 1:], axis=1).T / NS_PER_MS
    end_to_end_ms = (stamps[:, -1] - stamps[:, 0]) / NS_PER_MS
    return Latency(
        preprocess=Span.of(preprocess_ms),
        inference=Span.of(inference_ms),
        postprocess=Span.of(postprocess_ms),
        end_to_end=Span.of(end_to_end_ms),
        warmup=warm,
        steady=halves_agree(end_to_end_ms),
        interval_ms=interval_ms,
    )


def _at_least_one(frames: Iterable[Frame]) -> Sequence[Frame]:
    held = list(frames)
    if not held:
        raise UsageError("There is no frame to measure on", "Give a folder with pictures")
    return held


def _due_times(start_ns: int, interval_ms: float | None, samples: int) -> list[int | None]:
    if interval_ms is None:
        return [None] * samples
    return [start_ns + round(number * interval_ms * NS_PER_MS) for number in range(samples)]


def _timestamps(
    detector: Timed, frame: Frame, clock: Clock, due: int | None = None, sleep: Callable[[float], None] = time.sleep
) -> tuple[int, int, int, int, int]:
    """Nanoseconds at which the frame was due, was begun, was prepared, was inferred, was done."""
    if due is not None and clock() < due:
        sleep((due - clock()) / 1e9)
    begun = clock()
    prepared = detector.preprocess(frame)
    ready = clock()
    raw = detector.infer(prepared)
    inferred = clock()
    detector.postprocess(raw, prepared)
    return (begun if due is None else due), begun, ready, inferred, clock()


def warm_up(
    call: Callable[[], object], least_ms: float, clock: Clock = time.perf_counter_ns, most_ms: float = MAX_WARMUP_MS
) -> Warmup:
    """Call for at least `least_ms`, then until the medians of two successive windows agree within 10 %.

    Gives up at `most_ms`: a machine that never settles is measured all the same, and the result says so.
    """
    start, calls, before, settled = clock(), 0, float("inf"), False
    while not settled or _since(start, clock) < least_ms:
        now = float(np.median([_timed_ms(call, clock) for _ in range(WINDOW)]))
        calls += WINDOW
        settled, before = abs(now - before) <= WINDOW_TOLERANCE * now, now
        if _since(start, clock) >= max(least_ms, most_ms):
            break
    return Warmup(calls, _since(start, clock), settled)


def _since(start_ns: int, clock: Clock) -> float:
    return (clock() - start_ns) / NS_PER_MS


def _timed_ms(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return _since(start, clock)


# ------------------------------------------------------------------------------------------------------- A against B

Verdict = Literal["faster", "slower", "same", "ambiguous", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """`first` against `second`, measured in turns. A ratio below 1 says that the first takes less time."""

    first: str
    second: str
    ratio: float
    """Median over rounds of (median of the first / median of the second)."""
    interval: Interval
    """Bootstrap 95 % interval of `ratio` over rounds."""
    rounds_agree: bool
    """Whether every round names the same side."""
    verdict: Verdict
    ratios: tuple[float, ...] = field(repr=False)
    spans: Mapping[str, Span] = field(repr=False)


def compare_interleaved(
    runs: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    *,
    turns: int = 5,
    warmup_ms: float = 200.0,
    clock: Clock = time.perf_counter_ns,
    rng: np.random.Generator | None = None,
) -> Comparison:
    """Time two callables in the order ABBA BAAB, so that drift of clocks and caches falls on both.

    A round has `turns` of ABBA (or of BAAB). Errors: UsageError unless there are two runs and ten rounds.
    """
    if len(runs) != 2 or rounds < 10 or turns < 1:
        raise UsageError(
            f"{len(runs)} runs, {rounds} rounds and {turns} turns", "A comparison takes 2 runs and at least 10 rounds"
        )
    for call in runs.values():
        warm_up(call, warmup_ms, clock)
    times = [_round(list(runs.values()), turns, number % 2 == 1, clock) for number in range(rounds)]
    ratios = [float(np.median(first) / np.median(second)) for first, second in times]
    interval = bootstrap(ratios, np.median, rng=rng or np.random.default_rng(0))
    first, second = runs
    return Comparison(
        first=first,
        second=second,
        ratio=float(np.median(ratios)),
        interval=interval,
        rounds_agree=_agree(ratios),
        verdict=verdict(ratios, interval),
        ratios=tuple(ratios),
        spans={name: Span.of(np.concatenate([pair[i] for pair in times])) for i, name in enumerate(runs)},
    )


def _round(calls: Sequence[Callable[[], object]], turns: int, reverse: bool, clock: Clock) -> list[list[float]]:
    times: list[list[float]] = [[], []]
    for side in ([1, 0, 0, 1] if reverse else [0, 1, 1, 0]) * turns:
        times[side].append(_timed_ms(calls[side], clock))
    return times


def verdict(ratios: Sequence[float], interval: Interval) -> Verdict:
    """Never forced: rounds that scatter are inconclusive; a difference that some rounds contradict is ambiguous."""
    if not is_steady(ratios):
        return "inconclusive"
    if interval.low >= 1 - SAME_TOLERANCE and interval.high <= 1 + SAME_TOLERANCE:
        return "same"
    if not _agree(ratios):
        return "ambiguous"
    return "faster" if interval.high < 1 else "slower"


def _agree(ratios: Sequence[float]) -> bool:
    return all(ratio < 1 for ratio in ratios) or all(ratio > 1 for ratio in ratios)
