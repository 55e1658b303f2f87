"""In: a dataset or samples. Out: batches as uint8 tensors with YOLO targets, in an order that is the same everywhere.

Here threads make the batches, or the caller's own: OpenCV releases the interpreter lock, and decoded images are shared
without copies. `compress.data.train_loader` has processes for a GPU. The workers never change a batch.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from compress.data.augment import to_normalised, to_pixels
from compress.data.dataset import Sample
from compress.data.image_store import read_resized, write_rgb
from compress.data.train_dataset import Task, TrainItems, targets_of, write_items
from runtime.image import Image, letterbox

RECT_PAD = 0.5
"""Share of the stride by which rectangular batches are wider than needed."""
VAL_THREADS = 4
"""Most threads of a validation. Each makes a whole batch; NMS in the main thread takes as long as one of them."""
A = TypeVar("A")
B = TypeVar("B")


class Batch(NamedTuple):
    """images uint8 (B, 3, S, S) RGB, channels last; targets float32 (nt, 6) [image in batch, class, cx, cy, w, h]
    normalised.

    The first `labelled` images are those whose labels are known; None if all are.
    """

    images: torch.Tensor
    targets: torch.Tensor
    indices: tuple[int, ...]
    labelled: int | None = None


class ValBatch(NamedTuple):
    """A validation batch; all per-image fields are in batch order.

    images uint8 (B, 3, H, W) RGB, channels last; targets as in `Batch`. `gains_wh` are resized / original width and
    height, which differ by the rounding to whole pixels; `pads_wh` is the float letterbox pad in pixels.
    """

    images: torch.Tensor
    targets: torch.Tensor
    samples: tuple[Sample, ...]
    gains_wh: tuple[tuple[float, float], ...]
    pads_wh: tuple[tuple[float, float], ...]


def train_batches(dataset: TrainItems, tasks: Iterable[Task], workers: int = 0) -> Iterator[Batch]:
    """The batches of `tasks` in their order, made by `workers` threads; with 0 by the thread that asks for them."""
    yield from map_ahead(lambda task: train_batch(dataset, task), tasks, workers)


def epoch_tasks(
    dataset: TrainItems, epoch: int, *, batch: int, rank: int = 0, world: int = 1, mosaic: bool = True
) -> list[Task]:
    """The batches of one epoch, before they are made.

    `batch` counts the images of all ranks together: rank r takes the r-th of `world` nearly equal slices of every
    global batch, so the union over ranks does not depend on `world`. The last batch may be smaller; if it has fewer
    images than there are ranks, some of its images are repeated, so that every rank has work. In a batch, images whose
    labels are not known come last.
    """
    return [
        Task(epoch, *_labelled_first(indices, dataset.labelled), mosaic)
        for indices in rank_slices(dataset.order(epoch), batch=batch, rank=rank, world=world)
    ]


def _labelled_first(indices: NDArray[np.int64], labelled: int) -> tuple[tuple[int, ...], int | None]:
    """The indices, those below `labelled` first, and how many these are; None if all."""
    known = indices < labelled
    ordered = tuple(np.concatenate([indices[known], indices[~known]]).tolist())
    return ordered, None if known.all() else int(known.sum())


def train_batch(dataset: TrainItems, task: Task) -> Batch:
    """Make one batch."""
    images = np.empty((len(task.indices), dataset.imgsz, dataset.imgsz, 3), np.uint8)
    targets = write_items(dataset, task.epoch, task.indices, images, 0, mosaic=task.mosaic)
    return Batch(as_tensor(images), torch.from_numpy(targets), task.indices, task.labelled)


def as_tensor(images: NDArray[np.uint8]) -> torch.Tensor:
    """The same memory (B, H, W, 3) as a tensor (B, 3, H, W), channels last."""
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def rank_slices(order: NDArray[np.int64], *, batch: int, rank: int, world: int) -> list[NDArray[np.int64]]:
    """The indices that one rank takes of each global batch."""
    batches = [order[i : i + batch] for i in range(0, len(order), batch)]
    if batches and len(batches[-1]) < world:
        batches[-1] = np.resize(batches[-1], world)
    return [np.array_split(whole, world)[rank] for whole in batches]


def batch_count(count: int, batch: int) -> int:
    return math.ceil(count / batch)


def val_batches(
    samples: Sequence[Sample], *, imgsz: int, batch: int, stride: int, rect: bool = True, workers: int = 0
) -> Iterator[ValBatch]:
    """Every sample once: in rectangular batches of like aspect ratio, or square in the given order.

    The sides of rectangular batches are multiples of `stride`, the network's largest, half of it wider than needed.

    Small images are not enlarged beyond `imgsz`; shrinking averages areas.
    """
    ordered = by_aspect(samples) if rect else samples
    groups = [ordered[i : i + batch] for i in range(0, len(ordered), batch)]
    jobs = [(group, _rect_shape(group, imgsz, stride) if rect else (imgsz, imgsz)) for group in groups]
    yield from map_ahead(lambda job: _val_batch(imgsz, *job), jobs, min(workers, VAL_THREADS))


def by_aspect(samples: Sequence[Sample]) -> list[Sample]:
    """Samples by height/width as YOLOv5 sorts them, so that rectangular batches hold the same images.

    The sort is NumPy's default, which orders equal ratios in its own way; a stable one puts other images into a batch's
    wider shape and moves mAP50 of yolov5n on COCO128 by 0.002.
    """
    return [samples[index] for index in np.argsort([_aspect(sample) for sample in samples])]


def _aspect(sample: Sample) -> float:
    return sample.size_hw[0] / sample.size_hw[1]


def _rect_shape(samples: Sequence[Sample], imgsz: int, stride: int) -> tuple[int, int]:
    """(height, width) of a batch: multiples of the stride, half a stride wider than the images need, as in YOLOv5."""
    lowest, highest = min(map(_aspect, samples)), max(map(_aspect, samples))
    shape = (highest, 1.0) if highest < 1 else (1.0, 1 / lowest) if lowest > 1 else (1.0, 1.0)
    height, width = (math.ceil(side * imgsz / stride + RECT_PAD) * stride for side in shape)
    return height, width


def _val_batch(imgsz: int, samples: Sequence[Sample], shape_hw: tuple[int, int]) -> ValBatch:
    images = np.empty((len(samples), *shape_hw, 3), np.uint8)
    made = [_write_val_item(sample, imgsz, image) for sample, image in zip(samples, images, strict=True)]
    labels, gains, pads = zip(*made, strict=True)
    targets = np.concatenate([targets_of(own, place) for place, own in enumerate(labels)])
    return ValBatch(as_tensor(images), torch.from_numpy(targets), tuple(samples), gains, pads)


def _write_val_item(
    sample: Sample, imgsz: int, out: Image
) -> tuple[NDArray[np.float32], tuple[float, float], tuple[float, float]]:
    """Write the sample's image into `out` as RGB. Returns its labels, gains (width, height) and pad.

    An unreadable image is an error: mAP must count every image.
    """
    image = read_resized(sample, imgsz, linear=False)
    height, width = image.shape[:2]
    framed = letterbox(image, (out.shape[0], out.shape[1]), scale_up=False)
    boxes = to_pixels(sample.labels, framed.gain * width, framed.gain * height, *framed.pad_wh)
    write_rgb(framed.image, out)
    gains_wh = width / sample.size_hw[1], height / sample.size_hw[0]
    return to_normalised(boxes, out.shape[1], out.shape[0]), gains_wh, framed.pad_wh


def map_ahead(function: Callable[[A], B], jobs: Iterable[A], workers: int) -> Iterator[B]:
    """`map` in order, with `workers` threads running up to `workers + 1` jobs ahead; 0 runs in the caller."""
    if workers <= 0:
        yield from map(function, jobs)
        return
    remaining = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="data") as pool:
        running: deque[Future[B]] = deque(pool.submit(function, job) for job in islice(remaining, workers + 1))
        try:
            while running:
                result = running.popleft().result()
                running.extend(pool.submit(function, job) for job in islice(remaining, 1))
                yield result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
