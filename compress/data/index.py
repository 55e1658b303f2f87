"""In: a `DataConfig`. Out: the `Dataset` of its usable images, and every problem that was found.

Each image is decoded once, by the decoder that training uses: its size and its digest come from the same bytes.
It only reads: no cache file and no repaired image is ever written beside the user's data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from compress.data.dataset import Dataset, Problem, Sample, SplitIndex, key_of
from compress.data.dataset_yaml import DataConfig
from compress.data.labels import label_path, read_labels
from runtime.errors import InputError
from runtime.image import Image, decode_image, read_bytes
from runtime.machine import usable_cores

MIN_SIDE = 10
NO_LABELS = "no image has a label"
USED = ("train", "val")
"""The splits that a training reads."""
JUDGES = ("val",)
"""The split that needs labels in every training: some distillations do without those of the train split."""


class ImageOutcome(NamedTuple):
    """The outcome for one image file: its sample, or None and the reason among the problems."""

    sample: Sample | None
    problems: list[Problem]


def index_dataset(
    config: DataConfig,
    splits: Iterable[str] = USED,
    *,
    labelled: Collection[str] | None = None,
) -> Dataset:
    """Index `splits`; an image in two splits is decoded once.

    Bad rows and bad images are left out and reported. Raises InputError when a split is absent, when none of its images
    can be used, or when none of them has a label and the split is one of `labelled`; None means all.
    """
    splits = tuple(splits)
    absent = next((split for split in splits if split not in config.splits), None)
    if absent is not None:
        raise InputError(f"{config.path}: no {absent} split", f"It has {', '.join(config.splits)}")
    indices = index_images(config, splits)
    for split, index in indices.items():
        if not index.samples:
            raise InputError(
                f"{config.path}: {split}: none of {len(config.splits[split])} images can be used; "
                f"first: {index.problems[0]}"
            )
        if labelled is None or split in labelled:
            require_labels(split, index, config.path, config.root)
    return Dataset(config.path, config.root, config.names, config.notices, indices)


def require_labels(split: str, index: SplitIndex, path: Path, root: Path) -> None:
    """Raises InputError when no image of the split has a label; `path` is data.yaml."""
    if not index.boxes:
        raise InputError(f"{path}: {split}: {NO_LABELS}", where_labels_are(index, root))


def where_labels_are(index: SplitIndex, root: Path) -> str:
    """Why no label of `index` was read, in one line: files beside the images, wrong rows, or no files at all."""
    stray = next(stray_labels(index), None)
    if stray:
        return f"Move {key_of(stray.image.with_suffix('.txt'), root)} and its like to {_label_folder(stray, root)}"
    if index.problems:
        return f"First of {len(index.problems)} problems: {index.problems[0]}"
    return f"Labels of {index.samples[0].key} are looked for in {_label_folder(index.samples[0], root)}"


def stray_labels(index: SplitIndex) -> Iterator[Sample]:
    """Images without labels that have a label file beside them, where it is not looked for."""
    for sample in index.samples:
        beside = sample.image.with_suffix(".txt")
        if not len(sample.labels) and beside != label_path(sample.image) and beside.is_file():
            yield sample


def _label_folder(sample: Sample, root: Path) -> str:
    return key_of(label_path(sample.image).parent, root)


def index_images(config: DataConfig, splits: Sequence[str]) -> Mapping[str, SplitIndex]:
    """Split -> index, made by a thread on each core; a split without a usable image is no error here."""
    images = sorted({image for split in splits for image in config.splits[split]})
    with ThreadPoolExecutor(usable_cores()) as pool:
        found = dict(zip(images, pool.map(lambda image: index_image(image, config), images), strict=True))
    return {split: _split_index(found[image] for image in config.splits[split]) for split in splits}


def _split_index(found: Iterable[ImageOutcome]) -> SplitIndex:
    found = tuple(found)
    samples = tuple(one.sample for one in found if one.sample is not None)
    return SplitIndex(samples, tuple(problem for one in found for problem in one.problems))


def index_image(image: Path, config: DataConfig) -> ImageOutcome:
    """Decode one image file and read its labels."""
    try:
        data = read_bytes(image)
        size_hw = decoded_size_hw(data, image)
    except InputError as error:
        return ImageOutcome(None, [image_problem(image, error)])
    labels_file = label_path(image)
    labels, rows = read_labels(labels_file, len(config.names), config.keypoint_values)
    labels.setflags(write=False)
    sample = Sample(image, key_of(image, config.root), labels, size_hw, hashlib.sha256(data).hexdigest())
    return ImageOutcome(sample, [Problem(labels_file, *row) for row in rows])


def decoded_size_hw(data: bytes, origin: Path) -> tuple[int, int]:
    """(height, width) in pixels of the decoded image. Raises InputError as `usable_image` does."""
    height, width = usable_image(data, origin).shape[:2]
    return height, width


def usable_image(data: bytes, origin: Path) -> Image:
    """The decoded image, uint8 BGR (H, W, 3).

    Raises InputError when `data` cannot be decoded or has fewer than `MIN_SIDE` pixels on a side.
    """
    image = decode_image(data, origin)
    height, width = image.shape[:2]
    if min(height, width) < MIN_SIDE:
        raise InputError(f"{origin}: {width}x{height} pixels, expected at least {MIN_SIDE} on each side")
    return image


def image_problem(image: Path, error: InputError) -> Problem:
    """The problem of an image file that cannot be used, without its path, which the problem names itself."""
    return Problem(image, 0, error.message.removeprefix(f"{image}: "))


def quick_digest(config: DataConfig) -> str:
    """sha256 over data.yaml's content, every label file, and every image's key, size and time of change.

    It opens no image, so it is a fast check whether a data set must be indexed again; `Dataset.sha256` covers content.
    """
    digest = hashlib.sha256(repr((config.names, config.keypoint_values, config.notices)).encode())
    for split, images in sorted(config.splits.items()):
        for image in images:
            digest.update(repr((split, key_of(image, config.root), *file_state(image))).encode())
            digest.update(_bytes_of(label_path(image)))
    return digest.hexdigest()


def file_state(file: Path) -> tuple[int, int]:
    """Size in bytes and time of change in nanoseconds; zeros if the file is absent."""
    try:
        status = file.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


def _bytes_of(labels: Path) -> bytes:
    try:
        return labels.read_bytes()
    except OSError:
        return b"background"
