"""Turns of the ways to train, without a network."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import step


class Steps:
    """Counts the steps of each way."""

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()

    def block(self, name: str, count: int) -> None:
        self.taken[name] += count


@pytest.mark.parametrize(("until", "each"), [(math.inf, 20), (0.0, step.BLOCK)])
def test_each_way_takes_all_steps_or_as_many_as_there_is_time_for(until: float, each: int) -> None:
    steps = Steps()
    step.take_turns(steps, 20, until)
    assert steps.taken == dict.fromkeys(step.WAYS, each)
