"""Processes that make the images of a training's batches, a few batches ahead, in memory that they share with this one.

Threads would wait for each other, and the thread that feeds a GPU for them: 0.7 of the 6 ms that an image of 640 pixels
takes hold Python's lock. The processes are fresh interpreters: a fork of a process that has used CUDA is unusable, and
those of `multiprocessing` would import the main script once more, torch with it, and leave semaphores with names.
"""

from __future__ import annotations

import math
import os
import pickle
import subprocess
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from selectors import EVENT_READ, BaseSelector, DefaultSelector
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from compress.data.shared_array import SharedArray
from compress.data.train_dataset import Task, TrainItems
from compress.data.worker import DECODED, EPOCH, INDICES, MOSAIC, PIECE, Made, Work, learn
from runtime.child_process import how_it_ended, start_child
from runtime.errors import EdgestillError

PIECES_A_WORKER = 4
"""Pieces of a batch for each worker: the last to be ready keeps the others waiting for a quarter of their work."""
MOST_PIECES = 64
"""Pieces of a batch in all, so that those of a few batches fit into the smallest pipe and `start` never waits."""


def piece_size(batch: int, workers: int) -> int:
    """Images that a worker makes at once."""
    return math.ceil(batch / min(PIECES_A_WORKER * workers, MOST_PIECES))


class WorkerPool:
    """`workers` processes that fill slots with batches of at most `batch` images of `dataset`.

    `start` has a batch made in a slot, `finish` waits for it. The images are then in `images[slot]` until that slot's
    next start. From now on the data set keeps decoded images where all processes read them.
    """

    def __init__(self, dataset: TrainItems, *, workers: int, batch: int, slots: int) -> None:
        self._stores = dataset.stores
        for store in self._stores:
            store.share()
        images = SharedArray((slots, batch, dataset.imgsz, dataset.imgsz, 3), np.uint8)
        tasks = SharedArray((slots, INDICES + batch), np.int64)
        decoded = SharedArray((sum(len(store.samples) for store in self._stores), 2), np.int64)
        self.images, self._tasks, self._decoded = images.array, tasks.array, decoded.array
        self._n_decoded = 0
        self._piece = piece_size(batch, workers)
        self._missing = [0] * slots
        self._targets: list[dict[int, NDArray[np.float32]]] = [{} for _ in range(slots)]
        read_fd, write_fd = os.pipe()
        self._pieces = os.fdopen(write_fd, "wb", buffering=0)
        with os.fdopen(read_fd, "rb", buffering=0):
            self._processes = _started(Work(dataset, images, tasks, decoded, read_fd), workers)
        self._selector = DefaultSelector()
        for connection in self._processes:
            self._selector.register(connection, EVENT_READ)
        self._close = weakref.finalize(self, _end, dict(self._processes), self._pieces, self._selector)

    def close(self) -> None:
        """End the processes. Nothing of them stays; nor does it where this process is killed before it can do so."""
        self._close()

    def start(self, slot: int, task: Task) -> None:
        """Have the images of a batch made in a slot; returns at once. Raises EdgestillError when all workers ended."""
        row, count = self._tasks[slot], len(task.indices)
        row[[EPOCH, MOSAIC, DECODED]] = task.epoch, task.mosaic, self._n_decoded
        row[INDICES : INDICES + count] = task.indices
        firsts = range(0, count, self._piece)
        self._targets[slot], self._missing[slot] = {}, len(firsts)
        pieces = b"".join(PIECE.pack(slot, first, min(first + self._piece, count)) for first in firsts)
        try:
            self._pieces.write(pieces)
        except BrokenPipeError:
            self._tell_ended(next(iter(self._processes.values())))

    def finish(self, slot: int) -> NDArray[np.float32]:
        """Wait until the batch of a slot is ready. Returns its targets, as `write_items` does.

        Raises EdgestillError when a worker has ended.
        """
        while self._missing[slot]:
            for ready, _ in self._selector.select():
                self._take(ready.fileobj)
        return np.concatenate([targets for _, targets in sorted(self._targets[slot].items())])

    def _take(self, connection: Any) -> None:
        try:
            made: Made = connection.recv()
        except (EOFError, ConnectionResetError):
            self._tell_ended(self._processes[connection])
        self._targets[made.slot][made.first] = made.targets
        self._missing[made.slot] -= 1
        for store, index, problem in made.problems:
            self._stores[store].report(index, problem)
        if made.decoded:
            self._note_decoded(made.decoded)

    def _note_decoded(self, decoded: Sequence[tuple[int, int]]) -> None:
        """Tell of images that a worker decoded, with every task from now on; two workers may have decoded the same."""
        readable = [store.shared.readable if store.shared else set() for store in self._stores]
        new = np.array([(store, index) for store, index in decoded if index not in readable[store]], np.int64)
        self._decoded[self._n_decoded : self._n_decoded + len(new)] = new.reshape(-1, 2)
        self._n_decoded += len(new)
        learn(self._stores, new)

    def _tell_ended(self, process: subprocess.Popen[bytes]) -> NoReturn:
        status = process.wait()
        self.close()
        hint = "Where memory is short, lower workers or batch" if status < 0 else "Its own message says why"
        raise EdgestillError(f"a process that loads data has ended: {how_it_ended(status)}", hint)


def _started(work: Work, workers: int) -> dict[Connection, subprocess.Popen[bytes]]:
    """The processes, by the connections on which they say what is ready."""
    shared = [store.shared.pixels for store in work.dataset.stores if store.shared]
    written = np.frombuffer(pickle.dumps(work), np.uint8)
    told = SharedArray(written.shape, np.uint8)
    told.array[:] = written
    inherited = [work.pieces_fd, *(one.fd for one in (told, work.images, work.tasks, work.decoded, *shared))]
    found = {}
    for _ in range(workers):
        ours, theirs = Pipe(duplex=False)
        statement = f"from compress.data.worker import main; main({told.fd}, {len(written)}, {theirs.fileno()})"
        found[ours] = start_child(statement, pass_fds=[*inherited, theirs.fileno()])
        theirs.close()
    return found


def _end(processes: dict[Connection, subprocess.Popen[bytes]], pieces: BinaryIO, selector: BaseSelector) -> None:
    selector.close()
    pieces.close()
    for connection, process in processes.items():
        connection.close()
        process.kill()
    for process in processes.values():
        process.wait()
