"""The speed of loading: `python -m compress.data.load_speed --data D --imgsz 640 --batch 32 --workers 1 2`.

Makes augmented batches by threads, then by processes, and prints for each number of them what an image takes. The first
epoch, which decodes the images, does not count. Images from processes travel to --device; without one they stay in the
shared memory, from which a GPU fetches them itself.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import psutil
import torch

from compress.config import AugmentConfig
from compress.data.dataset_yaml import load_data
from compress.data.index import index_dataset
from compress.data.loader import epoch_tasks
from compress.data.train_dataset import Task, TrainDataset
from compress.data.train_loader import ProcessLoader, ThreadLoader, TrainLoader
from runtime.numbers import real, whole

NOWHERE = "meta"
"""A device to which torch copies nothing."""
HEAD = ("workers", "images/s", "CPU ms/image", "images/s a core", "here ms/image")
"""The last is the CPU time of the process that trains, a part of the second."""


def measure(loader: TrainLoader, epochs: int, step_s: float) -> np.ndarray:
    """Seconds that pass in `epochs` epochs behind the first, CPU time of this process, and CPU time of its children.

    Between two batches this process sleeps for `step_s` seconds.
    """
    with closing(loader):
        children = psutil.Process().children()
        for epoch in range(1 + epochs):
            if epoch == 1:
                started = _clocks(children)
            for _ in loader.epoch(epoch):
                time.sleep(step_s)
        return _clocks(children) - started


def _clocks(children: Sequence[psutil.Process]) -> np.ndarray:
    used = [child.cpu_times() for child in children]
    return np.array([time.perf_counter(), time.process_time(), sum(one.user + one.system for one in used)])


def row(name: str, seconds: np.ndarray) -> str:
    """A line of the table, from the seconds of an image."""
    wall, own, others = seconds
    return line(name, f"{1 / wall:.1f}", f"{1e3 * (own + others):.2f}", f"{1 / (own + others):.1f}", f"{1e3 * own:.3f}")


def line(*cells: str) -> str:
    return "".join(f"{cell:>16}" for cell in cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.data.load_speed", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--imgsz", type=whole(1), default=640)
    parser.add_argument("--batch", type=whole(1), default=32)
    parser.add_argument("--epochs", type=whole(1), default=3)
    parser.add_argument("--workers", type=whole(1, 256), nargs="+", default=[1, 2])
    parser.add_argument("--device", default=NOWHERE, help="where the batches of processes travel")
    parser.add_argument("--step-ms", type=real(0), default=0, help="time of a step between two batches")
    asked = parser.parse_args(arguments)
    samples = index_dataset(load_data(asked.data), ("train",)).splits["train"].samples
    device = torch.device(asked.device)
    dataset = TrainDataset(samples, asked.imgsz, AugmentConfig(), cache=True)

    def tasks(epoch: int) -> list[Task]:
        return epoch_tasks(dataset, epoch, batch=asked.batch)

    def processes(workers: int) -> TrainLoader:
        ends = asked.epochs + 2  # an epoch behind the last: its first batches are made as those of the others were
        return ProcessLoader(dataset, tasks, ends, batch=asked.batch, workers=workers, device=device)

    def show(name: str, loader: TrainLoader) -> None:
        seconds = measure(loader, asked.epochs, asked.step_ms / 1e3)
        print(row(name, seconds / (asked.epochs * len(samples))), flush=True)

    print(line(*HEAD))
    for workers in (0, *asked.workers):
        show(f"{workers} threads", ThreadLoader(dataset, tasks, workers))
    for workers in asked.workers:
        show(f"{workers} processes", processes(workers))


if __name__ == "__main__":
    main()
