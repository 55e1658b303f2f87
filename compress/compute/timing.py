"""Named phases of a computation and the seconds that each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any, Protocol, TypeVar

import torch

from compress.compute.device import synchronize

Item = TypeVar("Item")


class Phases(Protocol):
    """Something that tells phases apart, as a stopwatch does."""

    def phase(self, name: str) -> AbstractContextManager[None]: ...


def attach(phases: Phases, name: str, owner: Any, method: str) -> None:
    """Let every call of the owner's method be a phase of this name from now on."""
    function: Callable[..., Any] = getattr(owner, method)

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with phases.phase(name):
            return function(*arguments, **options)

    setattr(owner, method, call)


class Stopwatch:
    """Adds up seconds by name. A phase ends when `device` has done the work that the phase queued.

    `clock` returns seconds.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._clock = device, clock

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds of a `with` block under `name`."""
        start = self._clock()
        yield
        synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start

    def waits(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """The same items; the time that each takes to arrive is counted under `name`."""
        iterator = iter(items)
        while True:
            with self.phase(name):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item
