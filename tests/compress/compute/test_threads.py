from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from compress.compute import threads
from compress.compute.threads import (
    ENOUGH_S,
    FIRST_S,
    ROUNDS,
    SHARE,
    Taken,
    ThreadChoice,
    candidates,
    choose,
    fixed_threads,
    limit_threads,
    threads_restored,
)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine of four cores whose user has said nothing."""
    monkeypatch.delenv(threads.USERS_LIMIT)
    monkeypatch.setattr(threads, "compute_threads", lambda: 4)
    with threads_restored():
        yield


class Machine:
    """Clocks that only `work` moves, by the seconds of torch's present number of threads, each of which has a core."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds, self.now, self.cpu, self.works = dict(seconds), 100.0, 0.0, 0

    def clock(self) -> float:
        return self.now

    def work(self) -> None:
        self.works += 1
        number = torch.get_num_threads()
        self.now += self.seconds[number]
        self.cpu += number * self.seconds[number]

    def cpu_clock(self) -> float:
        return self.cpu

    def prepare(self) -> Callable[[], None]:
        torch.set_num_threads(1)
        return self.work


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, {1}), (2, {1, 2}), (6, {1, 2, 4, 6}), (8, {1, 2, 4, 8}), (12, {1, 2, 4, 8, 12})]
)
def test_doubles_up_to_the_cores_are_tried(cores: int, expected: set[int]) -> None:
    assert candidates(cores) == expected


@pytest.mark.parametrize(
    ("rounds", "current", "expected"),
    [
        ([{1: 1.0, 2: 0.95}], 1, 1),  # the second thread gains nothing
        ([{1: 1.0, 2: 0.6}], 1, 2),
        ([{1: 1.0, 8: 0.30, 16: 0.29}], 1, 8),
        ([{1: 1.0, 2: 0.95}], 2, 2),  # a change gains too little
        ([{1: 0.9, 2: 1.0}], 2, 2),
        ([{1: 0.5, 2: 1.0}], 2, 1),
        ([{1: 1.0, 2: 0.6}, {1: 1.0, 2: 0.6}, {1: 0.8, 2: 0.9}], 1, 1),  # not in every round
    ],
)
def test_another_number_is_taken_where_it_is_clearly_faster_in_every_round(
    rounds: list[dict[int, float]], current: int, expected: int
) -> None:
    taken = [{number: Taken(wall, number * wall) for number, wall in one.items()} for one in rounds]
    assert choose(taken, current) == expected


def test_more_threads_are_not_taken_where_they_only_take_the_time_of_others() -> None:
    busy = [{1: Taken(0.6, 0.12), 2: Taken(0.4, 0.28)}] * ROUNDS
    assert choose(busy, 1) == 1
    larger = [{1: Taken(0.6, 0.12), 2: Taken(0.4, 0.16)}] * ROUNDS
    assert choose(larger, 1) == 2
    competed = [{1: Taken(0.6, 0.5), 2: Taken(0.9, 0.7)}] * ROUNDS  # quiet, 2 would be faster
    assert choose(competed, 2) == 1


def test_the_number_is_measured_on_the_work_itself() -> None:
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.2})
    assert ThreadChoice(machine.clock, machine.cpu_clock).best(machine.prepare) == 2
    assert machine.works == 1 + 3 * ROUNDS


def test_measurements_take_a_hundredth_of_the_time_and_follow_the_load() -> None:
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.05})
    choice, started = ThreadChoice(machine.clock, machine.cpu_clock), machine.now
    assert choice.best(machine.prepare) == 4
    taken, works = machine.now - started, machine.works
    machine.seconds[4] = 1.0  # other work has come
    machine.now += 0.99 * taken / SHARE
    assert choice.best(machine.prepare, 4) == 4
    assert machine.works == works
    machine.now += 0.02 * taken / SHARE
    assert choice.best(machine.prepare, 4) == 2


def test_a_number_that_is_there_already_is_kept_at_first_even_one_beyond_the_cores() -> None:
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.05, 8: 0.2})
    choice = ThreadChoice(machine.clock, machine.cpu_clock)
    assert choice.best(machine.prepare, 8) == 8
    assert machine.works == 0
    machine.now += FIRST_S
    assert choice.best(machine.prepare, 8) == 4


def test_long_steps_are_measured_once_each() -> None:
    machine = Machine({1: ENOUGH_S, 2: 3.0, 4: 1.5})
    assert ThreadChoice(machine.clock, machine.cpu_clock).best(machine.prepare) == 4
    assert machine.works == 1 + 3


def test_the_user_decides_before_any_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    assert fixed_threads(0) == 0
    assert fixed_threads(3) == 3
    monkeypatch.setenv(threads.USERS_LIMIT, "2")
    assert fixed_threads(0) == 2
    assert fixed_threads(3) == 3


def test_torch_uses_no_more_threads_than_cores_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(6)
    limit_threads()
    assert torch.get_num_threads() == 4
    torch.set_num_threads(2)
    limit_threads()
    assert torch.get_num_threads() == 2
    monkeypatch.setenv(threads.USERS_LIMIT, "6")
    torch.set_num_threads(6)
    limit_threads()
    assert torch.get_num_threads() == 6
