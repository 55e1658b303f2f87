"""In: samples. Out: their decoded and resized images, which stay in memory if all of them fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil

from compress.data.dataset import Problem, Sample
from runtime.errors import InputError
from runtime.image import LETTERBOX_FILL, Image, read_image

log = logging.getLogger(__name__)

CACHE_SHARE = 0.5
"""Share of the free memory that decoded images may take; the model, the workers and other programs need the rest."""
CGROUP = Path("/sys/fs/cgroup")


class ImageStore:
    """Images of `samples` as uint8 BGR whose longest side is `imgsz`, kept once decoded when all of them fit.

    An image that cannot be decoded any more is reported once, in `problems` and in the log. A grey image (114) is used
    instead; `load` reports that, and the labels must not be used.
    """

    def __init__(self, samples: Sequence[Sample], imgsz: int, *, cache: bool | None = None) -> None:
        self.samples = samples
        self.imgsz = imgsz
        self.cached = fits_in_memory(samples, imgsz) if cache is None else cache
        self.problems: dict[int, Problem] = {}
        self._images: dict[int, Image] = {}

    def load(self, index: int) -> tuple[Image, bool]:
        """The resized image, read-only when cached, and True if it could be decoded."""
        image = self._images.get(index)
        if image is None:
            image = self._decode(index)
            image.setflags(write=False)
            if self.cached:
                self._images[index] = image
        return image, index not in self.problems

    def _decode(self, index: int) -> Image:
        sample = self.samples[index]
        try:
            return read_resized(sample, self.imgsz, linear=True)
        except InputError as error:
            self.problems[index] = Problem(sample.image, 0, error.message)
            log.warning("image left out of training: %s", error)
            return np.full((*resized_hw(sample.size_hw, self.imgsz), 3), LETTERBOX_FILL, np.uint8)


def read_resized(sample: Sample, imgsz: int, *, linear: bool) -> Image:
    """The image as uint8 BGR, its longest side `imgsz`.

    Raises InputError when it cannot be decoded, or when its size is another than that of the index.
    """
    image = read_image(sample.image)
    (height, width), found = sample.size_hw, image.shape[:2]
    if found != (height, width):
        raise InputError(
            f"{sample.image}: {found[1]}x{found[0]} pixels, but {width}x{height} when the data was indexed",
            "Index the data again",
        )
    return resize_longest(image, imgsz, linear=linear)


def to_chw_rgb(image: Image) -> Image:
    """(H, W, 3) BGR as contiguous (3, H, W) RGB."""
    return np.ascontiguousarray(image[..., ::-1].transpose(2, 0, 1))


def resize_longest(image: Image, imgsz: int, *, linear: bool) -> Image:
    """Scale so that the longest side is `imgsz`, as YOLOv5 v7.0's data loader does.

    Bilinear when enlarging or when `linear` (images that augmentation will warp), else INTER_AREA. An image that
    already fits is returned as it is.
    """
    height, width = image.shape[:2]
    if max(height, width) == imgsz:
        return image
    resized_wh = resized_hw((height, width), imgsz)[::-1]
    enlarges = imgsz > max(height, width)
    interpolation = cv2.INTER_LINEAR if linear or enlarges else cv2.INTER_AREA
    return np.asarray(cv2.resize(image, resized_wh, interpolation=interpolation), np.uint8)


def resized_hw(size_hw: tuple[int, int], imgsz: int) -> tuple[int, int]:
    """The size that `resize_longest` gives an image of `size_hw`; sides are truncated."""
    ratio = imgsz / max(size_hw)
    return max(1, int(size_hw[0] * ratio)), max(1, int(size_hw[1] * ratio))


def fits_in_memory(samples: Sequence[Sample], imgsz: int) -> bool:
    """Whether all images, decoded and resized, may stay in memory."""
    return cached_bytes(samples, imgsz) < CACHE_SHARE * free_bytes()


def cached_bytes(samples: Sequence[Sample], imgsz: int) -> int:
    """Memory that all images take once decoded and resized."""
    return sum(3 * int(np.prod(resized_hw(sample.size_hw, imgsz))) for sample in samples)


def free_bytes() -> int:
    """Bytes of memory that are free now: of the machine, or of the container if that has fewer."""
    free = psutil.virtual_memory().available
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no container limit: "max", or no cgroup v2
        return free
    return min(free, max(0, limit - used))
