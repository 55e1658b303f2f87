"""The card of a file that YOLOv5's own export wrote, made from its `names` and `stride` metadata and its shapes."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import Path

from runtime.backends import TensorSpec
from runtime.card import ModelCard
from runtime.errors import InputError

DEFAULT_SIZE = 640
"""Height and width of the input where the file leaves them open."""
CONF, IOU, MAX_DET = 0.25, 0.45, 1000
"""Defaults of YOLOv5's detect."""
MAX_NAMES_CHARS = 1 << 20
WANTED = "expected YOLOv5's float [1, 3, H, W] -> [1, N, 5 + classes]"


def yolov5_card(path: Path, metadata: Mapping[str, str], input_: TensorSpec, output: TensorSpec) -> ModelCard:
    """Raises InputError when the shapes or the metadata are not those of a YOLOv5 detector."""
    size_hw = _size_hw(path, input_)
    names = _names(path, metadata.get("names"), _class_count(path, output))
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
        precision="fp16" if input_.dtype.itemsize == 2 else "fp32",
    )


def _size_hw(path: Path, spec: TensorSpec) -> tuple[int, int]:
    shape = spec.shape
    if spec.dtype.kind != "f" or len(shape) != 4 or shape[0] not in (1, None) or shape[1] not in (3, None):
        raise InputError(f"{path}: input is {spec.dtype} {list(shape)}, {WANTED}", "Export with batch size 1")
    return shape[2] or DEFAULT_SIZE, shape[3] or DEFAULT_SIZE


def _class_count(path: Path, spec: TensorSpec) -> int | None:
    """Classes by the output's last dimension, None where it is open."""
    shape = spec.shape
    channels = shape[-1] if shape else None
    transposed = len(shape) == 3 and shape[1] and channels and shape[1] < channels
    if spec.dtype.kind != "f" or len(shape) != 3 or transposed or (channels and channels < 6):
        raise InputError(f"{path}: output is {spec.dtype} {list(shape)}, {WANTED}", "Later YOLOs are not supported")
    return channels - 5 if channels else None


def _names(path: Path, text: str | None, count: int | None) -> tuple[str, ...]:
    """From `{0: 'person', ...}` or `['person', ...]`; numbered classes where the file does not name them."""
    if text is None:
        if count is None:
            raise InputError(f"{path}: neither names nor the number of classes is in the file", "Export it again")
        return tuple(f"class{index}" for index in range(count))
    names = _parse_names(text[:MAX_NAMES_CHARS])
    if names is None or (count is not None and len(names) != count):
        raise InputError(f"{path}: names {text[:60]!r} do not name {count or 'its'} classes", "Export it again")
    return names


def _parse_names(text: str) -> tuple[str, ...] | None:
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
