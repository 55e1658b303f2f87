from __future__ import annotations

import torch

from compress.compute.timing import Stopwatch

CPU = torch.device("cpu")


def test_phases_of_the_same_name_add_up() -> None:
    ticks = iter([0.0, 1.0, 5.0, 7.0])
    watch = Stopwatch(CPU, clock=lambda: next(ticks))
    for _ in range(2):
        with watch.phase("forward"):
            pass
    assert watch.seconds == {"forward": 3.0}


def test_waiting_for_items_is_timed_and_changes_none() -> None:
    ticks = iter(float(n) for n in range(100))
    watch = Stopwatch(CPU, clock=lambda: next(ticks))
    assert list(watch.waits("data", "abc")) == ["a", "b", "c"]
    assert watch.seconds["data"] == 4.0  # three items and the end
