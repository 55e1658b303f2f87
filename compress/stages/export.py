"""Export: a student (.safetensors) becomes two ONNX files, both checked against torch before they are written.

In: the checkpoint, the image size, and validation images, on which the limits of NMS are tried.
Out: `model.onnx`, uint8 BGR canvas [B,H,W,3] (or camera frame) to finished boxes [B,max_det,6], without a confidence
threshold, and `cutoff` [B], the score up to which boxes may be missing; `model.yolov5.onnx`, `images` float32
[B,3,H,W] to `output0` [B,N,5+nc], as YOLOv5 writes it; `export.json`; and `teacher.onnx` if a teacher is
given. B is 1, another number, or open. The same checkpoint and settings give the same bytes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import onnx
import torch
from torch import nn

from compress.config import IMGSZ, ExportConfig, Recipe, Settings, Side
from compress.graph.assemble import boxes_graph, yolov5_graph
from compress.graph.batches import batch_of, whole_batches
from compress.graph.builder import write_model
from compress.graph.candidates import Room, Validation, candidates_for, canvas_of, measure_room
from compress.graph.fp16 import overflow, with_half_input
from compress.graph.head import HeadShape
from compress.graph.metadata import metadata_of, write_card
from compress.graph.network import NetworkGraph, trace
from compress.graph.nms import NmsShape
from compress.graph.preprocess import FrameLetterbox
from compress.graph.session import open_session
from compress.graph.verify import Agreement, check_boxes, check_rows, nchw, unit_rgb
from compress.inputs import (
    CONVENTIONAL,
    SHIPPED,
    STUDENT,
    TEACHER_ONNX,
    dataset_of,
    measured_teacher,
    refuse_another_model,
    validation_of,
)
from compress.log import Log
from compress.models import YOLOv5, load_model, network_digest
from compress.stages import Figures, Stage
from compress.store import Folders
from runtime.backends import CUTOFF
from runtime.card import Batches, ModelCard
from runtime.errors import EdgestillError, InputError
from runtime.files import sha256, write_json
from runtime.image import read_image

CHECKED_IMAGES = 4
OPEN_BATCH = 3
"""Images at least on which a file with an open batch is checked."""
SHIPPED_OPSETS = 17, 20
"""The least and the highest one of `model.onnx`: its flavours are made for runtimes that know them. ONNX Runtime 1.32
loads no int8-trt of opset 21: where it moves a pair past a MaxPool, it takes the signed integers for unsigned ones."""


class Config(Settings):
    export: ExportConfig = ExportConfig()
    imgsz: Side = IMGSZ


class Inputs(NamedTuple):
    """`data` is the validation split, or None if nothing is measured on it."""

    student: Path
    data: Validation | None = None
    teacher: Path | None = None


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write both graphs and `export.json` into `out`. Raises the errors of `export`."""
    settings, imgsz = config.export, config.imgsz
    result = export(settings, model=inputs.student, out=out, imgsz=imgsz, data=inputs.data, log=log)
    write_json(out / "export.json", result.to_json())
    if inputs.teacher:
        log("the teacher, exported in the same way for comparison:")
        same = settings.model_copy(update={"candidates": result.card.candidates})
        found = export(same, model=inputs.teacher, out=out / "teacher", imgsz=imgsz, log=log)
        found.model_onnx.rename(out / TEACHER_ONNX)
        shutil.rmtree(out / "teacher")
    return {
        "candidates": result.card.candidates,
        "max_box_error_px": result.boxes.max_box_error_px,
        "max_score_error": result.boxes.max_score_error,
    }


def inputs_of(recipe: Recipe, folders: Folders) -> Inputs:
    """Raises InputError when the files of this run could not be measured on its validation images."""
    data = validation_of(dataset_of(recipe, folders))
    if recipe.export.frame:
        require_frames(data, recipe.export.frame)
    return Inputs(folders["distill"] / STUDENT, data, measured_teacher(recipe, folders))


def require_frames(data: Validation, frame_hw: tuple[int, int]) -> None:
    """A graph with the letterbox inside can only be measured on frames of its own size.

    Raises InputError when an image has another size.
    """
    odd = [image for image in data.ground_truth["images"] if (image["height"], image["width"]) != tuple(frame_hw)]
    if odd:
        raise InputError(
            f"export.frame is {frame_hw[0]}x{frame_hw[1]}, but {len(odd)} of {len(data.images)} validation images have "
            f"another size ({odd[0]['file_name']}: {odd[0]['height']}x{odd[0]['width']})",
            "Give frames of the camera's size as val, or leave export.frame out",
        )


@dataclass(frozen=True)
class ExportResult:
    """The written files, their card, their agreement with torch, and how NMS's limits fit the images."""

    model_onnx: Path
    yolov5_onnx: Path
    card: ModelCard
    boxes: Agreement
    rows: Agreement
    room: Room | None

    def to_json(self) -> dict[str, Any]:
        return {
            "files": {path.name: sha256(path) for path in (self.model_onnx, self.yolov5_onnx)},
            "candidates": self.card.candidates,
            "agreement": {SHIPPED: self.boxes.to_json(), CONVENTIONAL: self.rows.to_json()},
            "room": self.room.to_json() if self.room else None,
        }


class RawMaps(nn.Module):
    """The network as far as its detect convolutions: what `trace` turns into ONNX."""

    def __init__(self, network: YOLOv5) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        _, features = self.network.forward_features(images)
        return [conv(x) for conv, x in zip(self.network.detect.m, features, strict=True)]


def export(
    config: ExportConfig,
    *,
    model: Path,
    out: Path,
    imgsz: int,
    data: Validation | None = None,
    log: Log = print,
) -> ExportResult:
    """Write both graphs of the checkpoint `model` into the folder `out`, for canvases of `config.imgsz`.

    Without it they are `imgsz` x `imgsz` pixels. Without `data` the check runs on noise. Raises `EdgestillError` and
    writes nothing when a graph differs from torch by more than `max_box_error` pixels or `max_score_error`, or float16
    overflows; `UsageError` when a side is not a multiple of the network's stride, and `OccupiedError` when `out` holds
    another model.
    """
    network = load_model(model).eval()
    size_hw = config.imgsz or (imgsz, imgsz)
    network.arch.require_image_size(*size_hw)
    head = head_shape(network, size_hw)
    card = _card(config, model, network, head)
    refuse_another_model(out, card, (SHIPPED, CONVENTIONAL))
    traced, torch_rows = trace(RawMaps(network.fuse()), size_hw), rows_of(network)
    canvases = _canvases(data, size_hw, _images_of_a_check(card))
    conventional, rows = _conventional(config, traced, head, card, canvases, torch_rows, log)
    shipped, boxes = _shipped(config, traced, head, card, data, canvases, torch_rows)
    _require_agreement(config, SHIPPED, boxes, log)
    room = _measure_room(config, shipped, data, size_hw, log) if data and data.images else None
    files = [write_model(graph, out / name) for graph, name in ((shipped, SHIPPED), (conventional, CONVENTIONAL))]
    return ExportResult(files[0], files[1], card, boxes, rows, room)


def head_shape(network: YOLOv5, size_hw: tuple[int, int]) -> HeadShape:
    """Anchors in pixels are made as `decode` makes them, so that they round alike."""
    strides = np.asarray(network.strides, np.float32)[:, None, None]
    grid = network.detect.anchors.detach().float().cpu().numpy()
    return HeadShape(network.arch.nc, grid * strides, tuple(network.strides), size_hw)


def rows_of(network: YOLOv5) -> Callable[[np.ndarray], np.ndarray]:
    """float32 RGB 0..1 (1,3,H,W) -> decoded rows (N, 5+nc), by torch."""

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network.decode(network(torch.from_numpy(images)))[0].numpy()

    return run


def _card(config: ExportConfig, model: Path, network: YOLOv5, head: HeadShape) -> ModelCard:
    return ModelCard(
        name=model.stem,
        names=tuple(network.arch.names),
        size_hw=head.size_hw,
        stride=max(network.strides),
        input="frame" if config.frame else "canvas",
        output="boxes",
        conf=config.conf,
        iou=config.iou,
        max_det=config.max_det,
        candidates=candidates_for(head.rows, config.candidates),
        nms_iterations=config.nms_iterations,
        frame_hw=config.frame,
        batches=Batches(1, None) if config.dynamic else Batches(config.batch, config.batch),
        precision="fp32",
        weights=network_digest(network.arch, network.state_dict()),
        provenance={
            "checkpoint": model.name,
            "checkpoint_sha256": sha256(model),
            "opset": shipped_opset(config.opset),
        },
        artifacts=(),
    )


def shipped_opset(conventional: int) -> int:
    """That of `model.onnx`, the nearest one to that of the conventional file."""
    least, most = SHIPPED_OPSETS
    return min(max(conventional, least), most)


def _images_of_a_check(card: ModelCard) -> int:
    """A check runs on a whole number of these."""
    return card.input_shape[0] or OPEN_BATCH


def _canvases(data: Validation | None, size_hw: tuple[int, int], batch: int) -> list[np.ndarray]:
    """A few real canvases if there are images, and noise up to a whole number of batches."""
    real = [canvas_of(path, size_hw)[0] for _, path in (data.images[:CHECKED_IMAGES] if data else ())]
    return [*real, *_noise(size_hw, batch - len(real) % batch)]


def _noise(size_hw: tuple[int, int], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (1, *size_hw, 3), dtype=np.uint8) for _ in range(count)]


def _measure_room(
    config: ExportConfig, model: onnx.ModelProto, data: Validation, size_hw: tuple[int, int], log: Log
) -> Room:
    """Try the limits of NMS on all images, resized to the camera's frame where the graph takes that."""
    session, source = open_session(model), model.graph.input[0].name
    paths = [path for _, path in data.images]
    sources = (_frame(path, config.frame) if config.frame else canvas_of(path, size_hw)[0] for path in paths)
    room = measure_room(
        lambda images: session.run([CUTOFF], {source: images})[0], sources, batch_of(model), config.conf
    )
    reached = (
        f"reached on {room.reached} of {room.images} images" if room.reached else f"not reached on {room.images} images"
    )
    log(f"limits of NMS: {reached} at conf {config.conf:g}; boxes are complete above {room.highest_cutoff:.3f}")
    return room


def _conventional(
    config: ExportConfig,
    traced: NetworkGraph,
    head: HeadShape,
    card: ModelCard,
    canvases: Sequence[np.ndarray],
    torch_rows: Callable[[np.ndarray], np.ndarray],
    log: Log,
) -> tuple[onnx.ModelProto, Agreement]:
    """The graph, and its agreement with torch before its body becomes float16; that of the float16 graph is logged."""
    rows_card = replace(card, input="tensor", output="rows", frame_hw=None, candidates=0, nms_iterations=0)
    rows_card = replace(rows_card, provenance={**card.provenance, "opset": config.opset})
    metadata, batch = metadata_of(rows_card), card.input_shape[0]
    graph = yolov5_graph(traced, head, opset=config.opset, metadata=metadata, batch=batch)
    if config.dynamic:  # of another size, and higher than wide where the others are not
        height, width = head.size_hw
        canvases = [*canvases, *_noise((width + max(head.strides), height), OPEN_BATCH)]
    found = check_rows(graph, canvases, torch_rows)
    _require_agreement(config, CONVENTIONAL, found, log)
    return (_in_half(graph, rows_card, canvases, torch_rows, log) if config.half else graph), found


def _in_half(
    graph: onnx.ModelProto,
    card: ModelCard,
    canvases: Sequence[np.ndarray],
    torch_rows: Callable[[np.ndarray], np.ndarray],
    log: Log,
) -> onnx.ModelProto:
    """The graph in float16. Raises EdgestillError when an activation of these canvases is too large for it."""
    images = (unit_rgb(nchw(batch)) for batch in whole_batches(canvases, batch_of(graph)))
    if fault := overflow(graph, images):
        raise EdgestillError(f"{CONVENTIONAL} in float16: {fault}", "Nothing was written. Leave --half out")
    half = with_half_input(graph)
    write_card(half, replace(card, precision="fp16"))
    _log_agreement(f"{CONVENTIONAL} in float16", check_rows(half, canvases, torch_rows), log)
    return half


def _shipped(
    config: ExportConfig,
    traced: NetworkGraph,
    head: HeadShape,
    card: ModelCard,
    data: Validation | None,
    canvases: Sequence[np.ndarray],
    torch_rows: Callable[[np.ndarray], np.ndarray],
) -> tuple[onnx.ModelProto, Agreement]:
    nms = NmsShape(config.iou, card.candidates, config.max_det, config.nms_iterations)
    graph = boxes_graph(
        traced, head, nms,
        opset=shipped_opset(config.opset), metadata=metadata_of(card),
        frame_hw=config.frame, batch=card.input_shape[0],
    )  # fmt: skip
    letterbox = FrameLetterbox(config.frame, head.size_hw) if config.frame else None
    sources = _frames(data, config.frame, _images_of_a_check(card)) if config.frame else canvases
    return graph, check_boxes(graph, sources, torch_rows, nms, letterbox)


def _frames(data: Validation | None, frame_hw: tuple[int, int], batch: int) -> list[np.ndarray]:
    """Frames of the camera's size: the images resized to it, and noise up to a whole number of batches."""
    paths = [path for _, path in (data.images[:CHECKED_IMAGES] if data else ())]
    return [*(_frame(path, frame_hw) for path in paths), *_noise(frame_hw, batch - len(paths) % batch)]


def _frame(path: Path, frame_hw: tuple[int, int]) -> np.ndarray:
    return cv2.resize(read_image(path), frame_hw[::-1])[None]


def _log_agreement(name: str, found: Agreement, log: Log) -> None:
    log(
        f"{name} against torch on {found.images} images: boxes within {found.max_box_error_px:.5f} px, "
        f"scores within {found.max_score_error:.2e}"
    )


def _require_agreement(config: ExportConfig, name: str, found: Agreement, log: Log) -> None:
    _log_agreement(name, found, log)
    limits = (
        ("boxes differ by", found.max_box_error_px, config.max_box_error, " px", "export.max_box_error"),
        ("scores differ by", found.max_score_error, config.max_score_error, "", "export.max_score_error"),
        ("NMS differs from its definition in", found.nms_differences, 0, " rows", ""),
    )
    for difference, value, limit, unit, setting in limits:
        if not value <= limit:
            hint = f"Nothing was written. Rounding shows in a network of few epochs: train longer, or set {setting}"
            hint = hint if setting else "Nothing was written"
            raise EdgestillError(f"{name} against torch: {difference} {value:.4g}{unit}, the limit is {limit:g}", hint)


STAGE = Stage(
    "export",
    settings=Config,
    inputs=inputs_of,
    run=run,
    after=("data", "teacher", "distill"),
    version=3,
)
