"""Several processes of one training: the first decides for all, and if one fails all of them end."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list
from torch import nn

from compress.compute.precision import pick_precision
from compress.config import PrecisionName, TrainConfig
from compress.models import YOLOv5
from runtime.errors import EdgestillError, UsageError, one_line

T = TypeVar("T")
MIXED = {torch.float32: "no", torch.float16: "fp16", torch.bfloat16: "bf16"}
"""Type of the networks' arithmetic -> accelerate's word for it."""


def new_accelerator(device: torch.device, precision: PrecisionName) -> Accelerator:
    """The accelerator of one training. Raises UnavailableError when the device does not compute in the precision."""
    mixed = MIXED[pick_precision(precision, device)]
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current GPU
    # a second training in this process may differ in device or arithmetic, which accelerate's shared state forbids
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    close_group_at_exit()
    return Accelerator(cpu=device.type == "cpu", mixed_precision=mixed)


def require_shares(network: YOLOv5, config: TrainConfig, images: int, processes: int) -> None:
    """Raises UsageError when a training's batches are too small for the processes that share them.

    Each needs an image of every batch. Where the network has BatchNorm, one image must not be a single cell at the
    coarsest level: a single value has no variance.
    """
    if config.batch < processes:
        raise UsageError(f"a batch of {config.batch} for {processes} processes", f"Set batch to {processes} or more")
    smallest, stride = images % config.batch or config.batch, max(network.strides)
    is_one_value = smallest < 2 * processes and config.imgsz <= stride
    if is_one_value and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise UsageError(
            f"a batch, or a process's share of it, is 1 image of one cell of {stride} pixels, too few for BatchNorm",
            f"Set imgsz to {2 * stride} or more",
        )


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
