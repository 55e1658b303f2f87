"""In: a `DataConfig`. Out: the contents of the data and its faults. Every image is decoded, none is changed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.data.dataset import Sample, SplitIndex, all_labels, key_of
from compress.data.dataset_yaml import DataConfig
from compress.data.index import NO_LABELS, index_images, stray_labels, where_labels_are
from compress.data.labels import label_path

SHOWN = 20
"""Most problems of one kind in the text report; the JSON has all of them."""
SMALL_SIDE_PX = 3.0
EDGE_TOLERANCE = 0.005
FEW_BOXES = 10


@dataclass(frozen=True)
class SplitReport:
    """One split. Sizes are "width x height" -> images; `box_side_px` is the square root of the area in pixels."""

    images: int
    usable: int
    background: int
    boxes: int
    boxes_per_class: dict[str, int]
    images_per_class: dict[str, int]
    boxes_per_image: dict[str, float]
    image_sizes: dict[str, int]
    box_side_px: dict[str, float]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class CheckReport:
    """`leaks` are groups of identical files that are in more than one split, `duplicates` those within one.

    `unlabelled` names the splits without a single label, and where their labels may be.
    """

    data: str
    names: tuple[str, ...]
    splits: dict[str, SplitReport]
    leaks: tuple[tuple[str, ...], ...]
    duplicates: tuple[tuple[str, ...], ...]
    unlabelled: tuple[str, ...]
    unusual: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True if nothing had to be skipped, every split has labels and no image is in two splits."""
        return not self.leaks and not self.unlabelled and not any(split.problems for split in self.splits.values())

    @property
    def verdict(self) -> str:
        """The numbers of faults, in one line."""
        problems = sum(len(split.problems) for split in self.splits.values())
        return (
            f"{problems} bad images or label rows, {len(self.leaks)} images in more than one split, "
            f"{len(self.unlabelled)} splits without labels"
        )

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": 1, "ok": self.ok, **asdict(self)}

    def to_text(self) -> str:
        lines = [f"{self.data}: {len(self.names)} classes ({', '.join(self.names[:SHOWN])})"]
        for name, split in self.splits.items():
            lines += [f"{name}: {_summary(split)}", *_listed("problem", split.problems)]
        lines += _listed("no labels", self.unlabelled)
        lines += _listed("image in several splits", [" = ".join(group) for group in self.leaks])
        lines += _listed("repeated image", [" = ".join(group) for group in self.duplicates])
        lines += _listed("unusual", self.unusual)
        return "\n".join([*lines, self._ending])

    @property
    def _ending(self) -> str:
        if self.ok:
            return "nothing is wrong"
        if any(split.problems for split in self.splits.values()):
            return "the images and rows that are named as problems are left out of a training"
        return "nothing is left out of a training, but figures from these splits would mislead"


def check(config: DataConfig) -> CheckReport:
    """Read every label and every pixel of every split."""
    indices = index_images(config, tuple(config.splits))
    leaks, duplicates = _identical_files(indices)
    return CheckReport(
        data=str(config.path),
        names=config.names,
        splits={split: _split_report(config, split, index) for split, index in indices.items()},
        leaks=leaks,
        duplicates=duplicates,
        unlabelled=tuple(_unlabelled(config, indices)),
        unusual=tuple(_unusual(config, indices)),
    )


def _unlabelled(config: DataConfig, indices: Mapping[str, SplitIndex]) -> Iterable[str]:
    for split, index in indices.items():
        if index.samples and not index.boxes:
            yield f"{split}: {NO_LABELS} ({where_labels_are(index, config.root)})"


def _split_report(config: DataConfig, split: str, index: SplitIndex) -> SplitReport:
    counts = [len(sample.labels) for sample in index.samples]
    sizes = Counter(f"{sample.size_hw[1]}x{sample.size_hw[0]}" for sample in index.samples)
    per_image = Counter(int(c) for sample in index.samples for c in np.unique(sample.labels[:, 0]))
    return SplitReport(
        images=len(config.splits[split]),
        usable=len(index.samples),
        background=index.background,
        boxes=index.boxes,
        boxes_per_class=_per_class(config, Counter(all_labels(index.samples)[:, 0].astype(int).tolist())),
        images_per_class=_per_class(config, per_image),
        boxes_per_image=_spread(np.array(counts, np.float64)),
        image_sizes=dict(sizes.most_common()),
        box_side_px=_spread(np.sqrt(_sides_px(index.samples).prod(1))),
        problems=tuple(map(str, index.problems)),
    )


def _per_class(config: DataConfig, counts: Mapping[int, int]) -> dict[str, int]:
    return {name: counts.get(class_id, 0) for class_id, name in enumerate(config.names)}


def _spread(values: NDArray[np.float64]) -> dict[str, float]:
    if not len(values):
        return {}
    figures = {"min": values.min(), "median": np.median(values), "mean": values.mean(), "max": values.max()}
    return {key: round(float(value), 3) for key, value in figures.items()}


def _sides_px(samples: Sequence[Sample]) -> NDArray[np.float64]:
    """(n, 2) width and height of every box in pixels."""
    rows = [sample.labels[:, 3:5].astype(np.float64) * sample.size_hw[::-1] for sample in samples]
    return np.concatenate([np.zeros((0, 2)), *rows])


Groups = tuple[tuple[str, ...], ...]


def _identical_files(indices: Mapping[str, SplitIndex]) -> tuple[Groups, Groups]:
    """Keys of usable files with equal bytes: those that are in several splits, and those within one."""
    places: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for split, index in indices.items():
        for sample in index.samples:
            places[sample.sha256].add((split, sample.key))
    shared = [group for group in places.values() if _splits_of(group) > 1]
    repeated = [group for group in places.values() if len(group) > 1 and _splits_of(group) == 1]
    return _keys(shared), _keys(repeated)


def _splits_of(group: set[tuple[str, str]]) -> int:
    return len({split for split, _ in group})


def _keys(groups: Iterable[set[tuple[str, str]]]) -> Groups:
    return tuple(tuple(sorted({key for _, key in group})) for group in groups)


def _unusual(config: DataConfig, indices: Mapping[str, SplitIndex]) -> Iterable[str]:
    """Findings that are allowed but often a mistake."""
    yield from config.notices
    yield from _class_balance(config, indices)
    for split, index in indices.items():
        yield from _odd_boxes(split, index)
        yield from _shared_labels(split, index)
        yield from _orphans(config, split)


def _class_balance(config: DataConfig, indices: Mapping[str, SplitIndex]) -> Iterable[str]:
    counts = {split: Counter(all_labels(index.samples)[:, 0].astype(int).tolist()) for split, index in indices.items()}
    for class_id, name in enumerate(config.names):
        train, val = (counts[split][class_id] for split in ("train", "val"))
        if val and not train:
            yield f"class {name} has {val} boxes in val and none in train"
        elif not train:
            yield f"class {name} has no boxes in train"
        elif train < FEW_BOXES:
            yield f"class {name} has only {train} boxes in train"


def _odd_boxes(split: str, index: SplitIndex) -> Iterable[str]:
    labels, sides = all_labels(index.samples), _sides_px(index.samples)
    corners = np.concatenate([labels[:, 1:3] - labels[:, 3:5] / 2, 1 - labels[:, 1:3] - labels[:, 3:5] / 2], axis=1)
    counts = {
        f"boxes with a side under {SMALL_SIDE_PX:g} px": int((sides < SMALL_SIDE_PX).any(1).sum()),
        "boxes that reach beyond the image": int((corners < -EDGE_TOLERANCE).any(1).sum()),
        "boxes that fill the whole image": int((labels[:, 3:5] > 0.99).all(1).sum()),
        "label files that are beside their image in images/ and are not read": sum(1 for _ in stray_labels(index)),
    }
    yield from (f"{split}: {count} {what}" for what, count in counts.items() if count)
    if index.boxes and index.background * 2 > len(index.samples):
        images = f"{index.background} of {len(index.samples)} images"
        yield f"{split}: {images} have no labels; labels are looked for in labels/"


def _shared_labels(split: str, index: SplitIndex) -> Iterable[str]:
    """Images that differ in nothing but the suffix read one label file."""
    files: dict[Path, list[str]] = defaultdict(list)
    for sample in index.samples:
        files[label_path(sample.image)].append(sample.key)
    shared = [keys for keys in files.values() if len(keys) > 1]
    if shared:
        yield f"{split}: {len(shared)} label files belong to several images, first {' and '.join(shared[0])}"


def _orphans(config: DataConfig, split: str) -> Iterable[str]:
    """Label files that belong to no image of the split's folders."""
    expected = {label_path(image) for group in config.splits.values() for image in group}
    folders = {label_path(image).parent for image in config.splits[split]}
    found = {file for folder in folders if folder.is_dir() for file in folder.glob("*.txt")}
    orphans = sorted(found - expected - {file for file in found if file.name == "classes.txt"})
    if orphans:
        yield f"{split}: {len(orphans)} label files without an image, first {key_of(orphans[0], config.root)}"


def _summary(split: SplitReport) -> str:
    classes = ", ".join(f"{name} {count}" for name, count in split.boxes_per_class.items() if count)
    sizes = ", ".join(f"{size} ({count})" for size, count in list(split.image_sizes.items())[:3])
    per_image = split.boxes_per_image.get("mean", 0)
    return (
        f"{split.usable} of {split.images} images usable, {split.background} without objects, {split.boxes} boxes "
        f"({per_image:.1f} per image): {classes}; sizes {sizes}"
    )


def _listed(kind: str, lines: Sequence[str]) -> list[str]:
    more = [f"  {len(lines) - SHOWN} more; --json lists all"] if len(lines) > SHOWN else []
    return [f"  {kind}: {line}" for line in lines[:SHOWN]] + more
