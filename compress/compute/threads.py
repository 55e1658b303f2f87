"""How many of torch's compute threads serve a network on this machine at this time.

More are not always faster: a small network costs more to divide than to compute, and where other work takes a core, all
threads wait at the end of each operation for the one that lost it. The number also decides the last bits of every sum,
so a training takes it as part of its state: it changes between epochs only, and only where another is clearly faster.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from runtime.machine import compute_threads

USERS_LIMIT = "OMP_NUM_THREADS"
GAIN = 1.15
"""How much faster another number must be to be taken: below it the fewest threads are the least disturbed, and the
noise of a measurement changes nothing."""
ROUNDS, ENOUGH_S = 4, 3.0
"""Times that each number is measured; no further round begins after this many seconds."""
SHARE = 0.01
"""Part of a training's time that measurements may take."""


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
        self._clock = clock
        self._due: float | None = None

    def best(self, prepare: Callable[[], Callable[[], object]], current: int = 0) -> int:
        """`current`, unless a measurement is due and shows another number to be clearly faster; 0 is none yet.

        A training that is resumed begins with the number it had: where there is one, the first call measures nothing.
        `prepare` returns the work that is measured. A measurement leaves torch with any of the numbers that it tried.
        """
        started = self._clock()
        if self._due is None and current in candidates(compute_threads()):
            self._due = started
            return current
        if current and self._due is not None and started < self._due:
            return current
        chosen = choose(self._seconds(prepare()), current)
        ended = self._clock()
        self._due = ended + (ended - started) / SHARE
        return chosen

    def _seconds(self, work: Callable[[], object]) -> dict[int, float]:
        """The least seconds of the work for each number of threads; they take turns, so other work meets them alike."""
        seconds = dict.fromkeys(candidates(compute_threads()), float("inf"))
        work()  # allocates, and compiles the convolutions
        started = self._clock()
        for _ in range(ROUNDS):
            for number, least in seconds.items():
                torch.set_num_threads(number)
                begun = self._clock()
                work()
                seconds[number] = min(least, self._clock() - begun)
            if self._clock() - started > ENOUGH_S:
                break
        return seconds


def candidates(cores: int) -> list[int]:
    """1 and its doubles up to the number of cores, and that number itself."""
    return sorted({cores, *(1 << power for power in range(cores.bit_length()))})


def choose(seconds: Mapping[int, float], current: int = 0) -> int:
    """The current number, or the fewest threads, that `GAIN` does not set apart from the fastest."""
    close = [number for number, taken in seconds.items() if taken <= GAIN * min(seconds.values())]
    return current if current in close else min(close)
