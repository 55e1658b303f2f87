"""The card of a file that YOLOv5's own export wrote, made from its `names` and `stride` metadata and its shapes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from runtime.backends import Backend, TensorSpec
from runtime.card import Batches, ModelCard
from runtime.errors import InputError

DEFAULT_SIZE = 640
"""Height and width of the input if the file leaves them open."""
CONF, IOU, MAX_DET = 0.25, 0.45, 1000
"""Defaults of YOLOv5's detect."""
MAX_NAMES_CHARS = 1 << 20
WANTED = "expected YOLOv5's float [B, 3, H, W] -> [B, N, 5 + classes]"
STRIDES = (4, 8, 16, 32, 64, 128)
"""A detector has successive ones of these, with 16 among them; YOLOv5's own have 8 to 32, or 8 to 64."""
ANCHORS = ((2, (3,)), (3, range(1, 10)))
"""Least number of levels -> the numbers of anchors to try. With more choices for two levels, grids of small images
have as many rows as files with NMS inside: five anchors at strides 16 and 32 of 64x64 are 100."""


def yolov5_card(path: Path, metadata: Mapping[str, str], backend: Backend) -> ModelCard:
    """The card of the loaded file. If the file leaves the output's shape open, a black image is run to find it.

    Raises InputError when the shapes or the metadata are not those of a YOLOv5 detector: a file with NMS inside has
    [1, N, 6] too, but not one row for each anchor of its grids.
    """
    input_ = backend.input
    size_hw, batch = _size_hw(path, input_), input_.shape[0]
    output = backend.output
    if None in output.shape:
        output = output._replace(shape=backend.run(np.zeros((batch or 1, 3, *size_hw), input_.dtype)).array.shape)
    count = _class_count(path, output)
    _require_grid(path, size_hw, output)
    names = _names(path, metadata.get("names"), count)
    return ModelCard(
        name=path.stem,
        names=names,
        size_hw=size_hw,
        stride=_stride(path, metadata.get("stride", "32")),
        input="tensor",
        output="rows",
        conf=CONF,
        iou=IOU,
        max_det=MAX_DET,
        batches=Batches(batch, batch) if batch else Batches(1, None),
        precision="fp16" if input_.dtype.itemsize == 2 else "fp32",
    )


def _size_hw(path: Path, spec: TensorSpec) -> tuple[int, int]:
    shape = spec.shape
    if spec.dtype.kind != "f" or len(shape) != 4 or shape[1] not in (3, None):
        raise InputError(f"{path}: input is {spec.dtype} {list(shape)}, {WANTED}", "Give an export of a detector")
    return shape[2] or DEFAULT_SIZE, shape[3] or DEFAULT_SIZE


def _class_count(path: Path, spec: TensorSpec) -> int:
    """Classes by the output's last dimension."""
    shape = [side or 0 for side in spec.shape]
    if spec.dtype.kind != "f" or len(shape) != 3 or shape[2] < 6 or 0 < shape[1] < shape[2]:
        raise InputError(f"{path}: output is {spec.dtype} {shape}, {WANTED}", "Later YOLOs are not supported")
    return shape[2] - 5


def _require_grid(path: Path, size_hw: tuple[int, int], spec: TensorSpec) -> None:
    """Raises InputError when no grids of a detector at this size have as many rows as the output."""
    height, width = size_hw
    cells = [(height // stride) * (width // stride) for stride in STRIDES]
    known = {
        anchors * sum(cells[first:last])
        for fewest, choices in ANCHORS
        for first in range(STRIDES.index(16) + 1)
        for last in range(max(first + fewest, STRIDES.index(16) + 1), len(cells) + 1)
        for anchors in choices
    }
    if spec.shape[1] not in known:
        raise InputError(
            f"{path}: output is {spec.dtype} {list(spec.shape)}, but at {height}x{width} YOLOv5 has "
            f"{3 * sum(cells[1:4])} rows: NMS seems to be inside",
            "Export it without NMS",
        )


def _names(path: Path, text: str | None, count: int) -> tuple[str, ...]:
    """From `{0: 'person', ...}` or `['person', ...]`; numbered classes if the file does not name them."""
    if text is None:
        return tuple(f"class{index}" for index in range(count))
    names = parse_names(text[:MAX_NAMES_CHARS])
    if names is None or len(names) != count:
        raise InputError(f"{path}: names {text[:60]!r} do not name {count} classes", "Export it again")
    return names


def parse_names(text: str) -> tuple[str, ...] | None:
    """Class names of a dictionary or list as text; None where it is anything else."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    if isinstance(value, dict) and sorted(value, key=str) == sorted(range(len(value)), key=str):
        value = [value[index] for index in range(len(value))]
    usable = isinstance(value, (list, tuple)) and value and all(isinstance(name, str) for name in value)
    return tuple(value) if usable else None


def _stride(path: Path, text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):
        raise InputError(f"{path}: stride is {text[:40]!r}, expected a number", "Export it again") from None
