"""Several processes of one training: the first decides for all, and if one fails all of them end."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from runtime.errors import EdgestillError, one_line

T = TypeVar("T")


def close_group_at_exit() -> None:
    """Close the connections of the processes before the interpreter ends; a further call changes nothing.

    Gloo's threads may still hold tensors, and a thread that frees one in an interpreter that is ending aborts the
    process. NCCL's threads hold none, and closing its group would wait for processes that are in a collective call.
    """
    atexit.unregister(_close_group)
    atexit.register(_close_group)


def _close_group() -> None:
    """Close gloo's group and end its threads, which live as long as anything refers to the group."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        group = torch.distributed.group.WORLD
        torch.distributed.destroy_process_group()
        for name in ("last_exc", "last_value", "last_traceback"):
            vars(sys).pop(name, None)  # an error that ended the process: its frames hold the training
        gc.collect()
        del group  # the last reference: torch waits for the threads without the interpreter's lock only here


def decided_by_first(accelerator: Accelerator, decide: Callable[[], T]) -> T:
    """The result of `decide`, on every process; only the first process calls it.

    If it fails, no process continues, because the others would wait for its result for ever. Raises on the first
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
    """Report in one line that another process has ended, when torch raises an error about its connection.

    Raises EdgestillError instead of that error.
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
