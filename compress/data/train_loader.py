"""The batches of a training, epoch by epoch, made by threads or by processes.

Beside a training on a CPU it is threads: they take what cores are left, and need no memory of their own. A GPU takes
batches faster than threads make them, which wait for each other and for the thread that feeds it. There it is processes
(`compress.data.worker_pool`), and a batch travels to the GPU while it works on the one before. Neither the number nor
the kind of the workers ever changes a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple, Protocol

import torch

from compress.compute.upload import Upload, Uploader
from compress.data import shared_array
from compress.data.loader import Batch, as_tensor, epoch_tasks, train_batches
from compress.data.train_dataset import Task, TrainItems
from compress.data.worker_pool import WorkerPool
from compress.processes import sharing_count
from runtime.machine import usable_cores

MOST_PROCESSES = 16
"""Most processes where the user names no number: they make 2,500 images of 640 pixels a second."""
SLOTS = 3
"""Batches in shared memory: one that travels to the device, and two that are being made."""

Tasks = Callable[[int], list[Task]]
"""Epoch -> its batches."""


class TrainLoader(Protocol):
    """The batches of a training, epoch by epoch."""

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU or on the training's device."""
        ...

    def close(self) -> None:
        """End what makes batches."""
        ...


def worker_count(wanted: int | None, device: torch.device) -> int:
    """The number of workers: the one that is `wanted`; if None, one thread beside a CPU, else a process for each core.

    One core is left to the process that trains. Processes of torchrun, or jobs of a study, share the machine's cores.
    """
    if wanted is not None:
        return wanted
    cores = usable_cores() // sharing_count()
    return min(max(1, cores - 1), MOST_PROCESSES) if device.type == "cuda" else 1


def open_loader(
    dataset: TrainItems,
    *,
    batch: int,
    epochs: int,
    mosaic_epochs: int,
    workers: int,
    device: torch.device,
    rank: int = 0,
    world: int = 1,
) -> TrainLoader:
    """The batches of a training of `epochs` epochs, the first `mosaic_epochs` of them with mosaics.

    Process `rank` of `world` gets its part of each batch, as from `epoch_tasks`.
    """

    def tasks(epoch: int) -> list[Task]:
        return epoch_tasks(dataset, epoch, batch=batch, rank=rank, world=world, mosaic=epoch < mosaic_epochs)

    if device.type == "cuda" and workers and shared_array.AVAILABLE:
        return ProcessLoader(dataset, tasks, epochs, batch=math.ceil(batch / world), workers=workers, device=device)
    return ThreadLoader(dataset, tasks, workers)


class ThreadLoader:
    """`workers` threads make the batches; with 0 it is the thread that asks for them."""

    def __init__(self, dataset: TrainItems, tasks: Tasks, workers: int) -> None:
        self._dataset, self._tasks, self._workers = dataset, tasks, workers

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, on the CPU."""
        return train_batches(self._dataset, self._tasks(number), self._workers)

    def close(self) -> None:
        """Nothing is left to end: threads live as long as an epoch."""


class _Travelling(NamedTuple):
    task: Task
    upload: Upload

    def batch(self) -> Batch:
        images, targets = self.upload.copies()
        return Batch(images, targets, self.task.indices, self.task.labelled)


class ProcessLoader:
    """`workers` processes make the batches, of at most `batch` images, of epochs below `epochs`.

    While an epoch ends, and until the next begins, they make the first batches of that one.
    """

    def __init__(
        self, dataset: TrainItems, tasks: Tasks, epochs: int, *, batch: int, workers: int, device: torch.device
    ) -> None:
        self._tasks, self._epochs = tasks, epochs
        self._pool = WorkerPool(dataset, workers=workers, batch=batch, slots=SLOTS)
        self._uploader = Uploader(self._pool.images, device)
        self._coming: Iterator[Task] = iter(())
        self._upcoming: int | None = None
        self._free = deque(range(SLOTS))
        self._started: deque[tuple[int, Task]] = deque()
        self._leaving: tuple[int, Upload] | None = None
        self._ahead: _Travelling | None = None

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of an epoch, on the device. Raises EdgestillError when a process has ended."""
        if number != self._upcoming:
            self._begin(number)
        self._upcoming = None  # an epoch that is left before its end begins anew
        while self._ahead and self._ahead.task.epoch == number:
            here, self._ahead = self._ahead, self._send()
            yield here.batch()
        self._upcoming = number + 1

    def close(self) -> None:
        """End the processes."""
        self._pool.close()

    def _begin(self, number: int) -> None:
        """Forget what is under way, and start with the first batch of an epoch."""
        self._reclaim()
        for slot, _ in self._started:
            self._pool.finish(slot)
            self._free.append(slot)
        self._started.clear()
        self._coming = chain.from_iterable(map(self._tasks, range(number, self._epochs)))
        self._ahead = self._send()

    def _send(self) -> _Travelling | None:
        """Let the next batch travel, and have more made; None behind the last epoch."""
        self._reclaim()
        while self._free and (task := next(self._coming, None)):
            self._pool.start(self._free[0], task)
            self._started.append((self._free.popleft(), task))
        if not self._started:
            return None
        slot, task = self._started.popleft()
        targets = torch.from_numpy(self._pool.finish(slot))
        upload = self._uploader.start(as_tensor(self._pool.images[slot, : len(task.indices)]), targets)
        self._leaving = slot, upload
        return _Travelling(task, upload)

    def _reclaim(self) -> None:
        """Free the slot of the batch that was sent before, whose copy has long arrived."""
        if self._leaving:
            slot, upload = self._leaving
            upload.wait()
            self._free.append(slot)
            self._leaving = None
