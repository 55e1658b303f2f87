"""In: a data.yaml as people write it. Out: `DataConfig`, the image files of each split and the class names.

The file is read as data: every value is text, tags are refused, nothing is downloaded or run.
"""

from __future__ import annotations

import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from compress.data.labels import lines_of
from runtime.errors import InputError, UsageError, one_line
from runtime.image import IMAGE_SUFFIXES
from runtime.sources import image_files

SPLITS = ("train", "val", "test")
MAX_YAML_BYTES = 1 << 20
MAX_LIST_BYTES = 256 << 20


@dataclass(frozen=True)
class DataConfig:
    """The content of a data.yaml: where the images are, and the names of their classes.

    `splits` holds the sorted image files of `train`, `val` and, if the file names one that exists, `test`.
    `keypoint_values` is the number of key point values after the box in a label row (`kpt_shape`); they are not used.
    `notices` says what was left out and why.
    """

    path: Path
    root: Path
    splits: dict[str, tuple[Path, ...]]
    names: tuple[str, ...]
    notices: tuple[str, ...] = ()
    keypoint_values: int = 0


def load_data(path: Path | str) -> DataConfig:
    """Read the data.yaml at `path`.

    Raises InputError for what is missing or damaged, UsageError for a `download` key (nothing is ever fetched).
    """
    path = Path(path)
    raw = _read_mapping(path)
    _refuse_download(path, raw)
    notices: list[str] = []
    try:
        root = _root(path, raw)
        splits = dict(_splits(path, root, raw, notices))
    except (OSError, ValueError) as error:  # a name that is too long or holds a zero byte, a folder without access
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: a path in it cannot be used ({reason})", "Check path, train, val and test") from None
    names, keypoint_values = _names(path, raw, notices), _keypoint_values(path, raw, notices)
    return DataConfig(path.resolve(), root, splits, names, tuple(notices), keypoint_values)


class _TextLoader(yaml.BaseLoader):
    """Every scalar is text (`no`, `on` and `1.0` are names too); tags and repeated keys are refused."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        tag = getattr(event, "tag", None)
        if tag not in (None, "!"):
            raise yaml.YAMLError(f"tag {reprlib.repr(tag)} in line {event.start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        repeated = _first_repeated(str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if repeated is not None:
            raise yaml.YAMLError(f"key {reprlib.repr(repeated)} appears twice")
        return super().construct_mapping(node, deep=deep)


def _read_mapping(path: Path) -> Mapping[str, Any]:
    text = _read_text(path, MAX_YAML_BYTES, what="data.yaml")
    try:
        raw = yaml.load(text, Loader=_TextLoader)  # noqa: S506 - a BaseLoader makes text, lists and mappings only
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not plain YAML ({one_line(error)})", "Remove tags and fix the syntax") from None
    if not isinstance(raw, Mapping):
        raise InputError(f"{path}: holds {_kind(raw)}, expected a mapping with train, val and names")
    return raw


def _read_text(path: Path, limit: int, what: str) -> str:
    if not path.is_file():
        raise InputError(f"{path}: no such file", f"Give the path of a {what}")
    try:
        size = path.stat().st_size
        if size > limit:
            raise InputError(f"{path}: {size} bytes, a {what} has at most {limit}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text", f"Save the {what} as UTF-8") from None


def _refuse_download(path: Path, raw: Mapping[str, Any]) -> None:
    if "download" in raw:
        raise UsageError(
            f"{path}: has a `download` key, and data files are never downloaded or run",
            "Fetch the data yourself and remove the key",
        )


def _root(path: Path, raw: Mapping[str, Any]) -> Path:
    given = raw.get("path", "")
    if not isinstance(given, str):
        raise InputError(f"{path}: path is {_kind(given)}, expected a folder")
    root = (path.resolve().parent / given).resolve()
    if not root.is_dir():
        raise InputError(
            f"{path}: path: {given} is not a folder ({root})",
            "Write it relative to the folder of data.yaml, or absolute",
        )
    return root


def _splits(
    path: Path, root: Path, raw: Mapping[str, Any], notices: list[str]
) -> Iterable[tuple[str, tuple[Path, ...]]]:
    for split in SPLITS:
        places = _places(path, split, raw.get(split, ""))
        if places:
            try:
                yield split, _images(path, root, split, places)
            except InputError as error:
                if split != "test":
                    raise
                notices.append(f"test split left out: {error.message.removeprefix(f'{path}: test: ')}")
        elif split != "test":
            raise InputError(f"{path}: no `{split}` entry", f"Add `{split}: images/{split}` or a list file")


def _places(path: Path, split: str, value: Any) -> list[str]:
    places = value if isinstance(value, list) else [value]
    wrong = next((place for place in places if not isinstance(place, str)), None)
    if wrong is not None:
        raise InputError(f"{path}: {split} holds {_kind(wrong)}, expected folders or list files")
    return [place for place in places if place]


def _images(path: Path, root: Path, split: str, places: Iterable[str]) -> tuple[Path, ...]:
    found = {image for place in places for image in _expand(path, root, split, place)}
    if not found:
        raise InputError(
            f"{path}: {split}: no images in {', '.join(places)}", f"Expected files ending in {' '.join(IMAGE_SUFFIXES)}"
        )
    return tuple(sorted(found))


def _expand(path: Path, root: Path, split: str, place: str) -> list[Path]:
    """Image files of one entry: a folder, searched recursively, or a text file with one path per line."""
    target = without_parents(_locate(root, place))
    if target.is_dir():
        return list(image_files(target))
    if target.suffix.lower() == ".txt" and target.is_file():
        return _listed(root, target)
    if target.exists():
        raise InputError(f"{path}: {split}: {place} is neither a folder nor a .txt list of images")
    raise InputError(f"{path}: {split}: {place} does not exist", f"Paths are relative to {root}, or absolute")


def _locate(root: Path, place: str) -> Path:
    """`place` under `root`; exporters write `../train` for a folder beside data.yaml, so that is tried too."""
    target = root / place
    if not target.exists() and place.startswith("../"):
        within = root / place[3:]
        return within if within.exists() else target
    return target


def _listed(root: Path, list_file: Path) -> list[Path]:
    """Paths of a list file: `./` lines are relative to its folder, other relative ones to the dataset's root."""
    lines = lines_of(_read_text(list_file, MAX_LIST_BYTES, what="list of images"))
    entries = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    return [without_parents((list_file.parent if entry.startswith("./") else root) / entry) for entry in entries]


def without_parents(path: Path) -> Path:
    """The same file without `..` in its path; links behind the last `..` are kept, because labels are beside them."""
    if ".." not in path.parts:
        return path
    end = len(path.parts) - path.parts[::-1].index("..")
    return Path(*path.parts[:end]).resolve().joinpath(*path.parts[end:])


def _names(path: Path, raw: Mapping[str, Any], notices: list[str]) -> tuple[str, ...]:
    """The class names; `class0`, `class1` and so on if only `nc` is given, as YOLOv5 names them."""
    nc = raw.get("nc", "")
    if "names" not in raw and _is_count(nc) and int(nc) > 0:
        notices.append(f"no names: the {nc} classes are called class0 to class{int(nc) - 1}")
        return tuple(f"class{number}" for number in range(int(nc)))
    names = _name_list(path, raw.get("names"))
    wrong = next((name for name in names if not isinstance(name, str) or not name.strip()), None)
    if wrong is not None or not names:
        raise InputError(f"{path}: names has {_kind(wrong)}, expected one non-empty text per class")
    repeated = _first_repeated(names)
    if repeated is not None:
        raise InputError(f"{path}: names has {reprlib.repr(repeated)} twice", "Give every class its own name")
    if nc != "" and nc != str(len(names)):
        raise InputError(f"{path}: nc is {_kind(nc)} but names has {len(names)}", "Correct or remove nc")
    return tuple(names)


def _keypoint_values(path: Path, raw: Mapping[str, Any], notices: list[str]) -> int:
    """Points times values of a point, by `kpt_shape: [points, 2 or 3]`; 0 without that key."""
    shape = raw.get("kpt_shape", "")
    if shape == "":
        return 0
    if not (isinstance(shape, list) and len(shape) == 2 and all(map(_is_count, shape)) and shape[1] in ("2", "3")):
        raise InputError(f"{path}: kpt_shape is {_kind(shape)}, expected [points, 2 or 3]", "Correct or remove it")
    notices.append("key points are not used: boxes alone are read from the labels")
    return int(shape[0]) * int(shape[1])


def _is_count(value: Any) -> bool:
    return isinstance(value, str) and value.isdecimal() and value.isascii() and len(value) <= 4


def _name_list(path: Path, names: Any) -> list[Any]:
    if isinstance(names, list):
        return names
    if not isinstance(names, Mapping):
        raise InputError(f"{path}: names is {_kind(names)}, expected a list or a map of class names")
    expected = [str(i) for i in range(len(names))]
    if set(names) != set(expected):
        wrong = sorted(str(key) for key in set(names) - set(expected))
        raise InputError(
            f"{path}: names has key {reprlib.repr(wrong[0])}, expected whole numbers 0 to {len(names) - 1}",
            "Number the classes from 0 without gaps",
        )
    return [names[key] for key in expected]


def _first_repeated(texts: Iterable[str]) -> str | None:
    return next((text for text, count in Counter(texts).items() if count > 1), None)


def _kind(value: Any) -> str:
    """A value of the file in words, never its whole text (aliases can make that endless)."""
    kinds = {list: "a list", dict: "a mapping", type(None): "nothing"}
    return kinds.get(type(value), reprlib.repr(value)) if value != "" else "nothing"
