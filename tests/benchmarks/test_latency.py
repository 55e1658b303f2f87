from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.latency import MAX_WARMUP_MS, Span, compare_interleaved, measure, verdict, warm_up
from benchmarks.statistics import Interval
from runtime.errors import UsageError

FRAMES = [np.zeros((4, 4, 3), np.uint8), np.ones((4, 4, 3), np.uint8)]


class FakeTime:
    """A clock that only moves when something is done."""

    def __init__(self) -> None:
        self.now_ns = 0

    def clock(self) -> int:
        return self.now_ns

    def spend(self, ms: float) -> None:
        self.now_ns += round(ms * 1e6)

    def sleep(self, seconds: float) -> None:
        self.spend(seconds * 1e3)


class FakeDetector:
    """1 ms before, 5 ms in and 2 ms after the network; call `slow` takes ten times as long inside."""

    def __init__(self, time: FakeTime, slow: int = -1, nms_ms: float = 2.0) -> None:
        self.time, self.slow, self.nms_ms = time, slow, nms_ms
        self.seen: list[int] = []

    def preprocess(self, frame: np.ndarray) -> int:
        self.time.spend(1)
        self.seen.append(int(frame[0, 0, 0]))
        return len(self.seen)

    def infer(self, prepared: int) -> str:
        self.time.spend(50 if prepared == self.slow else 5)
        return "raw"

    def postprocess(self, raw: str, prepared: int) -> None:
        assert raw == "raw"
        self.time.spend(self.nms_ms)


def measured(detector: FakeDetector, time: FakeTime, **options: Any) -> Any:
    return measure(detector, FRAMES, clock=time.clock, sleep=time.sleep, **options)


def test_end_to_end_contains_the_three_spans() -> None:
    time = FakeTime()
    found = measured(FakeDetector(time), time, samples=20)
    assert (found.preprocess.p50, found.inference.p50, found.postprocess.p50) == (1, 5, 2)
    assert found.end_to_end.p50 == 8
    assert found.end_to_end.n == 20
    assert found.steady


def test_more_work_in_suppression_raises_the_latency() -> None:
    time = FakeTime()
    assert measured(FakeDetector(time, nms_ms=30.0), time, samples=20).end_to_end.p50 == 36


def test_a_slow_call_stays_in_the_maximum_and_in_p99() -> None:
    time = FakeTime()
    found = measured(FakeDetector(time, slow=200), time, samples=662, warmup_ms=200)
    assert found.end_to_end.max == found.end_to_end.p99 == 53
    assert found.end_to_end.p50 == 8


def test_warm_up_is_not_in_the_result() -> None:
    time = FakeTime()
    found = measured(FakeDetector(time, slow=1), time, samples=30)
    assert found.end_to_end.max == 8
    assert found.warmup.ms >= 200
    assert found.warmup.settled


def test_frames_are_used_in_turn() -> None:
    time = FakeTime()
    detector = FakeDetector(time)
    measured(detector, time, samples=11)
    assert set(zip(detector.seen, detector.seen[1:], strict=False)) == {(0, 1), (1, 0)}


def test_a_frame_that_waits_behind_a_slow_one_is_late_too() -> None:
    time = FakeTime()
    detector = FakeDetector(time)
    warm = FakeTime()
    calls = measured(FakeDetector(warm), warm, samples=11).warmup.calls
    detector.slow = calls + 1
    found = measured(detector, time, samples=11, interval_ms=10)
    assert found.end_to_end.samples[:4] == (53, 51, 49, 47)
    assert found.inference.samples[:2] == (50, 5)


def test_frames_that_come_slowly_are_waited_for() -> None:
    time = FakeTime()
    found = measured(FakeDetector(time), time, samples=20, interval_ms=100)
    assert found.end_to_end.max == 8
    assert time.now_ns >= 19 * 100e6


@pytest.mark.parametrize(("n", "given"), [(10, []), (11, ["p50"]), (64, ["p50", "p90"]), (130, ["p50", "p90", "p95"])])
def test_percentiles_need_enough_samples(n: int, given: list[str]) -> None:
    span = Span.of(np.ones(n))
    assert [p for p in ("p50", "p90", "p95", "p99") if getattr(span, p) is not None] == given


def test_no_frame_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no frame"):
        measure(FakeDetector(FakeTime()), [])


def test_warm_up_gives_up_on_a_machine_that_never_settles() -> None:
    time = FakeTime()
    delay = iter(range(1, 10**6))
    warm = warm_up(lambda: time.spend(2.0 ** (next(delay) // 5 % 2)), 200, time.clock)
    assert not warm.settled
    assert warm.ms >= MAX_WARMUP_MS


def test_turns_are_taken_in_the_order_abba_baab() -> None:
    time, order = FakeTime(), []

    def run(name: str) -> Any:
        return lambda: (order.append(name), time.spend(1))

    compare_interleaved({"a": run("a"), "b": run("b")}, 10, turns=1, warmup_ms=0, clock=time.clock)
    assert "".join(order[-8:]) == "abbabaab"


@pytest.mark.parametrize(("ms", "verdict"), [(5.0, "faster"), (10.0, "same"), (10.2, "same"), (15.0, "slower")])
def test_the_verdict_follows_the_ratio(ms: float, verdict: str) -> None:
    time = FakeTime()
    runs = {"a": lambda: time.spend(ms), "b": lambda: time.spend(10)}
    found = compare_interleaved(runs, 12, clock=time.clock)
    assert found.verdict == verdict
    assert found.ratio == pytest.approx(ms / 10)
    assert found.spans["a"].n == 12 * 10


def test_drift_falls_on_both_sides() -> None:
    time = FakeTime()

    def drifting() -> None:
        time.spend(10 * (1 + time.now_ns / 5e10))

    found = compare_interleaved({"a": drifting, "b": drifting}, 20, clock=time.clock)
    assert found.verdict == "same"
    assert found.ratio == pytest.approx(1, abs=1e-3)


def test_the_same_noisy_work_is_the_same_in_nearly_every_comparison() -> None:
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(60):
        time = FakeTime()
        runs = {name: lambda time=time: time.spend(10 + rng.exponential(0.3)) for name in "ab"}
        verdicts.append(compare_interleaved(runs, 20, clock=time.clock).verdict)
    assert verdicts.count("same") >= 0.95 * len(verdicts)


def test_rounds_that_scatter_are_inconclusive() -> None:
    rng, time = np.random.default_rng(0), FakeTime()
    runs = {name: lambda: time.spend(rng.uniform(1, 100)) for name in "ab"}
    assert compare_interleaved(runs, 20, turns=1, clock=time.clock).verdict == "inconclusive"


def test_a_difference_that_some_rounds_contradict_is_ambiguous() -> None:
    assert verdict([*[0.93, 0.94] * 9, 1.01, 1.02], Interval(0.92, 0.94)) == "ambiguous"


def test_a_comparison_takes_two_runs() -> None:
    with pytest.raises(UsageError, match="1 runs"):
        compare_interleaved({"a": lambda: None}, 10)
