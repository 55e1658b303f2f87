"""In: a folder of images, or a video of the camera. Out: an index of images without labels, near-duplicates left out.

The frames of a video become files beside the index, so that a training is a function of files alone. Index and frames
are made once, in a folder that appears as a whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from compress.config import DistillConfig
from compress.data.dataset import INDEX, Problem, Sample, SplitIndex, key_of, split_from_json, split_to_json
from compress.data.image_store import resize_longest
from compress.data.index import file_state, image_problem, usable_image
from compress.data.loader import map_ahead
from compress.log import Log
from compress.processes import process_index
from runtime.errors import InputError
from runtime.files import read_json, unwritable
from runtime.frames import FrameReader
from runtime.image import IMAGE_SUFFIXES, Image, read_bytes
from runtime.machine import usable_cores
from runtime.sources import VIDEO_SUFFIXES, Source, image_files

UNLABELLED = "unlabelled"
"""The folder of a training that holds index and frames."""
THUMBNAIL = 32
RECENT = 50
"""Images that a new one is compared with: those that were kept last."""
JPEG_QUALITY = 95
NO_LABELS = np.zeros((0, 5), np.float32)


class Found(NamedTuple):
    """Images without labels, in the order of their names or of time."""

    split: SplitIndex
    duplicates: int
    """Images that were left out because they hardly differ from one before."""


def open_unlabelled(config: DistillConfig, out: Path, log: Log) -> SplitIndex | None:
    """The images of `config.unlabelled`, indexed in a folder below `out` unless they are already; None without a path.

    Raises InputError when the path is neither a folder of images nor a video, or when no image can be used.
    """
    source = config.unlabelled
    if source is None:
        return None
    settings = repr((unlabelled_digest(source), config.frame_stride, config.duplicate_threshold, config.image_side))
    place = out / UNLABELLED / hashlib.sha256(settings.encode()).hexdigest()[:16]
    if not place.is_dir():
        _make(source, config, place, log)
    found = _read(place, source)
    images, video = len(found.split.samples), "" if source.is_dir() else f", one frame in {config.frame_stride}"
    log(f"unlabelled: {images} images of {source}{video}; {found.duplicates} near-duplicates left out")
    for line in found.split.problem_lines("unlabelled"):
        log(line)
    return found.split


def unlabelled_digest(source: Path | None) -> str:
    """sha256 over name, size and time of change of every file, so that nothing is decoded; "none" without a path.

    Raises InputError as `open_unlabelled` does for a path that cannot be used.
    """
    if source is None:
        return "none"
    states = [(key_of(file, source), *file_state(file)) for file in _files(source)]
    return hashlib.sha256(repr(states).encode()).hexdigest()


def _files(source: Path) -> list[Path]:
    hint = "Give a folder of images or one video file"
    if not source.exists():
        raise InputError(f"{source}: no such folder or video", hint)
    if source.is_file():
        if source.suffix.lower() not in VIDEO_SUFFIXES:
            raise InputError(f"{source}: not a video, expected one of {', '.join(VIDEO_SUFFIXES)}", hint)
        return [source]
    files = sorted(image_files(source))
    if not files:
        raise InputError(f"{source}: holds no image, expected {', '.join(IMAGE_SUFFIXES)}", hint)
    return files


def _make(source: Path, config: DistillConfig, place: Path, log: Log) -> None:
    """Write `place` as a whole; another process that makes the same may be faster."""
    part = place.with_name(f".part-{process_index()}")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        found = _index_folder(source, config) if source.is_dir() else _extract(source, config, part, log)
        if not found.split.samples:
            raise InputError(f"{source}: no image can be used; first: {found.split.problems[0].what}")
        text = split_to_json(found.split, _root(source, part))
        (part / INDEX).write_text(f'{{"duplicates": {found.duplicates}, "split": {text}}}\n', encoding="ascii")
        if not place.is_dir():
            part.rename(place)
    except OSError as error:
        if not place.is_dir():
            raise unwritable(place, error) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _read(place: Path, source: Path) -> Found:
    raw = read_json(place / INDEX, f"Delete {place}")
    return Found(split_from_json(raw["split"], _root(source, place).resolve()), raw["duplicates"])


def _root(source: Path, place: Path) -> Path:
    """The folder that keys start from: images stay where they are, frames lie beside the index."""
    return source.resolve() if source.is_dir() else place.resolve()


def _index_folder(source: Path, config: DistillConfig) -> Found:
    root, problems = source.resolve(), []
    is_new, duplicates, samples = new_image_filter(config.duplicate_threshold), 0, []
    for found in map_ahead(lambda file: _read_image(file, root), _files(root), usable_cores()):
        if isinstance(found, Problem):
            problems.append(found)
        elif is_new(found[1]):
            samples.append(found[0])
        else:
            duplicates += 1
    return Found(SplitIndex(tuple(samples), tuple(problems)), duplicates)


def _read_image(file: Path, root: Path) -> tuple[Sample, NDArray[np.float32]] | Problem:
    """The sample and its thumbnail."""
    try:
        data = read_bytes(file)
        image = usable_image(data, file)
    except InputError as error:
        return image_problem(file, error)
    return _sample(file, key_of(file, root), image, data), thumbnail(image)


def _extract(source: Path, config: DistillConfig, folder: Path, log: Log) -> Found:
    """Frames of a video as JPEG files in `folder`, as large as they are loaded."""
    reader = FrameReader([Source(str(source), "video", source)], stride=config.frame_stride, log=log)
    is_new, duplicates, samples = new_image_filter(config.duplicate_threshold), 0, []
    for frame in reader:
        if is_new(thumbnail(frame.image)):
            samples.append(_write_frame(frame.image, folder / f"{frame.number:09d}.jpg", config.image_side))
        else:
            duplicates += 1
    problems = [Problem(source, 0, reason.removeprefix(f"{source}: ")) for reason in reader.failures]
    return Found(SplitIndex(tuple(samples), tuple(problems)), duplicates)


def _write_frame(frame: Image, file: Path, side: int) -> Sample:
    image = resize_longest(frame, side, linear=True)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
    file.write_bytes(data)
    return _sample(file.resolve(), file.name, image, data)


def _sample(file: Path, key: str, image: Image, data: bytes) -> Sample:
    height, width = image.shape[:2]
    return Sample(file, key, NO_LABELS, (height, width), hashlib.sha256(data).hexdigest())


# ---- near-duplicates ------------------------------------------------------------------------------------------------


def thumbnail(image: Image) -> NDArray[np.float32]:
    """(32, 32) float32 grey levels without their mean: noise averages out, and a change of exposure adds nothing."""
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    small = cv2.resize(grey, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    return small - small.mean(dtype=np.float32)


def new_image_filter(threshold: float) -> Callable[[NDArray[np.float32]], bool]:
    """A function that tells whether a thumbnail differs from the RECENT ones that it last accepted, by `threshold` or
    more grey levels in the mean.
    """
    kept: deque[NDArray[np.float32]] = deque(maxlen=RECENT)

    def is_new(found: NDArray[np.float32]) -> bool:
        if any(float(np.abs(found - other).mean()) < threshold for other in kept):
            return False
        kept.append(found)
        return True

    return is_new
