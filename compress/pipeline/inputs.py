"""What stages and commands start from: images with their ground truth, and the files that earlier stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compress.data import DataConfig
from compress.data.coco import to_coco
from compress.data.index import index_split
from compress.export import SHIPPED
from compress.flavours import REFERENCE
from compress.graph.candidates import Validation
from runtime.errors import InputError

TEACHER = "teacher.onnx"
"""Beside the student's files: the teacher as the same kind of file, so that both are measured alike."""


def validation_of(data: DataConfig) -> Validation:
    """The usable images of the val split, numbered from 1, with their labels as COCO ground truth."""
    samples = index_split(data, "val").samples
    images = [(image_id, sample.image) for image_id, sample in enumerate(samples, 1)]
    return Validation(images, to_coco(samples, data.names))


def require_frames(data: Validation, frame_hw: tuple[int, int]) -> None:
    """A graph with the letterbox baked in can only be measured on frames of its own size."""
    odd = [image for image in data.ground_truth["images"] if (image["height"], image["width"]) != tuple(frame_hw)]
    if odd:
        raise InputError(
            f"export.frame is {frame_hw[0]}x{frame_hw[1]}, but {len(odd)} of {len(data.images)} validation images have "
            f"another size ({odd[0]['file_name']}: {odd[0]['height']}x{odd[0]['width']})",
            "Give frames of the camera's size as val, or leave export.frame out",
        )


def training_images(data: DataConfig) -> list[Path]:
    return [sample.image for sample in index_split(data, "train").samples]


class Candidate(NamedTuple):
    """A file to measure, whose it is, and what its gate said; `kept` is None where there was no gate."""

    path: Path
    role: str
    precision: str
    kept: bool | None = None
    reason: str = ""


def measured_files(inputs: Mapping[str, Path]) -> list[Candidate]:
    """The teacher's file, the student's FP32, and every flavour, those that were refused too."""
    flavours = [
        Candidate(file, "student", entry["name"], entry["kept"], entry["reason"])
        for entry, file in _flavours(inputs)
        if entry["name"] != REFERENCE
    ]
    student = Candidate(inputs["export"] / SHIPPED, "student", REFERENCE)
    return [Candidate(inputs["export"] / TEACHER, "teacher", REFERENCE), student, *flavours]


def kept_files(inputs: Mapping[str, Path]) -> dict[str, Path]:
    """Precision -> ONNX file, of FP32 and every flavour that passed its gate."""
    return {entry["name"]: file for entry, file in _flavours(inputs) if entry["kept"]}


def _flavours(inputs: Mapping[str, Path]) -> list[tuple[dict[str, Any], Path]]:
    entries = read_json(inputs["quantize"] / "quantize.json")
    return [(e, inputs["export" if e["name"] == REFERENCE else "quantize"] / e["file"]) for e in entries]


def read_json(path: Path) -> Any:
    """A document that an earlier stage wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
