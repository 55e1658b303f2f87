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
from typing import NamedTuple

import torch

from runtime.machine import compute_threads

USERS_LIMIT = "OMP_NUM_THREADS"
GAIN = 1.15
"""How much faster another number must be in every round to be taken, so that noise changes nothing."""
ROUNDS, ENOUGH_S = 5, 5.0
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


class Taken(NamedTuple):
    """Seconds that the work took once, and seconds of a core that it used."""

    wall: float
    cpu: float


class ThreadChoice:
    """Measures now and then how many threads are fastest. `clock` and `cpu_clock` (of the process) give seconds."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, cpu_clock: Callable[[], float] = time.process_time
    ) -> None:
        self._clock, self._cpu_clock, self._due = clock, cpu_clock, clock() + FIRST_S

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

    def _rounds(self, work: Callable[[], object], numbers: Iterable[int]) -> list[dict[int, Taken]]:
        """Rounds of what each number of threads takes. The numbers take turns, so other work meets them alike."""
        work()  # allocates, and compiles the convolutions
        rounds, started = [], self._clock()
        for _ in range(ROUNDS):
            rounds.append({number: self._taken(work, number) for number in sorted(numbers)})
            if self._clock() - started > ENOUGH_S:
                break
        return rounds

    def _taken(self, work: Callable[[], object], number: int) -> Taken:
        torch.set_num_threads(number)
        started, used = self._clock(), self._cpu_clock()
        work()
        return Taken(self._clock() - started, self._cpu_clock() - used)


def candidates(cores: int) -> set[int]:
    """1 and its doubles up to the number of cores, and that number itself."""
    return {cores, *(1 << power for power in range(cores.bit_length()))}


def choose(rounds: Sequence[Mapping[int, Taken]], current: int) -> int:
    """The current number of threads, unless others are `GAIN` times as fast in every round.

    More threads must also be able to be so much faster on a quiet machine, where each has a core: a busy one lets them
    take the time of others, whatever they waste of it. Of several it is the fewest that are about the fastest.
    """

    def better(number: int) -> bool:
        wins = all(GAIN * one[number].wall < one[current].wall for one in rounds)
        return wins and (number < current or GAIN * quiet(number) < quiet(current))

    def quiet(number: int) -> float:
        return sum(one[number].cpu for one in rounds) / number

    wall = {number: sum(one[number].wall for one in rounds) for number in rounds[0] if better(number)}
    return min((number for number in wall if wall[number] <= GAIN * min(wall.values())), default=current)
