"""Batches that worker processes make, on a GPU. Without one all of it is skipped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from compress.config import AugmentConfig
from compress.data.dataset import Sample
from compress.data.loader import epoch_tasks, train_batch
from compress.data.train_dataset import Task, TrainDataset
from compress.data.train_loader import ProcessLoader
from compress.evaluate import as_network_input

if not torch.cuda.is_available():
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

GPU = torch.device("cuda", 0)
EPOCHS, BATCH, SIDE = 3, 4, 320
LATE_CYCLES = 20_000_000


def samples_in(folder: Path, count: int) -> list[Sample]:
    """Images of noise with one box each."""
    rng, found = np.random.default_rng(0), []
    for number in range(count):
        file = folder / f"{number}.png"
        cv2.imwrite(str(file), rng.integers(0, 255, (200, SIDE, 3), np.uint8))
        found.append(Sample(file, file.name, np.array([[0, 0.5, 0.5, 0.4, 0.4]], np.float32), (200, SIDE), ""))
    return found


def tasks_of(dataset: TrainDataset) -> Callable[[int], list[Task]]:
    return lambda epoch: epoch_tasks(dataset, epoch, batch=BATCH)


def test_batches_reach_the_gpu_as_they_were_made_while_it_is_busy(tmp_path: Path) -> None:
    """The GPU is late with each batch, so that copies run ahead of it."""
    dataset = TrainDataset(samples_in(tmp_path, 11), SIDE, AugmentConfig(mixup=0.5))

    tasks = tasks_of(dataset)
    found = []
    with closing(ProcessLoader(dataset, tasks, EPOCHS, batch=BATCH, workers=2, device=GPU)) as loader:
        assert torch.from_numpy(loader._pool.images[1]).is_pinned()
        for epoch in range(EPOCHS):
            for batch in loader.epoch(epoch):
                torch.cuda._sleep(LATE_CYCLES)
                found.append((as_network_input(batch.images, GPU), batch.targets.clone(), batch.indices))
    expected = [train_batch(dataset, task) for epoch in range(EPOCHS) for task in tasks(epoch)]
    for (images, targets, indices), batch in zip(found, expected, strict=True):
        assert indices == batch.indices
        assert images.device == targets.device == GPU
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal((images * 255).round().byte().cpu(), batch.images)
        assert torch.equal(targets.cpu(), batch.targets)


def test_the_next_batch_travels_while_the_gpu_works_on_this_one(tmp_path: Path) -> None:
    dataset = TrainDataset(samples_in(tmp_path, 3 * BATCH), SIDE, AugmentConfig())
    with closing(ProcessLoader(dataset, tasks_of(dataset), 1, batch=BATCH, workers=1, device=GPU)) as loader:
        batches = loader.epoch(0)
        next(batches)
        torch.cuda._sleep(50 * LATE_CYCLES)
        busy = torch.cuda.current_stream(GPU).record_event()
        next(batches)
        assert loader._ahead is not None
        loader._ahead.upload.wait()
        assert not busy.query()  # the third has arrived, and the GPU is still at work
        batches.close()
