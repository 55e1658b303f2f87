"""A data set as all stages after the indexing use it, and its file `index.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.files import atomic_write, read_json

INDEX = "index.json"
"""The usual name of the file that `Dataset.save` writes."""
SCHEMA_VERSION = 1
SHOWN_PROBLEMS = 5
FLOAT32_DIGITS = ".9g"
"""Nine digits restore a float32 exactly, also when they are read as float64 first."""


class Problem(NamedTuple):
    """Something in the user's data that was skipped; `line` is 0 if the whole file is meant."""

    path: Path
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}" if self.line else f"{self.path}: {self.what}"


@dataclass(frozen=True, eq=False)
class Sample:
    """One usable image.

    `key` is its path relative to the data set's root, with slashes: the name by which it is known everywhere.
    `labels` are (n, 5) float32 [class, cx, cy, w, h] normalised, `size_hw` is (height, width) as decoded (turned by
    EXIF), `sha256` is the hex digest of the file's bytes.
    """

    image: Path
    key: str
    labels: NDArray[np.float32]
    size_hw: tuple[int, int]
    sha256: str


@dataclass(frozen=True)
class SplitIndex:
    """The usable images of one split in the order of their paths, and the problems found in it."""

    samples: tuple[Sample, ...]
    problems: tuple[Problem, ...]

    @property
    def boxes(self) -> int:
        return sum(len(sample.labels) for sample in self.samples)

    @cached_property
    def sha256(self) -> str:
        """Hex digest of keys, image bytes and labels. It does not depend on times or absolute paths."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(json.dumps([sample.key, sample.sha256, len(sample.labels)]).encode())
            digest.update(sample.labels.astype("<f4").tobytes())
        return digest.hexdigest()

    def problem_lines(self, name: str) -> Iterator[str]:
        """A line for each of the first problems, and one that counts the others. `name` is that of the images."""
        for problem in self.problems[:SHOWN_PROBLEMS]:
            yield f"{name}: skipped {problem}"
        if len(self.problems) > SHOWN_PROBLEMS:
            yield f"{name}: {len(self.problems) - SHOWN_PROBLEMS} more problems"

    def count_in(self, other: SplitIndex) -> int:
        """The number of images whose bytes are those of an image of `other`."""
        others = {sample.sha256 for sample in other.samples}
        return sum(sample.sha256 in others for sample in self.samples)

    @property
    def background(self) -> int:
        """The number of images without labels."""
        return sum(not len(sample.labels) for sample in self.samples)


@dataclass(frozen=True)
class Dataset:
    """An indexed data set: `path` is its data.yaml, `root` the folder that keys start from."""

    path: Path
    root: Path
    names: tuple[str, ...]
    notices: tuple[str, ...]
    splits: Mapping[str, SplitIndex]

    @cached_property
    def sha256(self) -> str:
        """Hex digest of what was indexed: the names and every split."""
        splits = [(split, index.sha256) for split, index in sorted(self.splits.items())]
        return hashlib.sha256(json.dumps([self.names, splits]).encode()).hexdigest()

    def save(self, file: Path) -> None:
        """Write `index.json`: one line per image, keys instead of absolute paths.

        Raises EdgestillError when the file cannot be written.
        """
        head = {"schema_version": SCHEMA_VERSION, "path": key_of(self.path, self.root)}
        head |= {"names": self.names, "notices": self.notices}
        splits = ",\n".join(f"{_compact(split)}: {split_to_json(i, self.root)}" for split, i in self.splits.items())
        with atomic_write(file) as temporary:
            temporary.write_text(f'{_compact(head)[:-1]},\n"splits": {{\n{splits}\n}}}}\n', encoding="ascii")

    @classmethod
    def load(cls, file: Path, root: Path) -> Dataset:
        """The data set that `save` wrote, its labels bit for bit; its images are below `root`.

        Raises InputError when the file is missing or is no index. Images are not opened.
        """
        root = root.resolve()
        hint = "Run the data stage again"
        raw = read_json(file, hint)
        try:
            if raw["schema_version"] != SCHEMA_VERSION:
                raise InputError(f"{file}: schema {raw['schema_version']}, expected {SCHEMA_VERSION}", hint)
            splits = {split: split_from_json(content, root) for split, content in raw["splits"].items()}
            return cls(path_of(raw["path"], root), root, tuple(raw["names"]), tuple(raw["notices"]), splits)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: not an index of images ({error!r})", hint) from error


def key_of(path: Path, root: Path) -> str:
    """`path` relative to the absolute folder `root`, with slashes; files outside start with `../`.

    A file on another drive of Windows keeps its whole path.
    """
    try:
        return Path(os.path.relpath(path, root)).as_posix()
    except ValueError:
        return path.as_posix()


def path_of(key: str, root: Path) -> Path:
    """The path of the file with this key: the reverse of `key_of`, if `root` has no links in it."""
    return Path(os.path.normpath(root / key))


def all_labels(samples: Iterable[Sample]) -> NDArray[np.float32]:
    """Labels of all samples, one after another, (n, 5) float32."""
    return np.concatenate([np.zeros((0, 5), np.float32), *(sample.labels for sample in samples)])


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)  # ASCII: a file name may be no valid UTF-8


def split_to_json(index: SplitIndex, root: Path) -> str:
    """The index as JSON text, one line an image, keys relative to the folder `root`."""
    images = ",\n".join(
        _compact([sample.key, sample.size_hw, sample.sha256, _rows(sample.labels)]) for sample in index.samples
    )
    problems = ",\n".join(_compact([key_of(path, root), line, what]) for path, line, what in index.problems)
    return f'{{"images": [\n{images}\n],\n"problems": [\n{problems}\n]}}'


def _rows(labels: NDArray[np.float32]) -> list[list[float]]:
    return [[float(format(value, FLOAT32_DIGITS)) for value in row] for row in labels.tolist()]


def split_from_json(content: Mapping[str, Any], root: Path) -> SplitIndex:
    """The reverse of `split_to_json`. Raises KeyError, TypeError or ValueError when `content` is no index."""
    samples = tuple(_sample(root, *entry) for entry in content["images"])
    problems = tuple(Problem(path_of(key, root), int(line), str(what)) for key, line, what in content["problems"])
    return SplitIndex(samples, problems)


def _sample(root: Path, key: str, size_hw: list[int], sha256: str, rows: list[list[float]]) -> Sample:
    height, width = size_hw
    labels = np.array(rows, np.float32).reshape(-1, 5)
    labels.setflags(write=False)
    return Sample(path_of(key, root), key, labels, (int(height), int(width)), sha256)
