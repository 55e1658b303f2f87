"""How many of torch's compute threads serve a network on this machine at this time.

More are not always faster: a small network costs more to divide than to compute, and where other work takes a core, all
threads wait at the end of each operation for the one that lost it. The number also decides the last bits of every sum,
so a training takes it as part of its state: it changes between epochs only, and only where another is clearly faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from runtime.machine import compute_threads

USERS_LIMIT = "OMP_NUM_THREADS"
GAIN = 1.15
"""How much faster another number must be in every round to be taken, so that noise changes nothing."""
ROUNDS, ENOUGH_S = 5, 3.0
"""Times that each number is measured; no further round begins after this many seconds."""
SHARE = 0.01
"""Part of a training's time that measurements may take."""
FIRST_S = 60.0
"""Seconds before a number that is there already, as in a resumed training, is measured against the others."""


def limit_threads() -> None:
    """Have torch use at most one thread a core, a container's CPU quota and the user's OMP_NUM_THREADS respected."""
    if USERS_LIMIT not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), compute_threads()))


@contextmanager
def threads_restored() -> Iterator[None]:
    """Give torch its number of threads back after a `with` block."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fixed_threads(wanted: int) -> int:
    """The number that the user named, by `wanted` or by OMP_NUM_THREADS; 0 leaves it to a measurement."""
    return wanted or (torch.get_num_threads() if USERS_LIMIT in os.environ else 0)


class ThreadChoice:
    """Measures now and then how many threads are the fastest. `clock` returns seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock, self._due = clock, clock() + FIRST_S

    def best(self, prepare: Callable[[], Callable[[], object]], current: int = 0) -> int:
        """`current`, unless a measurement is due and shows another number to be clearly faster; 0 is none yet.

        `prepare` returns the work that is measured. A measurement leaves torch with any of the numbers that it tried.
        """
        started = self._clock()
        if current and started < self._due:
            return current
        current = current or 1
        chosen = choose(self._rounds(prepare(), {*candidates(compute_threads()), current}), current)
        ended = self._clock()
        self._due = ended + (ended - started) / SHARE
        return chosen

    def _rounds(self, work: Callable[[], object], numbers: Iterable[int]) -> list[dict[int, float]]:
        """Rounds of seconds for each number of threads. The numbers take turns, so other work meets them alike."""
        work()  # allocates, and compiles the convolutions
        rounds: list[dict[int, float]] = []
        while not rounds or (len(rounds) < ROUNDS and sum(map(sum, map(dict.values, rounds))) < ENOUGH_S):
            rounds.append({number: self._seconds(work, number) for number in sorted(numbers)})
        return rounds

    def _seconds(self, work: Callable[[], object], number: int) -> float:
        torch.set_num_threads(number)
        started = self._clock()
        work()
        return self._clock() - started


def candidates(cores: int) -> set[int]:
    """1 and its doubles up to the number of cores, and that number itself."""
    return {cores, *(1 << power for power in range(cores.bit_length()))}


def choose(rounds: Sequence[Mapping[int, float]], current: int) -> int:
    """The current number of threads, unless others are `GAIN` times as fast in every round of `rounds` (seconds).

    Of these the fewest that are about as fast as the fastest.
    """
    total = {number: sum(one[number] for one in rounds) for number in rounds[0]}
    better = [number for number in total if all(GAIN * one[number] < one[current] for one in rounds)]
    return min((n for n in better if total[n] <= GAIN * min(total[m] for m in better)), default=current)
