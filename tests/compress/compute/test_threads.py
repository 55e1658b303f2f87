from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch

from compress.compute import threads
from compress.compute.threads import (
    ENOUGH_S,
    ROUNDS,
    SHARE,
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
    """A clock that only `work` moves, by the seconds of torch's present number of threads."""

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.seconds, self.now, self.works = dict(seconds), 100.0, 0

    def clock(self) -> float:
        return self.now

    def work(self) -> None:
        self.works += 1
        self.now += self.seconds[torch.get_num_threads()]

    def prepare(self) -> Callable[[], None]:
        torch.set_num_threads(1)
        return self.work


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (12, [1, 2, 4, 8, 12])]
)
def test_doubles_up_to_the_cores_are_tried(cores: int, expected: list[int]) -> None:
    assert candidates(cores) == expected


@pytest.mark.parametrize(
    ("seconds", "current", "expected"),
    [
        ({1: 1.0, 2: 0.95}, 0, 1),  # the second thread gains nothing
        ({1: 1.0, 2: 0.6}, 0, 2),
        ({1: 1.0, 8: 0.30, 16: 0.29}, 0, 8),
        ({1: 1.0, 2: 0.95}, 2, 2),  # a change gains too little
        ({1: 0.9, 2: 1.0}, 2, 2),
        ({1: 0.5, 2: 1.0}, 2, 1),
        ({1: 1.0, 2: 0.6}, 1, 2),
        ({1: 1.0, 2: 0.6}, 3, 2),  # a number from another machine
    ],
)
def test_the_fewest_threads_that_are_as_fast_are_chosen(seconds: dict[int, float], current: int, expected: int) -> None:
    assert choose(seconds, current) == expected


def test_the_number_is_measured_on_the_work_itself() -> None:
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.2})
    assert ThreadChoice(machine.clock).best(machine.prepare) == 2
    assert machine.works == 1 + 3 * ROUNDS


def test_measurements_take_a_hundredth_of_the_time_and_follow_the_load() -> None:
    machine = Machine({1: 0.1, 2: 0.06, 4: 0.05})
    choice = ThreadChoice(machine.clock)
    assert choice.best(machine.prepare) == 4
    taken, works = machine.now - 100, machine.works
    machine.seconds[4] = 1.0  # other work has come
    machine.now += 0.99 * taken / SHARE
    assert choice.best(machine.prepare, 4) == 4
    assert machine.works == works
    machine.now += 0.02 * taken / SHARE
    assert choice.best(machine.prepare, 4) == 2


def test_a_resumed_training_begins_with_its_number_where_the_machine_has_it() -> None:
    machine = Machine({1: 0.1, 2: 0.01, 4: 0.1})
    choice = ThreadChoice(machine.clock)
    assert choice.best(machine.prepare, 4) == 4
    assert machine.works == 0
    assert choice.best(machine.prepare, 4) == 2  # the next epoch's
    assert ThreadChoice(machine.clock).best(machine.prepare, 16) == 2


def test_long_steps_are_measured_once_each() -> None:
    machine = Machine({1: ENOUGH_S, 2: 2.0, 4: 1.0})
    assert ThreadChoice(machine.clock).best(machine.prepare) == 4
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
