from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import pytest

from benchmarks import latency
from benchmarks.latency import (
    LONGEST_PAUSE_MS,
    MAX_WARMUP_MS,
    PAUSE_MS,
    Durations,
    LatencyRatio,
    Subject,
    measure,
    until_idle,
    warm_up,
)
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

    def preprocess(self, frames: Sequence[np.ndarray]) -> int:
        self.time.spend(1)
        self.seen += [int(frame[0, 0, 0]) for frame in frames]
        return len(self.seen)

    def infer(self, prepared: int) -> str:
        self.time.spend(50 if prepared == self.slow else 5)
        return "raw"

    def postprocess(self, raw: str, prepared: int) -> None:
        assert raw == "raw"
        self.time.spend(self.nms_ms)


def measured(detector: FakeDetector, time: FakeTime, batch: int = 1, **options: Any) -> Any:
    (found,) = measured_in_turns([detector], time, batch, **options)
    return found


def measured_in_turns(detectors: Sequence[FakeDetector], time: FakeTime, batch: int = 1, **options: Any) -> Any:
    subjects = [Subject(detector, FRAMES, batch) for detector in detectors]
    return measure(subjects, **{"pause": nothing, "clock": time.clock, "sleep": time.sleep, **options})


def nothing() -> None: ...


def test_a_call_takes_a_batch_of_frames_in_turn() -> None:
    time = FakeTime()
    detector = FakeDetector(time)
    found = measured(detector, time, samples=20, batch=3)
    assert detector.seen[:9] == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert len(detector.seen) == 3 * (20 + found.warmup.calls)
    assert found.end_to_end.p50 == 8, "one call, however many frames"


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
    assert detector.seen[-11:] == [0, 1] * 5 + [0]


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


def test_an_interval_is_refused_where_a_call_takes_several_frames() -> None:
    with pytest.raises(UsageError, match="10 ms, and 4 frames a call"):
        measured(FakeDetector(FakeTime()), FakeTime(), batch=4, interval_ms=10)


@pytest.mark.parametrize(("n", "given"), [(10, []), (11, ["p50"]), (64, ["p50", "p90"]), (130, ["p50", "p90", "p95"])])
def test_percentiles_need_enough_samples(n: int, given: list[str]) -> None:
    found = Durations.of(np.ones(n))
    assert [p for p in ("p50", "p90", "p95", "p99") if getattr(found, p) is not None] == given


def test_no_frame_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no frame"):
        measure([Subject(FakeDetector(FakeTime()), [])])


def test_warm_up_gives_up_on_a_machine_that_never_settles() -> None:
    time = FakeTime()
    delay = iter(range(1, 10**6))
    warm = warm_up(lambda: time.spend(2.0 ** (next(delay) // 5 % 2)), 200, time.clock)
    assert not warm.settled
    assert warm.ms >= MAX_WARMUP_MS


def test_detectors_take_turns_on_the_same_frames() -> None:
    class Crowded(FakeDetector):
        """Frame 1 holds more objects than frame 0."""

        def infer(self, prepared: int) -> str:
            self.time.spend(5 + 20 * self.seen[-1])
            return "raw"

    time = FakeTime()
    found = measured_in_turns([Crowded(time), Crowded(time, nms_ms=3.0)], time, samples=20, settle_ms=30)
    assert [one.end_to_end.samples for one in found] == [(8, 28) * 10, (9, 29) * 10]
    assert [one.rounds for one in found] == [one.end_to_end.samples for one in found]


def test_a_machine_that_slows_down_while_files_are_timed_does_not_change_their_order() -> None:
    """One after the other, the file that needs 5 % less would look 40 % slower."""
    time = FakeTime()

    class Slowing(FakeDetector):
        def infer(self, prepared: int) -> str:
            self.time.spend(self.nms_ms * (1.0 if self.time.now_ns < 4e9 else 1.5))
            return "raw"

    better, worse = Slowing(time, nms_ms=9.5), Slowing(time, nms_ms=10.0)
    found = measured_in_turns([worse, better], time, samples=200)
    assert time.now_ns > 8e9
    assert not any(one.steady for one in found)
    ratio = LatencyRatio.of(*(one.rounds for one in found))
    assert ratio.verdict() == "faster"
    assert ratio.ratio == pytest.approx((1 + 2 * 9.5) / (1 + 2 * 10), rel=0.01)
    assert found[1].end_to_end.p50 < found[0].end_to_end.p50
    assert [len(one.rounds) for one in found] == [latency.ROUNDS] * 2


def test_samples_that_do_not_divide_are_spread_over_the_rounds() -> None:
    time = FakeTime()
    for samples, rounds in ((47, latency.ROUNDS), (13, 13)):
        found = measured_in_turns([FakeDetector(time), FakeDetector(time)], time, samples=samples)
        assert [(one.end_to_end.n, len(one.rounds)) for one in found] == [(samples, rounds)] * 2
    assert measured(FakeDetector(time), time, samples=47).rounds == ()


def test_a_detector_that_falls_behind_its_camera_stays_behind_it_beside_others_too() -> None:
    time = FakeTime()
    late, quick = FakeDetector(time, nms_ms=14.0), FakeDetector(time)
    found = measured_in_turns([late, quick], time, samples=40, interval_ms=15)
    assert [one.end_to_end.max for one in found] == [20 + 39 * 5, 8]
    assert not found[0].steady
    assert [one.rounds for one in found] == [(), ()]


def test_every_turn_begins_in_the_same_way() -> None:
    """A clock that rises for 200 ms after a pause: where only some turns had one, equal detectors would differ."""
    time = FakeTime()
    rested = [0.0]

    class Ramp(FakeDetector):
        def infer(self, prepared: int) -> str:
            self.time.spend(5 if self.time.now_ns - rested[0] > 2e8 else 10)
            return "raw"

    def pause() -> None:
        time.spend(20)
        rested[0] = time.now_ns

    found = measured_in_turns([Ramp(time) for _ in range(5)], time, samples=200, pause=pause)
    assert len({one.rounds for one in found}) == 1


def ratio_of(*ratios: float) -> LatencyRatio:
    """The result of a comparison whose rounds had these ratios."""
    return LatencyRatio.of(np.ones(len(ratios)), ratios)


def compare_in_turns(*given: Any, **options: Any) -> latency.TimedPair:
    """A comparison of sides that have no threads of their own."""
    return latency.compare_in_turns(*given, **{"pause": nothing, **options})


def test_turns_are_taken_in_the_order_abba() -> None:
    time, order = FakeTime(), []

    def run(name: str) -> Any:
        return lambda: (order.append(name), time.spend(1))

    compare_in_turns(run("a"), run("b"), 10, calls=1, warmup_ms=0, settle_ms=0, clock=time.clock)
    assert "".join(order[-8:]) == "abbaabba"
    compare_in_turns(run("a"), run("b"), 10, calls=2, warmup_ms=0, settle_ms=3, clock=time.clock)
    turn_of_a, turn_of_b = "aaa" + "aa", "bbb" + "bb"
    assert "".join(order[-20:]) == turn_of_a + turn_of_b + turn_of_b + turn_of_a


class SpinningPools:
    """A library whose idle threads spin for `spin_ms` behind a call, and one whose call they slow down by a third."""

    def __init__(self, spin_ms: float) -> None:
        self.time, self.spin_ms, self.until_ns, self.cpu_ns = FakeTime(), spin_ms, 0, 0

    def spinning(self) -> None:
        self.spend(3)
        self.until_ns = self.time.now_ns + round(self.spin_ms * 1e6)

    def sleeping(self) -> None:
        self.spend(4 if self.time.now_ns < self.until_ns else 3)

    def spend(self, ms: float) -> None:
        self.cpu_ns += round(ms * 1e6)
        self.time.spend(ms)

    def sleep(self, seconds: float) -> None:
        self.cpu_ns += max(0, min(round(seconds * 1e9), self.until_ns - self.time.now_ns))
        self.time.sleep(seconds)

    def pause(self) -> None:
        until_idle(self.time.clock, lambda: self.cpu_ns, self.sleep)


@pytest.mark.parametrize("spin_ms", [0, 50, 1400])
def test_threads_of_one_side_that_spin_do_not_slow_the_other(spin_ms: float) -> None:
    pools = SpinningPools(spin_ms)
    sides = pools.spinning, pools.sleeping
    assert compare_in_turns(*sides, clock=pools.time.clock, pause=pools.pause).ratio.ratio == 1
    beside_them = compare_in_turns(*sides, clock=pools.time.clock, settle_ms=0)
    assert (beside_them.ratio.ratio > 1.1) is (spin_ms > 0)


def test_a_pause_ends_where_threads_never_rest() -> None:
    pools = SpinningPools(10 * LONGEST_PAUSE_MS)
    pools.spinning()
    before = pools.time.now_ns
    pools.pause()
    assert LONGEST_PAUSE_MS <= (pools.time.now_ns - before) / 1e6 <= LONGEST_PAUSE_MS + PAUSE_MS


@pytest.mark.parametrize(
    ("ms", "verdict"), [(5.0, "faster"), (9.8, "faster"), (10.0, "inconclusive"), (10.2, "slower"), (15.0, "slower")]
)
def test_the_verdict_follows_the_ratio(ms: float, verdict: str) -> None:
    time = FakeTime()
    found, *sides = compare_in_turns(lambda: time.spend(10), lambda: time.spend(ms), 12, clock=time.clock)
    assert found.verdict() == verdict
    assert found.ratio == pytest.approx(ms / 10)
    assert found.low == found.high == found.ratio
    assert found.rounds == 12
    assert [(side.n, side.max) for side in sides] == [(120, 10), (120, ms)]


def test_the_verdict_is_about_the_limit_asked_for() -> None:
    found = ratio_of(*[1.04, 1.06] * 10)
    assert [found.verdict(limit) for limit in (1.0, 1.05, 1.1)] == ["slower", "inconclusive", "faster"]


def test_drift_falls_on_both_sides() -> None:
    time = FakeTime()

    def drifting() -> None:
        time.spend(10 * (1 + time.now_ns / 5e10))

    found = compare_in_turns(drifting, drifting, 20, clock=time.clock)
    assert found.ratio.ratio == pytest.approx(1, abs=1e-3)


def test_one_slow_call_of_a_round_does_not_change_the_ratio() -> None:
    time, calls = FakeTime(), count()
    found = compare_in_turns(
        lambda: time.spend(10), lambda: time.spend(90 if next(calls) % 5 == 0 else 10), 10, clock=time.clock
    )
    assert found.ratio.ratio == 1.0


def test_the_same_noisy_work_gives_no_verdict_in_nearly_every_comparison() -> None:
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(60):
        time = FakeTime()
        work = lambda time=time: time.spend(10 + rng.exponential(0.3))  # noqa: E731
        verdicts.append(compare_in_turns(work, work, 20, clock=time.clock).ratio.verdict())
    assert verdicts.count("inconclusive") >= 0.95 * len(verdicts)


def test_a_difference_is_found_in_noise_that_is_smaller() -> None:
    rng, verdicts = np.random.default_rng(0), []
    for _ in range(60):
        time = FakeTime()
        found = compare_in_turns(
            lambda time=time: time.spend(10 + rng.exponential(0.3)),
            lambda time=time: time.spend(9 + rng.exponential(0.3)),
            20,
            clock=time.clock,
        )
        verdicts.append(found.ratio.verdict())
    assert verdicts.count("faster") >= 0.95 * len(verdicts)


def test_rounds_that_scatter_are_inconclusive() -> None:
    rng, time = np.random.default_rng(0), FakeTime()
    work = lambda: time.spend(rng.uniform(1, 100))  # noqa: E731
    assert compare_in_turns(work, work, 20, calls=1, clock=time.clock).ratio.verdict() == "inconclusive"


def test_a_difference_that_a_quarter_of_the_rounds_contradict_is_inconclusive() -> None:
    assert ratio_of(*[0.93, 0.94, 0.93, 1.02] * 5).verdict() == "inconclusive"
    assert ratio_of(*[0.93, 0.94, 0.93, 0.99] * 5).verdict() == "faster"


def test_halves_that_contradict_each_other_are_inconclusive() -> None:
    assert ratio_of(*[0.9] * 8, *[0.99] * 8, *[1.01] * 4).verdict() == "faster"
    assert ratio_of(*[0.8] * 10, *[0.99] * 4, *[1.01] * 4, *[1.02] * 2).verdict() == "inconclusive"


@pytest.mark.parametrize(("rounds", "calls"), [(9, 5), (10, 0)])
def test_a_comparison_takes_ten_rounds(rounds: int, calls: int) -> None:
    with pytest.raises(UsageError, match=f"{rounds} rounds of {calls} calls"):
        compare_in_turns(nothing, nothing, rounds, calls=calls)
