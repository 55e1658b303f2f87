"""Several processes of one training: what the first decides holds for all, and where one fails all end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from runtime.errors import EdgestillError, one_line

T = TypeVar("T")


def decided_by_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """On every process the result of `decide`, which the first one alone calls.

    Where it fails there, no process goes on, since the others would wait for its result for ever. Raises on the first
    process what `decide` raises, EdgestillError with the same text on the others.
    """
    if accelerator.num_processes == 1:
        return decide()
    outcome: list[Any] = [None, ""]
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            outcome = [decide(), ""]
        except Exception as error:
            failure, outcome = error, [None, one_line(error)]
    result, reason = broadcast_object_list(outcome)
    if failure:
        raise failure
    if reason:
        raise EdgestillError(f"the first process failed: {reason}")
    return result  # type: ignore[no-any-return]


@contextmanager
def lost_processes_named() -> Iterator[None]:
    """Say in one line that another process has ended, where torch raises an error about its connection.

    Raises EdgestillError in its place.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        raise EdgestillError(
            "another process of this training has ended, so this one ends too", "Its own message says why"
        ) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "/gloo/" in str(error)
