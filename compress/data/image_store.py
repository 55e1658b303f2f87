"""In: samples. Out: their decoded and resized images, which stay in memory if all of them fit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import psutil

from compress.data.dataset import Problem, Sample
from compress.data.shared_array import SharedArray
from compress.processes import sharing_count
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
        self._images: dict[int, Image] | SharedImages = {}

    @property
    def shared(self) -> SharedImages | None:
        """The decoded images that processes share; None where each decodes for itself."""
        return self._images if isinstance(self._images, SharedImages) else None

    def share(self) -> None:
        """Keep the decoded images, if they are kept at all, where the processes that this one starts find them."""
        if self.cached and isinstance(self._images, dict):
            shared = SharedImages([resized_hw(sample.size_hw, self.imgsz) for sample in self.samples])
            for index, image in self._images.items():
                shared[index] = image
            self._images = shared

    def load(self, index: int) -> tuple[Image, bool]:
        """The resized image, read-only when cached, and True if it could be decoded."""
        image = self._images.get(index)
        if image is None and index not in self.problems:
            image = self._decode(index)
        if image is None:
            return np.full((*resized_hw(self.samples[index].size_hw, self.imgsz), 3), LETTERBOX_FILL, np.uint8), False
        return image, True

    def _decode(self, index: int) -> Image | None:
        """The image, kept where images are kept; None, which is reported, if it cannot be decoded."""
        sample = self.samples[index]
        try:
            image = read_resized(sample, self.imgsz, linear=True)
        except InputError as error:
            self.report(index, Problem(sample.image, 0, str(error)))
            return None
        image.setflags(write=False)
        if self.cached:
            self._images[index] = image
        return image

    def report(self, index: int, problem: Problem) -> None:
        """Take note that an image cannot be decoded, and log it the first time."""
        if index not in self.problems:
            self.problems[index] = problem
            log.warning("image left out of training: %s", problem.what)


class SharedImages:
    """Decoded images of known sizes in memory that processes share; in each process a dict of those it may read.

    A process reads the images that it decoded, and those of which it learns through `readable` by a message: memory
    alone does not say on every CPU that the pixels are there already. Two processes that decode one image write the
    same bytes to the same place.
    """

    def __init__(self, sizes_hw: Sequence[tuple[int, int]]) -> None:
        self._sizes_hw = sizes_hw
        self._ends = np.cumsum([3 * height * width for height, width in sizes_hw])
        self.pixels = SharedArray((int(self._ends[-1]),), np.uint8)
        self.readable: set[int] = set()
        self.decoded: list[int] = []
        """Images that this process decoded, in this order."""

    def __setitem__(self, index: int, image: Image) -> None:
        self._place(index)[...] = image
        self.decoded.append(index)
        self.readable.add(index)

    def get(self, index: int) -> Image | None:
        """The image, read-only; None if this process does not know it."""
        if index not in self.readable:
            return None
        image = self._place(index)
        image.setflags(write=False)
        return image

    def _place(self, index: int) -> Image:
        height, width = self._sizes_hw[index]
        end = int(self._ends[index])
        return self.pixels.array[end - 3 * height * width : end].reshape(height, width, 3)


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


def write_rgb(image: Image, out: Image) -> None:
    """Write an image (H, W, 3) BGR into the contiguous `out` of the same shape, as RGB."""
    assert image.shape == out.shape  # OpenCV would write elsewhere
    cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=out)


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
    """Whether all images, decoded and resized, may stay in memory, in each process that shares it."""
    return cached_bytes(samples, imgsz) * sharing_count() < CACHE_SHARE * free_bytes()


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
