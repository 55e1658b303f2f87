"""In: the text of one YOLO label file. Out: its boxes, and every row that was skipped, with its line."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_LABEL_BYTES = 16 << 20
POLYGON = "a polygon (class x1 y1 x2 y2 x3 y3 ...)"
ROUNDING = 1e-6
"""Coordinates may be outside 0..1 by this much: the last digit that most tools write."""


class RowProblem(NamedTuple):
    """Why one row of a label file was skipped; `line` counts from 1, 0 means the whole file."""

    line: int
    what: str


Row = tuple[float, float, float, float, float]


def label_path(image: Path) -> Path:
    """The label file of an image: the last `images` folder becomes `labels`, the suffix `.txt`."""
    parts = list((image.parent / f"{image.stem}.txt").parts)
    folders = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if folders:
        parts[folders[-1]] = "labels"
    return Path(*parts)


def read_labels(path: Path, nc: int, keypoint_values: int = 0) -> tuple[NDArray[np.float32], list[RowProblem]]:
    """`parse_labels` of a file; a file that is not there is an image without objects."""
    try:
        if path.stat().st_size > MAX_LABEL_BYTES:
            return _no_boxes(), [RowProblem(0, f"{path.stat().st_size} bytes, expected at most {MAX_LABEL_BYTES}")]
        text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        return _no_boxes(), []
    except OSError as error:
        return _no_boxes(), [RowProblem(0, f"cannot be read ({error.strerror})")]
    return parse_labels(lines_of(text), nc, keypoint_values)


def lines_of(text: str) -> list[str]:
    """Lines of a text; only LF, CR LF and CR end a line."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def parse_labels(
    lines: Iterable[str], nc: int, keypoint_values: int = 0
) -> tuple[NDArray[np.float32], list[RowProblem]]:
    """Rows `class cx cy w h` or polygons `class x1 y1 x2 y2 x3 y3 ...`, coordinates normalised to 0..1.

    With `keypoint_values` there are no polygons: that many values may follow a box, and are not read.

    Returns labels (n, 5) float32 [class, cx, cy, w, h] in file order, polygons as their bounding boxes, and one
    problem per row that was skipped: wrong, or the repetition of an earlier row.
    """
    rows: dict[Row, None] = {}
    problems: list[RowProblem] = []
    for number, line in enumerate(lines, 1):
        fields = line.split()
        if not fields:
            continue
        row = _parse_row(fields, nc, keypoint_values)
        if isinstance(row, tuple) and row in rows:
            row = "repeats an earlier row"
        if isinstance(row, str):
            problems.append(RowProblem(number, row))
        else:
            rows[row] = None
    return np.array(list(rows), np.float32).reshape(-1, 5), problems


def _no_boxes() -> NDArray[np.float32]:
    return np.zeros((0, 5), np.float32)


def _parse_row(fields: list[str], nc: int, keypoint_values: int) -> Row | str:
    """The box of one row, or what is wrong with it."""
    if keypoint_values and len(fields) == 5 + keypoint_values:
        fields = fields[:5]
    is_polygon = not keypoint_values and len(fields) >= 7 and len(fields) % 2 == 1
    if len(fields) != 5 and not is_polygon:
        other = f"{5 + keypoint_values} (key points behind it)" if keypoint_values else POLYGON
        return f"{len(fields)} columns, expected 5 (class cx cy w h) or {other}"
    try:
        class_id, *values = (float(field) for field in fields)
    except ValueError:
        return f"{_short(fields)} is not all numbers"
    return _wrong_class(class_id, nc) or _wrong_values(values) or _box(class_id, values, is_polygon)


def _wrong_class(class_id: float, nc: int) -> str:
    if not math.isfinite(class_id) or class_id != int(class_id):
        return f"class {class_id:g} is not a whole number"
    return "" if 0 <= class_id < nc else f"class {class_id:g}, expected 0 to {nc - 1}"


def _wrong_values(values: list[float]) -> str:
    wrong = next((value for value in values if not -ROUNDING <= value <= 1 + ROUNDING), None)  # NaN compares false
    return "" if wrong is None else f"coordinate {wrong:g}, expected 0 to 1 (divided by the image's width and height)"


def _box(class_id: float, values: list[float], is_polygon: bool) -> Row | str:
    cx, cy, w, h = _hull(values) if is_polygon else values
    if w <= 0 or h <= 0:
        return f"a box of width {w:g} and height {h:g}, expected more than 0"
    return class_id, cx, cy, w, h


def _hull(values: list[float]) -> tuple[float, float, float, float]:
    xs, ys = values[0::2], values[1::2]
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    return (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0


def _short(fields: list[str]) -> str:
    return ascii(" ".join(fields)[:40])
