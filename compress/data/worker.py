"""A process that makes the images of a training's batches in shared memory, as `compress.data.worker_pool` tells it.

It takes pieces of batches from a pipe that all workers read, so that no worker waits while another has two to make. It
ends when the process that started it closes that pipe, by whatever end; it holds nothing that anyone must clean up.
"""

from __future__ import annotations

import logging
import os
import pickle
import struct
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from compress.data.dataset import Problem
from compress.data.image_store import ImageStore
from compress.data.shared_array import SharedArray
from compress.data.train_dataset import TrainItems, write_items

PIECE = struct.Struct("=3i")
"""Slot, and the first image and the one behind the last that are to be made there. A pipe passes so few bytes whole."""
EPOCH, MOSAIC, DECODED, INDICES = range(4)
"""Columns of a slot's task; from the last on they are the indices of the items."""


class Work(NamedTuple):
    """All that a worker needs; the arrays are the same memory in every process.

    A slot is the place of one batch. `images` uint8 (slots, B, S, S, 3) RGB; `tasks` int64 (slots, 3 + B); `decoded`
    int64 (n, 2) [store, index], the images that some worker has decoded, of which a task counts those there already.
    """

    dataset: TrainItems
    images: SharedArray
    tasks: SharedArray
    decoded: SharedArray
    pieces_fd: int


class Made(NamedTuple):
    """A piece that is ready: its targets, and what the worker learned of the data set's images meanwhile."""

    slot: int
    first: int
    targets: NDArray[np.float32]
    decoded: list[tuple[int, int]]
    problems: list[tuple[int, int, Problem]]


def main(work_fd: int, size_bytes: int, made_fd: int) -> None:
    """Serve the pool whose `Work` lies pickled behind one descriptor; results go to the other."""
    cv2.setNumThreads(1)
    logging.disable()  # the pool reports what a worker finds
    work: Work = pickle.loads(SharedArray((size_bytes,), np.uint8, work_fd).array.data)  # noqa: S301  the pool's own bytes
    with suppress(BrokenPipeError):  # the pool is gone
        serve(work, Connection(made_fd, readable=False))


def serve(work: Work, results: Connection) -> None:
    """Make pieces until the pipe of pieces is closed."""
    known, stores = 0, work.dataset.stores
    told = [0] * len(stores)
    while piece := os.read(work.pieces_fd, PIECE.size):
        slot, first, stop = PIECE.unpack(piece)
        task = work.tasks.array[slot].tolist()
        learn(stores, work.decoded.array[known : task[DECODED]])
        known = max(known, task[DECODED])
        indices = task[INDICES + first : INDICES + stop]
        targets = write_items(
            work.dataset, task[EPOCH], indices, work.images.array[slot], first, mosaic=bool(task[MOSAIC])
        )
        results.send(Made(slot, first, targets, newly_decoded(stores), new_problems(stores, told)))


def learn(stores: Sequence[ImageStore], decoded: NDArray[np.int64]) -> None:
    """Let the stores read the images (n, 2) [store, index] that other processes decoded."""
    for store, index in decoded.tolist():
        if shared := stores[store].shared:
            shared.readable.add(index)


def newly_decoded(stores: Sequence[ImageStore]) -> list[tuple[int, int]]:
    """The images [store, index] that this process decoded since it was last asked."""
    found = []
    for number, store in enumerate(stores):
        if store.shared:
            found += [(number, index) for index in store.shared.decoded]
            store.shared.decoded.clear()
    return found


def new_problems(stores: Sequence[ImageStore], told: list[int]) -> list[tuple[int, int, Problem]]:
    """The problems [store, index, problem] beyond the first `told` of each store, which count them from now on."""
    found = []
    for number, store in enumerate(stores):
        found += [(number, index, problem) for index, problem in [*store.problems.items()][told[number] :]]
        told[number] = len(store.problems)
    return found
