"""In: a `DataConfig` and the name of a split. Out: its usable samples, and every problem found on the way.

Reads only: no cache file, no repaired image is ever written beside the user's data.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from compress.data.dataset_yaml import DataConfig
from compress.data.labels import label_path, read_labels
from runtime.errors import InputError
from runtime.image import MAX_IMAGE_PIXELS, read_image

DECODERS = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    BmpImagePlugin.BmpImageFile,
    TiffImagePlugin.TiffImageFile,
    WebPImagePlugin.WebPImageFile,
)
PILLOW_FORMATS = tuple(decoder.format for decoder in DECODERS)
"""Only these are ever tried (MPO is opened as JPEG); Pillow knows dozens, some of them with a history."""
MIN_SIDE = 10
DECODE_UP_TO = 5000
"""Splits of at most this many images are fully decoded while indexing (about 2 ms an image at 640x480)."""
EXIF_ORIENTATION = 0x0112


class Problem(NamedTuple):
    """Something in the user's data that was skipped; `line` is 0 where the whole file is meant."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}" if self.line else f"{self.path}: {self.what}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One image, its labels (n, 5) float32 [class, cx, cy, w, h] normalised, and (height, width) as displayed."""

    image: Path
    labels: NDArray[np.float32]
    size_hw: tuple[int, int]


@dataclass(frozen=True)
class Index:
    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]


def index_split(config: DataConfig, split: str, *, workers: int | None = None, decode: bool | None = None) -> Index:
    """Samples of one split in the order of their paths; bad rows and bad images are left out and reported.

    `decode` reads every pixel to find damaged files; by default that is done for splits of up to `DECODE_UP_TO`
    images, larger ones are checked by their headers. Raises InputError when the split is absent or nothing is usable.
    """
    if split not in config.splits:
        raise InputError(f"{config.path}: no {split} split", f"It has {', '.join(config.splits)}")
    index = index_images(config.splits[split], len(config.names), workers=workers, decode=decode)
    if not index.samples:
        first = index.problems[0]
        raise InputError(
            f"{config.path}: {split}: none of {len(config.splits[split])} images can be used; first: {first}"
        )
    return index


def index_images(images: Sequence[Path], nc: int, *, workers: int | None = None, decode: bool | None = None) -> Index:
    """`index_split` of any image files; nothing usable is no error here."""
    decode = len(images) <= DECODE_UP_TO if decode is None else decode
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        outcomes = list(pool.map(lambda image: index_image(image, nc, decode=decode), images))
    samples = tuple(sample for sample, _ in outcomes if sample is not None)
    return Index(samples, tuple(problem for _, found in outcomes for problem in found))


def index_image(image: Path, nc: int, *, decode: bool) -> tuple[Sample | None, list[Problem]]:
    """The sample of one image file, or None with the reason."""
    try:
        size_hw = image_size_hw(image)
        if decode:
            read_image(image)
    except InputError as error:
        return None, [Problem(image, 0, _without_path(error, image))]
    labels_file = label_path(image)
    labels, rows = read_labels(labels_file, nc)
    labels.setflags(write=False)
    return Sample(image, labels, size_hw), [Problem(labels_file, *row) for row in rows]


def image_size_hw(path: Path) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the header alone.

    Raises InputError for what is not an image, is under `MIN_SIDE` on a side or over `MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns at half our own limit, which is checked below
            with Image.open(path, formats=PILLOW_FORMATS) as image:
                width, height = image.size
                turned = _orientation(image) in (5, 6, 7, 8)
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image", f"Expected one of {', '.join(PILLOW_FORMATS)}") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: more than {MAX_IMAGE_PIXELS} pixels") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, SyntaxError, TypeError, KeyError, IndexError, EOFError, OverflowError) as error:
        raise InputError(f"{path}: damaged header ({error})") from None
    _check_size(path, height, width)
    return (width, height) if turned else (height, width)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 where the tag is damaged, as the decoder has it."""
    try:
        return int(image.getexif().get(EXIF_ORIENTATION, 1))
    except (ValueError, SyntaxError, TypeError, KeyError, OSError):
        return 1


def _check_size(path: Path, height: int, width: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise InputError(f"{path}: {width}x{height} pixels, expected at least {MIN_SIDE} on each side")
    if height * width > MAX_IMAGE_PIXELS:
        raise InputError(f"{path}: {width}x{height} pixels, expected at most {MAX_IMAGE_PIXELS} in all")


def _without_path(error: InputError, path: Path) -> str:
    return error.message.removeprefix(f"{path}: ")


def all_labels(samples: Iterable[Sample]) -> NDArray[np.float32]:
    """Labels of every sample below each other, (n, 5) float32."""
    return np.concatenate([np.zeros((0, 5), np.float32), *(sample.labels for sample in samples)])
