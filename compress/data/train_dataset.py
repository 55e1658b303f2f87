"""In: samples. Out: training items, each a pure function of (seed, epoch, index); decoded images stay in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from numpy.typing import NDArray

from compress.config import AugmentConfig
from compress.data import augment
from compress.data.augment import Boxes, Mosaic, Picture, Plan
from compress.data.dataset import Problem, Sample
from runtime.errors import InputError
from runtime.image import LETTERBOX_FILL, letterbox, read_image, resize_longest

log = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Of the free memory that decoded images may take; the model, the workers and other programs need the rest."""
CGROUP = Path("/sys/fs/cgroup")


class ImageStore:
    """Images of `samples` as uint8 BGR whose longest side is `imgsz`, kept once decoded when all of them fit.

    An image that cannot be decoded any more is reported once, in `problems` and in the log, and stands in as a plain
    114 picture; `load` then says so, and its labels must not be used.
    """

    def __init__(self, samples: Sequence[Sample], imgsz: int, *, cache: bool | None = None) -> None:
        self.samples = samples
        self.imgsz = imgsz
        self.cached = cached_bytes(samples, imgsz) < CACHE_SHARE * free_bytes() if cache is None else cache
        self.problems: dict[int, Problem] = {}
        self._images: dict[int, Picture] = {}

    def load(self, index: int) -> tuple[Picture, bool]:
        """The resized image, read-only when cached, and whether it is real."""
        image = self._images.get(index)
        if image is None:
            image = self._decode(index)
            image.setflags(write=False)
            if self.cached:
                self._images[index] = image
        return image, index not in self.problems

    def _decode(self, index: int) -> Picture:
        sample = self.samples[index]
        try:
            return read_resized(sample, self.imgsz, linear=True)
        except InputError as error:
            self.problems[index] = Problem(sample.image, 0, error.message)
            log.warning("image left out of training: %s", error)
            return np.full((*resized_hw(sample.size_hw, self.imgsz), 3), LETTERBOX_FILL, np.uint8)


class TrainDataset:
    """Augmented training items."""

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        config: AugmentConfig,
        seed: int = 0,
        *,
        cache: bool | None = None,
    ) -> None:
        self.samples = samples
        self.imgsz = imgsz
        self.config = config
        self.seed = seed
        self.store = ImageStore(samples, imgsz, cache=cache)

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> tuple[Picture, NDArray[np.float32]]:
        """Image uint8 (3, imgsz, imgsz) RGB and labels (n, 5) float32 [class, cx, cy, w, h] normalised.

        `mosaic=False` switches mosaic and mixup off (the last epochs of a training).
        """
        plan = augment.draw_plan(
            self.config,
            seed=self.seed,
            epoch=epoch,
            index=index,
            count=len(self),
            imgsz=self.imgsz,
            mosaic=mosaic,
        )
        image, boxes = self._compose(plan, index)
        labels = augment.to_normalised(boxes, self.imgsz, self.imgsz)
        image = augment.jitter_hsv(image, plan.hsv)
        image, labels = augment.flip(image, labels, up_down=plan.flip_ud, left_right=plan.flip_lr)
        return to_chw_rgb(image), labels

    def _compose(self, plan: Plan, index: int) -> tuple[Picture, Boxes]:
        if plan.mosaic is None:
            return self._single(plan, index)
        image, boxes = self._mosaic(plan.mosaic)
        if plan.mixup is None:
            return image, boxes
        return augment.mix(image, boxes, *self._mosaic(plan.mixup.mosaic), plan.mixup.share)

    def _mosaic(self, plan: Mosaic) -> tuple[Picture, Boxes]:
        images, boxes = zip(*(self._with_boxes(index) for index in plan.indices), strict=True)
        canvas, together = augment.mosaic(images, boxes, plan.centre_xy, self.imgsz)
        return self._warped(canvas, together, plan.warp)

    def _single(self, plan: Plan, index: int) -> tuple[Picture, Boxes]:
        image, boxes = self._with_boxes(index)
        framed = letterbox(image, (self.imgsz, self.imgsz), auto=False, scale_up=True)
        boxes[:, 1:] *= framed.gain
        return self._warped(framed.image, augment.shift_boxes(boxes, *framed.pad_wh), plan.warp)

    def _warped(self, image: Picture, boxes: Boxes, warp: augment.Warp) -> tuple[Picture, Boxes]:
        out_hw = (self.imgsz, self.imgsz)
        matrix = augment.warp_matrix(warp, (image.shape[0], image.shape[1]), out_hw)
        return augment.warp_image(image, matrix, out_hw), augment.warp_boxes(boxes, matrix, out_hw, warp.scale)

    def _with_boxes(self, index: int) -> tuple[Picture, Boxes]:
        """The resized image and its boxes in its pixels."""
        image, is_real = self.store.load(index)
        labels = self.samples[index].labels if is_real else np.zeros((0, 5), np.float32)
        return image, augment.to_pixels(labels, image.shape[1], image.shape[0])


def read_resized(sample: Sample, imgsz: int, *, linear: bool) -> Picture:
    """The image as uint8 BGR, its longest side `imgsz`. Raises InputError when it cannot be decoded."""
    return resize_longest(read_image(sample.image), imgsz, enlarge_or_augment_linear=linear)


def to_chw_rgb(image: Picture) -> Picture:
    """(H, W, 3) BGR as contiguous (3, H, W) RGB."""
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))


def resized_hw(size_hw: tuple[int, int], imgsz: int) -> tuple[int, int]:
    """What `runtime.image.resize_longest` makes of an image of this size."""
    ratio = imgsz / max(size_hw)
    return max(1, int(size_hw[0] * ratio)), max(1, int(size_hw[1] * ratio))


def cached_bytes(samples: Sequence[Sample], imgsz: int) -> int:
    """Memory that all images take once decoded and resized."""
    return sum(3 * int(np.prod(resized_hw(sample.size_hw, imgsz))) for sample in samples)


def free_bytes() -> int:
    """Memory that is free now: of the machine, or of the container where that has less."""
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container limit: "max", or no cgroup v2
        return free
    return min(free, max(0, limit - used))
