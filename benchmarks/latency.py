"""How long detectors take from a decoded frame to final boxes, and which of two callables takes less time.

The timed span starts at a uint8 frame in host memory and ends with boxes in host memory: preprocessing, copies,
the network, suppression and postprocessing are inside; decoding the image is not. Whatever is to be compared takes
turns, as a machine that others use is faster in one minute than in the next. Clocks are arguments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count, cycle, islice
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.statistics import bootstrap, halves_agree, percentile_estimate
from runtime.errors import UsageError

Clock = Callable[[], int]
"""Nanoseconds that never go back."""
Frame = NDArray[np.uint8]
T = TypeVar("T")
WINDOW = 5
"""Calls of one warm-up window."""
WINDOW_TOLERANCE = 0.1
MAX_WARMUP_MS = 10_000.0
NS_PER_MS = 1e6


@dataclass(frozen=True)
class Durations:
    """Milliseconds of one span of the call, over all samples. A percentile is None if n is too small for it."""

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
    def of(cls, samples_ms: ArrayLike) -> Durations:
        """Raises ValueError when there is no sample."""
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
    """The calls before the first sample; `settled` is true if two successive windows agreed."""

    calls: int
    ms: float
    settled: bool


# -------------------------------------------------------------------------------------------------------------- turns

ROUNDS = 20
"""Rounds of a comparison, if there are as many samples."""
LEAST_ROUNDS = 10
"""Rounds that an interval needs."""
SETTLE_MS = 20.0
PAUSE_MS, LONGEST_PAUSE_MS = 20.0, 2000.0
IDLE_SHARE = 0.1
"""A process is idle if its threads together compute for less than this share of a pause."""


@dataclass(frozen=True)
class Side(Generic[T]):
    """One side of a comparison: `call` makes an untimed call, `timed(n)` gives the times of n calls in a row."""

    call: Callable[[], object]
    timed: Callable[[int], list[T]]


@dataclass
class Turns(Generic[T]):
    """A side's warm-up, and the times of its calls in each round."""

    warmup: Warmup
    rounds: list[list[T]] = field(default_factory=list)


def take_turns(
    sides: Sequence[Side[T]],
    counts: Sequence[int],
    *,
    warmup_ms: float,
    settle_ms: float = SETTLE_MS,
    pause: Callable[[], object],
    clock: Clock,
) -> list[Turns[T]]:
    """Time every side in every round, in the order ABC CBA ABC ..., so that drift of clocks and caches falls on all.

    `counts` has the calls of each round. They are in a row, timed as if the side ran alone: where there are several,
    `pause` waits before each turn until no thread computes, and the side is called untimed for `settle_ms`.
    """
    found: list[Turns[T]] = []
    for side in sides:
        pause()
        found.append(Turns(warm_up(side.call, warmup_ms, clock)))
    turns = list(zip(sides, found, strict=True))
    for calls in counts:
        for side, taken in turns:
            if len(turns) > 1:
                pause()
                _call_for(side.call, settle_ms, clock)
            taken.rounds.append(side.timed(calls))
        turns.reverse()
    return found


def _call_for(call: Callable[[], object], least_ms: float, clock: Clock) -> None:
    start = clock()
    while _since(start, clock) < least_ms:
        call()


def until_idle(
    clock: Clock = time.perf_counter_ns,
    cpu_clock: Clock = time.process_time_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Wait until no thread of this process computes, `LONGEST_PAUSE_MS` at most.

    Behind a call, ONNX Runtime's threads spin for the next one, 20 ms on one processor and 1.4 s on another, and keep
    their cores from another library's. `cpu_clock` is the time of all threads together.
    """
    start = clock()
    while _since(start, clock) < LONGEST_PAUSE_MS:
        at, computed = clock(), cpu_clock()
        sleep(PAUSE_MS / 1e3)
        if cpu_clock() - computed < IDLE_SHARE * (clock() - at):
            return


def warm_up(call: Callable[[], object], least_ms: float, clock: Clock = time.perf_counter_ns) -> Warmup:
    """Call for at least `least_ms`, then until the medians of two successive windows agree within 10 %.

    Stops at `MAX_WARMUP_MS`: a machine whose times stay unsteady is measured too, and the result says so.
    """
    start, calls, before, settled = clock(), 0, float("inf"), False
    while not settled or _since(start, clock) < least_ms:
        now = float(np.median([_timed_ms(call, clock) for _ in range(WINDOW)]))
        calls += WINDOW
        settled, before = abs(now - before) <= WINDOW_TOLERANCE * now, now
        if _since(start, clock) >= max(least_ms, MAX_WARMUP_MS):
            break
    return Warmup(calls, _since(start, clock), settled)


def _since(start_ns: int, clock: Clock) -> float:
    return (clock() - start_ns) / NS_PER_MS


def _timed_ms(call: Callable[[], object], clock: Clock) -> float:
    start = clock()
    call()
    return _since(start, clock)


# ----------------------------------------------------------------------------------------------------- frame to boxes

Stamps = tuple[int, int, int, int, int]
"""Nanoseconds at which the frames of a call were due, and at which they were started, prepared, inferred and done."""


class Timed(Protocol):
    """The three spans of a detector."""

    def preprocess(self, frames: Sequence[Frame]) -> Any: ...

    def infer(self, prepared: Any) -> Any: ...

    def postprocess(self, raw: Any, prepared: Any) -> Any: ...


@dataclass(frozen=True)
class Latency:
    """The spans of the same calls; `end_to_end` contains the other three and, with an interval, the wait in the queue.

    `steady` is true if the medians of the first and the second half of the samples agree within 5 %. `rounds` has the
    median milliseconds end to end of each round, if the detector took turns with others.
    """

    preprocess: Durations
    inference: Durations
    postprocess: Durations
    end_to_end: Durations
    warmup: Warmup
    steady: bool
    interval_ms: float | None = None
    rounds: tuple[float, ...] = ()


class Subject(NamedTuple):
    """A detector to time, on `batch` of its `frames` (uint8 (H, W, 3) BGR, used in turn) in each call."""

    detector: Timed
    frames: Sequence[Frame]
    batch: int = 1


def measure(
    subjects: Sequence[Subject],
    *,
    samples: int = 200,
    rounds: int = ROUNDS,
    warmup_ms: float = 200.0,
    interval_ms: float | None = None,
    settle_ms: float = SETTLE_MS,
    pause: Callable[[], object] = until_idle,
    clock: Clock = time.perf_counter_ns,
    sleep: Callable[[float], None] = time.sleep,
) -> list[Latency]:
    """Time `samples` calls of each detector after a warm-up; several take turns, in so many `rounds`: see `take_turns`.

    Without `interval_ms` a frame comes when the last one is done. With it, frames come at that interval as from a
    camera, and a latency counts from the moment its frame was due: a slow frame also delays those that wait behind it.
    A queue must not be forgotten between rounds, so each detector then has all its calls in one.
    Raises UsageError when an interval is given and a call takes several frames, of which each is due at another time.
    """
    batch = max((subject.batch for subject in subjects), default=1)
    if interval_ms is not None and batch > 1:
        raise UsageError(
            f"An interval of {interval_ms:g} ms, and {batch} frames a call", "An interval is for files of one image"
        )
    has_turns = len(subjects) > 1 and interval_ms is None
    counts = [part.size for part in np.array_split(np.arange(samples), min(rounds, samples) if has_turns else 1)]
    sides = [_side(subject, interval_ms, clock, sleep) for subject in subjects]
    turns = take_turns(sides, counts, warmup_ms=warmup_ms, settle_ms=settle_ms, pause=pause, clock=clock)
    return [_latency(taken.warmup, taken.rounds, interval_ms) for taken in turns]


def _side(subject: Subject, interval_ms: float | None, clock: Clock, sleep: Callable[[float], None]) -> Side[Stamps]:
    """Untimed and timed calls take their frames from queues of their own: all sides are timed on the same frames."""
    detector, frames, batch = subject
    untimed, queue = in_turn(frames, batch), in_turn(frames, batch)

    def timed(calls: int) -> list[Stamps]:
        due = _due_times(clock(), interval_ms, calls)
        return [_timestamps(detector, next(queue), clock, at, sleep) for at in due]

    return Side(lambda: _timestamps(detector, next(untimed), clock), timed)


def _latency(warm: Warmup, rounds: Sequence[Sequence[Stamps]], interval_ms: float | None) -> Latency:
    """From the timestamps of each round."""
    by_round = [np.array(stamps, np.int64) for stamps in rounds]
    whole = np.concatenate(by_round)
    preprocess_ms, inference_ms, postprocess_ms = np.diff(whole[:, 1:], axis=1).T / NS_PER_MS
    end_to_end_ms = _end_to_end_ms(whole)
    medians = tuple(float(np.median(_end_to_end_ms(stamps))) for stamps in by_round)
    return Latency(
        preprocess=Durations.of(preprocess_ms),
        inference=Durations.of(inference_ms),
        postprocess=Durations.of(postprocess_ms),
        end_to_end=Durations.of(end_to_end_ms),
        warmup=warm,
        steady=halves_agree(end_to_end_ms),
        interval_ms=interval_ms,
        rounds=medians if len(medians) > 1 else (),
    )


def _end_to_end_ms(stamps: NDArray[np.int64]) -> NDArray[np.float64]:
    return (stamps[:, -1] - stamps[:, 0]) / NS_PER_MS


def in_turn(frames: Sequence[Frame], batch: int) -> Iterator[list[Frame]]:
    """`batch` frames after `batch` frames, for ever. Raises UsageError when there is none."""
    if not frames:
        raise UsageError("There is no frame to measure on", "Give a folder with images")
    queue = cycle(frames)
    return (list(islice(queue, batch)) for _ in count())


def _due_times(start_ns: int, interval_ms: float | None, samples: int) -> list[int | None]:
    if interval_ms is None:
        return [None] * samples
    return [start_ns + round(number * interval_ms * NS_PER_MS) for number in range(samples)]


def _timestamps(
    detector: Timed,
    frames: Sequence[Frame],
    clock: Clock,
    due: int | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Stamps:
    """Nanoseconds at which the frames were due, and at which they were started, prepared, inferred and done."""
    if due is not None and clock() < due:
        sleep((due - clock()) / 1e9)
    begun = clock()
    prepared = detector.preprocess(frames)
    ready = clock()
    raw = detector.infer(prepared)
    inferred = clock()
    detector.postprocess(raw, prepared)
    return (begun if due is None else due), begun, ready, inferred, clock()


# -------------------------------------------------------------------------------------------------------- A against B

Verdict = Literal["faster", "slower", "inconclusive"]
ROUNDS_AGREE = 0.8
"""Share of the rounds that must be on the verdict's side. Of 20 rounds without a difference, 16 or more are on one
side in 1.2 % of all comparisons."""


@dataclass(frozen=True)
class LatencyRatio:
    """Time of the other file over time of the reference, measured in turns; below 1 the other is faster."""

    ratio: float
    """Median of `ratios`."""
    low: float
    """`low` to `high` is the bootstrap 95 % interval of `ratio` over rounds."""
    high: float
    ratios: tuple[float, ...] = field(repr=False)
    """One value per round: median of the other's calls / median of the reference's calls."""

    @classmethod
    def of(cls, reference: ArrayLike, other: ArrayLike) -> LatencyRatio:
        """From the medians of the rounds of both."""
        ratios = np.asarray(other, np.float64) / np.asarray(reference, np.float64)
        interval = bootstrap(ratios, np.median, rng=np.random.default_rng(0))
        return cls(float(np.median(ratios)), *interval, tuple(ratios.tolist()))

    @property
    def rounds(self) -> int:
        return len(self.ratios)

    def verdict(self, limit: float = 1.0) -> Verdict:
        """Whether the other takes less or more than `limit` times the reference's time.

        "inconclusive" if the interval holds `limit`, if one round in five contradicts it, or if the first
        half of the rounds says one thing and the second half another.
        """
        halves = [float(np.median(half)) for half in np.array_split(self.ratios, 2)]
        if max(self.high, *halves) < limit and np.mean([r < limit for r in self.ratios]) >= ROUNDS_AGREE:
            return "faster"
        if min(self.low, *halves) > limit and np.mean([r > limit for r in self.ratios]) >= ROUNDS_AGREE:
            return "slower"
        return "inconclusive"

    def __str__(self) -> str:
        return f"{self.ratio:.3f} (95 % interval {self.low:.3f} to {self.high:.3f}, n = {self.rounds} rounds)"


class TimedPair(NamedTuple):
    """Two callables in turns: the ratio of their times, and the times of all calls of each."""

    ratio: LatencyRatio
    reference: Durations
    other: Durations


def require_rounds(rounds: int, calls: int) -> None:
    """Raises UsageError where a comparison of so many calls in each round has no interval."""
    if rounds < LEAST_ROUNDS or calls < 1:
        raise UsageError(f"{rounds} rounds of {calls} calls", f"A comparison takes {LEAST_ROUNDS} rounds or more")


def compare_in_turns(
    reference: Callable[[], object],
    other: Callable[[], object],
    rounds: int = ROUNDS,
    *,
    calls: int = 10,
    warmup_ms: float = 200.0,
    settle_ms: float = SETTLE_MS,
    pause: Callable[[], object] = until_idle,
    clock: Clock = time.perf_counter_ns,
) -> TimedPair:
    """Time two callables, `calls` of each in a round; see `take_turns`. Raises UsageError below ten rounds."""
    require_rounds(rounds, calls)

    def side(call: Callable[[], object]) -> Side[float]:
        return Side(call, lambda calls: [_timed_ms(call, clock) for _ in range(calls)])

    turns = take_turns(
        [side(reference), side(other)], [calls] * rounds,
        warmup_ms=warmup_ms, settle_ms=settle_ms, pause=pause, clock=clock,
    )  # fmt: skip
    ratio = LatencyRatio.of(*(np.median(taken.rounds, axis=1) for taken in turns))
    return TimedPair(ratio, *(Durations.of(np.concatenate(taken.rounds)) for taken in turns))
