"""Where the seconds go: spans with names, added up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeVar

Span = Callable[[str], AbstractContextManager[None]]
"""Opens a span: `with span("forward"): ...`."""
Item = TypeVar("Item")


def unwatched(_name: str) -> AbstractContextManager[None]:
    """The span of work that nobody times."""
    return nullcontext()


class Stopwatch:
    """Seconds by name. `clock` returns seconds; `settle` waits until queued device work is done (CUDA)."""

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, settle: Callable[[], None] | None = None
    ) -> None:
        self.seconds: dict[str, float] = {}
        self._clock, self._settle = clock, settle or (lambda: None)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = self._clock()
        yield
        self._settle()
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start


def timed_items(items: Iterable[Item], span: Span, name: str) -> Iterator[Item]:
    """The same items; the wait for each is counted under `name`."""
    iterator = iter(items)
    while True:
        with span(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
