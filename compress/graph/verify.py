"""Compare an exported graph with torch, in three steps. Each has an exact result.

1. Every decoded row of the conventional graph equals torch's row: box in pixels, objectness and classes.
2. Every candidate of the boxes graph is torch's row of the same number, and no better row was left out.
3. The rows that the graph keeps are those that the same NMS in NumPy keeps of the graph's own candidates, bit for bit.

Comparing finished boxes alone would not be enough: a rounding of 1e-7 can swap two almost equal scores, greedy NMS then
keeps other boxes, and a correct graph seems wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto

from compress.graph.batches import batch_of, whole_batches
from compress.graph.nms import NmsShape, nms_in_rounds
from compress.graph.preprocess import FrameLetterbox, pixels_tensor
from compress.graph.session import exposing, open_session

PROBES = ("candidates.row", "candidates.low", "candidates.high", "candidates.score", "candidates.class")
"""Inner tensors of the boxes graph that are compared: (B,1,K), (B,2,K), (B,2,K), (B,1,K), (B,1,K)."""
FLOATS = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}


class Found(NamedTuple):
    """The candidates of one image, best first: row numbers (K,), boxes (K,4), scores (K,), classes (K,)."""

    rows: np.ndarray
    boxes_xyxy: np.ndarray
    scores: np.ndarray
    classes: np.ndarray


TorchRows = Callable[[np.ndarray], np.ndarray]
"""float32 RGB 0..1 (1,3,H,W) -> decoded rows (N, 5+nc) of the torch network."""


@dataclass(frozen=True)
class Agreement:
    """The largest differences over all images. `nms_differences` counts rows kept by one side only."""

    images: int
    max_box_error_px: float
    max_score_error: float
    nms_differences: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def unit_rgb(pixels_bgr: np.ndarray) -> np.ndarray:
    """Float BGR 0..255 (B,3,H,W) -> float32 RGB 0..1, as the network was trained."""
    return np.ascontiguousarray(pixels_bgr[:, ::-1], np.float32) / np.float32(255)


def nchw(canvas: np.ndarray) -> np.ndarray:
    """uint8 (B,H,W,3) -> float32 (B,3,H,W), values unchanged."""
    return canvas.transpose(0, 3, 1, 2).astype(np.float32)


def check_rows(model: onnx.ModelProto, canvases: Sequence[np.ndarray], torch_rows: TorchRows) -> Agreement:
    """Step 1, on uint8 BGR canvases (1,H,W,3), as many as fill whole batches; torch runs them one by one.

    Those of an open graph may differ in size.
    """
    session, dtype = open_session(model), FLOATS[model.graph.input[0].type.tensor_type.elem_type]
    box, score = 0.0, 0.0
    for batch in whole_batches(canvases, batch_of(model)):
        images = unit_rgb(nchw(batch))
        (found,) = session.run(None, {model.graph.input[0].name: images.astype(dtype)})
        for image, rows in zip(images, found, strict=True):
            error = np.abs(rows - torch_rows(image[None]))
            box, score = max(box, _largest(error[:, :4])), max(score, _largest(error[:, 4:]))
    return Agreement(len(canvases), box, score)


def check_boxes(
    model: onnx.ModelProto,
    sources: Sequence[np.ndarray],
    torch_rows: TorchRows,
    nms: NmsShape,
    letterbox: FrameLetterbox | None = None,
) -> Agreement:
    """Steps 2 and 3, on the graph's own input: uint8 BGR canvases, or frames with a `letterbox`, in whole batches.

    Torch reads the same pixels as the graph's stem, one image at a time, so a frame's resampling is not counted here.
    The plain graph runs beside the one that is probed, with an open batch on each image alone.
    """
    name, batch = model.graph.input[0].name, batch_of(model)
    probes = exposing(model, [pixels_tensor(model), *PROBES])
    session, plain = open_session(probes), open_session(model)
    worst = Agreement(0, 0.0, 0.0)
    for source in whole_batches(sources, batch):
        detections, cutoffs, pixels, *inner = session.run(None, {name: source})
        parts = [plain.run(None, {name: part}) for part in np.split(source, 1 if batch else len(source))]
        alone, alone_cutoffs = (np.concatenate(values) for values in zip(*parts, strict=True))
        for index, seen in enumerate(pixels):
            row, low, high, scores, classes = (values[index] for values in inner)
            found = Found(row[0], np.concatenate([low, high]).T, scores[0], classes[0])
            decoded = torch_rows(unit_rgb(seen[None]))
            box, score = _candidate_errors(found, decoded)
            expected, room = _expected(found, nms, letterbox)
            limit = max(room, _best_left_out(found, decoded))
            told = (abs(float(values[index]) - limit) for values in (cutoffs, alone_cutoffs))
            differences = sum(_row_differences(values[index], expected) for values in (detections, alone))
            worst = Agreement(
                worst.images + 1,
                max(worst.max_box_error_px, box),
                max(worst.max_score_error, score, *told),
                worst.nms_differences + differences,
            )
    return worst


def best_class(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Decoded rows (N, 5+nc) -> score (N,) objectness times best class, and that class (N,)."""
    scores = rows[:, 5:] * rows[:, 4:5]
    return scores.max(axis=1), scores.argmax(axis=1)


def corners(boxes_xywh: np.ndarray) -> np.ndarray:
    """(N,4) centre and size -> (N,4) x1 y1 x2 y2, in the rounding of the graph."""
    half = boxes_xywh[:, 2:] * np.float32(0.5)
    return np.concatenate([boxes_xywh[:, :2] - half, boxes_xywh[:, :2] + half], axis=1)


def _candidate_errors(found: Found, rows: np.ndarray) -> tuple[float, float]:
    """Box error in px and score error, where a better row that was left out counts as score error."""
    label = found.classes.astype(np.int64)
    chosen = rows[found.rows]
    scores = chosen[np.arange(len(label)), 5 + label] * chosen[:, 4]
    missed = max(0.0, _best_left_out(found, rows) - float(found.scores.min()))
    return _largest(corners(chosen[:, :4]) - found.boxes_xyxy), max(missed, _largest(scores - found.scores))


def _best_left_out(found: Found, rows: np.ndarray) -> float:
    return float(np.delete(best_class(rows)[0], found.rows).max(initial=0))


def _expected(found: Found, nms: NmsShape, letterbox: FrameLetterbox | None) -> tuple[np.ndarray, float]:
    """Rows (n,6) that the graph must return for its own candidates, and the best score that NMS leaves out."""
    _, boxes, scores, classes = found
    keep, cutoff = nms_in_rounds(boxes, scores, classes, iou=nms.iou, iterations=nms.iterations, max_det=nms.max_det)
    keep = keep[scores[keep] > 0]  # a score that underflowed is no detection: in the graph such a row is empty
    placed = boxes[keep] if letterbox is None else to_frame(boxes[keep], letterbox)
    return np.concatenate([placed, scores[keep, None], classes[keep, None]], axis=1), cutoff


def to_frame(boxes_xyxy: np.ndarray, letterbox: FrameLetterbox) -> np.ndarray:
    """Canvas pixels -> frame pixels, clipped, in float32 as the graph does it."""
    (height, width), place = letterbox.frame_hw, letterbox.geometry
    moved = boxes_xyxy - np.asarray([*place.pad_wh, *place.pad_wh], np.float32)
    return np.clip(moved / np.float32(place.gain), 0, np.asarray([width, height, width, height], np.float32))


def _row_differences(detections: np.ndarray, expected: np.ndarray) -> int:
    """The number of rows of (max_det,6) that differ from the expected ones, or are filled and should be empty."""
    count = len(expected)
    same = np.isclose(detections[:count], expected, rtol=1e-5, atol=1e-4).all(axis=1)
    return int((~same).sum() + np.any(detections[count:], axis=1).sum())


def _largest(values: np.ndarray) -> float:
    """Largest magnitude; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(values), nan=np.inf).max(initial=0.0))
