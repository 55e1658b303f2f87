"""In: COCO JSON or VOC XML, and the folder of their images. Out: a new YOLO dataset with copies of the images.

Boxes are checked against the real size of each image; what cannot be used is skipped, counted and named.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import numpy as np

from benchmarks.accuracy import is_box, is_whole, read_coco
from compress.data.dataset import Problem
from compress.data.index import decoded_size_hw, image_problem
from compress.data.labels import label_path
from compress.data.writing import VAL_EVERY, label_text, new_folder, split_of, write_data_yaml
from runtime.errors import InputError
from runtime.image import IMAGE_SUFFIXES, read_bytes

SHOWN = 20
"""Most problems in the summary; `Converted.problems` has all."""
MAX_XML_BYTES = 4 << 20

Box = tuple[int, float, float, float, float]
"""class, x1, y1, x2, y2 in pixels."""


class AnnotatedImage(NamedTuple):
    """One image of the source: its path below the image folder, its stated (height, width), and its boxes."""

    file_name: str
    size_hw: tuple[int, int] | None
    boxes: list[Box]


@dataclass(frozen=True)
class Converted:
    """Figures of a conversion, and its problems. `skipped` counts crowd regions and objects marked difficult."""

    data_yaml: Path
    images: int
    boxes: int
    skipped: int
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        lines = [
            f"wrote {self.data_yaml}: {self.images} images, {self.boxes} boxes, "
            f"every {VAL_EVERY}th for validation; {self.skipped} crowd or difficult objects skipped, "
            f"{len(self.problems)} problems",
            *map(str, self.problems[:SHOWN]),
        ]
        return "\n".join(lines)


def coco(annotations: Path | str, images: Path | str, out: Path | str) -> Converted:
    """Convert a COCO instances JSON. Categories become classes in the order of their ids; crowds are skipped.

    Raises InputError for a file that is not COCO JSON and for image names that leave the image folder.
    """
    path = Path(annotations)
    content = read_coco(path)
    problems: list[Problem] = []
    classes, names = _coco_classes(path, content, problems)
    by_id: dict[int, AnnotatedImage] = {}
    for image in content["images"]:
        file_name, size_hw = _coco_image(path, image)
        if by_id.setdefault(image["id"], AnnotatedImage(file_name, size_hw, [])).file_name != file_name:
            raise InputError(f"{path}: image id {image['id']} stands for two files", "Give every image its own id")
    skipped = 0
    for number, annotation in enumerate(content["annotations"], 1):
        if annotation.get("iscrowd") == 1:
            skipped += 1
            continue
        box = _coco_box(annotation, by_id, classes)
        if isinstance(box, str):
            problems.append(Problem(path, 0, f"annotation {number}: {box}"))
        else:
            by_id[annotation["image_id"]].boxes.append(box)
    return _write(list(by_id.values()), names, Path(images), Path(out), skipped, problems)


def voc(annotations: Path | str, images: Path | str, out: Path | str) -> Converted:
    """Convert a folder of VOC XML files. Names become classes in alphabetical order; difficult objects are skipped.

    Raises InputError when a file declares a document type (entities are never expanded) and for image names that
    leave the image folder.
    """
    folder = Path(annotations)
    files = sorted(folder.glob("*.xml"))
    if not files:
        raise InputError(f"{folder}: no .xml files", "Give the folder of the VOC annotations")
    problems: list[Problem] = []
    roots = {path: root for path in files if (root := _read_xml(path, problems)) is not None}
    objects = {path: list(_voc_objects(path, root, problems)) for path, root in roots.items()}
    names = sorted({name for found in objects.values() for name, _ in found})
    if not names:
        raise InputError(f"{folder}: no objects in {len(files)} .xml files", str(problems[0]) if problems else "")
    annotated = [
        AnnotatedImage(_voc_file_name(path, roots[path], Path(images)), None, _classed(found, names))
        for path, found in objects.items()
    ]
    skipped = sum(_is_difficult(item) for root in roots.values() for item in root.iter("object"))
    return _write(annotated, names, Path(images), Path(out), skipped, problems)


# --- COCO ------------------------------------------------------------------------------------------------------------


def _coco_classes(path: Path, content: Mapping[str, Any], problems: list[Problem]) -> tuple[dict[int, int], list[str]]:
    """Category id -> class index, and the class names.

    A category that only groups others, such as an exporter's root, does not become a class, and is reported.
    """
    names = {entry.get("id"): entry.get("name") for entry in content["categories"]}
    if not names or not all(is_whole(key) and isinstance(name, str) and name for key, name in names.items()):
        raise InputError(f"{path}: categories need a whole-number id and a name each")
    for key in _grouping_categories(content):
        problems.append(Problem(path, 0, f"category {names.pop(key)!r} groups others and has no boxes: no class"))
    if len(set(names.values())) < len(names):
        raise InputError(f"{path}: two categories have one name", "Give every class its own name")
    ordered = sorted(names)  # type: ignore[type-var]
    return {key: index for index, key in enumerate(ordered)}, [names[key] for key in ordered]  # type: ignore[misc]


def _grouping_categories(content: Mapping[str, Any]) -> set[int]:
    """Ids of the categories that another one names as its supercategory and that no annotation has."""
    categories = content["categories"]
    below = [(entry["id"], entry.get("supercategory")) for entry in categories]
    annotated = (annotation.get("category_id") for annotation in content["annotations"])
    used = {category_id for category_id in annotated if is_whole(category_id)}
    return {
        entry["id"]
        for entry in categories
        if entry["id"] not in used and any(key != entry["id"] and above == entry["name"] for key, above in below)
    }


def _coco_image(path: Path, image: Mapping[str, Any]) -> tuple[str, tuple[int, int] | None]:
    name, size_hw = image.get("file_name"), (image.get("height"), image.get("width"))
    if not isinstance(name, str) or not is_whole(image.get("id")):
        raise InputError(f"{path}: an image without whole-number id or file_name", "Expected COCO instances JSON")
    return name, size_hw if all(is_whole(side) for side in size_hw) else None  # type: ignore[return-value]


def _coco_box(
    annotation: Mapping[str, Any], by_id: Mapping[int, AnnotatedImage], classes: Mapping[int, int]
) -> Box | str:
    """The box of an annotation, or what is wrong with it."""
    image_id, category_id, box = (annotation.get(key) for key in ("image_id", "category_id", "bbox"))
    if not is_whole(image_id) or image_id not in by_id:
        return f"image_id {image_id!r:.40} is not among the images"
    if category_id is None or not is_whole(category_id) or category_id not in classes:
        return f"category_id {category_id!r:.40} is not among the categories"
    if not is_box(box):
        return f"bbox {box!r:.60} is not four numbers"
    x, y, width, height = map(float, box)
    return classes[category_id], x, y, x + width, y + height


# --- VOC -------------------------------------------------------------------------------------------------------------


def _read_xml(path: Path, problems: list[Problem]) -> Element | None:
    """The root of a small XML file; None and a problem if it is damaged."""
    try:
        if path.stat().st_size > MAX_XML_BYTES:
            problems.append(Problem(path, 0, f"{path.stat().st_size} bytes, expected at most {MAX_XML_BYTES}"))
            return None
        return parse_xml(path.read_bytes(), origin=str(path))
    except (OSError, expat.ExpatError, ValueError, RecursionError) as error:
        problems.append(Problem(path, 0, f"not XML ({error})"))
        return None


def parse_xml(data: bytes, origin: str) -> Element:
    """An element tree without entities: a document type declaration, the only place for them, is an InputError."""

    def refuse(*_: Any) -> None:
        raise InputError(f"{origin}: has a DOCTYPE, and entities are not accepted", "Remove the DOCTYPE")

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = lambda tag, attributes: builder.start(tag, attributes)
    parser.EndElementHandler = lambda tag: builder.end(tag)
    parser.CharacterDataHandler = builder.data
    parser.Parse(data, True)
    return builder.close()


Named = tuple[str, tuple[float, float, float, float]]


def _voc_objects(path: Path, root: Element, problems: list[Problem]) -> Iterable[Named]:
    """(name, box in pixels) of each object that is not difficult."""
    for number, item in enumerate(root.iter("object"), 1):
        if _is_difficult(item):
            continue
        name, sides = (item.findtext("name") or "").strip(), _voc_sides(item)
        if name and sides:
            yield name, sides
        else:
            problems.append(Problem(path, 0, f"object {number}: needs a name and xmin, ymin, xmax, ymax"))


def _voc_sides(item: Element) -> tuple[float, float, float, float] | None:
    """x1 y1 x2 y2: VOC counts pixels from 1 and includes the last one."""
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}") or "nan") for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        return None
    return (x1 - 1, y1 - 1, x2, y2) if all(map(math.isfinite, (x1, y1, x2, y2))) else None


def _is_difficult(item: Element) -> bool:
    return (item.findtext("difficult") or "").strip() == "1"


def _voc_file_name(path: Path, root: Element, images: Path) -> str:
    """The stated file name; if no such file is there, an image named like the XML file."""
    stated = (root.findtext("filename") or "").strip()
    if stated and (images / safe_relative(stated, origin=path)).is_file():
        return stated
    beside = (images / f"{path.stem}{suffix}" for suffix in IMAGE_SUFFIXES)
    return next((image.name for image in beside if image.is_file()), stated or path.stem)


def _classed(found: Sequence[Named], names: Sequence[str]) -> list[Box]:
    return [(names.index(name), *sides) for name, sides in found]


# --- writing ---------------------------------------------------------------------------------------------------------


def safe_relative(name: str, origin: Path) -> PurePosixPath:
    """`name` as a path that stays below the folder it is joined to. Raises InputError when it would leave it."""
    relative = PurePosixPath(name.replace("\\", "/"))
    if not relative.parts or relative.is_absolute() or ".." in relative.parts or ":" in name or "\0" in name:
        raise InputError(f"{origin}: image name {ascii(name)[:80]} leaves the image folder", "Use plain relative names")
    return relative


class Usable(NamedTuple):
    """One image that can be copied: its path below the image folder, its size, and its boxes, clipped to it."""

    relative: PurePosixPath
    size_hw: tuple[int, int]
    boxes: np.ndarray


def _write(
    annotated: list[AnnotatedImage],
    names: Sequence[str],
    images: Path,
    out: Path,
    skipped: int,
    problems: list[Problem],
) -> Converted:
    if not images.is_dir():
        raise InputError(f"{images}: no such folder", "Give the folder of the images")
    annotated = sorted(annotated, key=lambda one: one.file_name)
    relatives = [safe_relative(one.file_name, origin=images) for one in annotated]
    with new_folder(out) as folder:
        usable = _usable(zip(annotated, relatives, strict=True), images, problems)
        if not usable:
            raise InputError(f"{images}: none of {len(annotated)} images can be used", _first(problems))
        for index, one in enumerate(usable):
            _copy(images / one.relative, folder / "images" / split_of(index, len(usable)) / one.relative, one)
        write_data_yaml(folder, names)
    boxes = sum(len(one.boxes) for one in usable)
    return Converted(out / "data.yaml", len(usable), boxes, skipped, tuple(problems))


def _usable(
    named: Iterable[tuple[AnnotatedImage, PurePosixPath]], images: Path, problems: list[Problem]
) -> list[Usable]:
    """The images that can be used. The splits are made of these, so that both have some."""
    found: dict[PurePosixPath, Usable] = {}
    for one, relative in named:
        source, labels = images / relative, relative.with_suffix("")
        if labels in found:
            problems.append(Problem(source, 0, "shares its label file with another image"))
        elif size_hw := _size_hw(source, one, problems):
            found[labels] = Usable(relative, size_hw, _clipped(one.boxes, size_hw, source, problems))
    return list(found.values())


def _size_hw(source: Path, one: AnnotatedImage, problems: list[Problem]) -> tuple[int, int] | None:
    """(height, width) of a decoded image; None and a problem if it cannot be used."""
    try:
        size_hw = decoded_size_hw(read_bytes(source), source)
    except InputError as error:
        problems.append(image_problem(source, error))
        return None
    if one.size_hw in (None, size_hw):
        return size_hw
    stated, real = one.size_hw[::-1], size_hw[::-1]  # type: ignore[index]
    problems.append(Problem(source, 0, f"is {real[0]}x{real[1]} but annotated as {stated[0]}x{stated[1]}"))
    return None


def _copy(source: Path, target: Path, one: Usable) -> None:
    """Copy one image and write its labels."""
    labels = label_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    labels.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    labels.write_text(label_text(one.boxes, one.size_hw))


def _clipped(boxes: Sequence[Box], size_hw: tuple[int, int], source: Path, problems: list[Problem]) -> np.ndarray:
    """Boxes within the image; those with nothing inside are reported."""
    rows = np.array(boxes, np.float64).reshape(-1, 5)
    rows[:, 1::2] = rows[:, 1::2].clip(0, size_hw[1])
    rows[:, 2::2] = rows[:, 2::2].clip(0, size_hw[0])
    inside = (rows[:, 3] > rows[:, 1]) & (rows[:, 4] > rows[:, 2])
    outside = (box[1:] for box, is_inside in zip(boxes, inside, strict=True) if not is_inside)
    problems.extend(Problem(source, 0, f"box {sides} has no area inside the image") for sides in outside)
    return rows[inside]


def _first(problems: Sequence[Problem]) -> str:
    return f"First: {problems[0]}" if problems else ""
