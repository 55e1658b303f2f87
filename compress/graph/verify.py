"""Compare an exported graph with torch, in three steps. Each has an exact result.

1. Every decoded row of the conventional graph equals torch's row: box in pixels, objectness and classes.
2. Every candidate of the boxes graph is torch's row of the same number, and no better row was left out.
3. The rows that the graph keeps are those that Cluster-NMS in NumPy keeps of the graph's own candidates, bit for bit.

Comparing finished boxes alone would not be enough: a rounding of 1e-7 can swap two almost equal scores, greedy NMS then
keeps other boxes, and a correct graph seems wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx

from compress.graph.nms import NmsShape, cluster_nms
from compress.graph.preprocess import FrameLetterbox, pixels_tensor
from compress.graph.session import exposing, open_session

PROBES = ("candidates.row", "candidates.boxes", "candidates.score", "candidates.class", "nms.keep")
"""Inner tensors of the boxes graph that are compared: (K,), (K,4), (K,), (K,), (1,K)."""

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
    """Float BGR 0..255 (1,3,H,W) -> float32 RGB 0..1, as the network was trained."""
    return np.ascontiguousarray(pixels_bgr[:, ::-1], np.float32) / np.float32(255)


def nchw(canvas: np.ndarray) -> np.ndarray:
    """uint8 (1,S,S,3) -> float32 (1,3,S,S), values unchanged."""
    return canvas.transpose(0, 3, 1, 2).astype(np.float32)


def check_rows(model: onnx.ModelProto, canvases: Sequence[np.ndarray], torch_rows: TorchRows) -> Agreement:
    """Step 1, on uint8 BGR canvases (1,S,S,3)."""
    session = open_session(model)
    box, score = 0.0, 0.0
    for canvas in canvases:
        images = unit_rgb(nchw(canvas))
        error = np.abs(session.run(None, {model.graph.input[0].name: images})[0][0] - torch_rows(images))
        box, score = max(box, _largest(error[:, :4])), max(score, _largest(error[:, 4:]))
    return Agreement(len(canvases), box, score)


def check_boxes(
    model: onnx.ModelProto,
    sources: Sequence[np.ndarray],
    torch_rows: TorchRows,
    nms: NmsShape,
    letterbox: FrameLetterbox | None = None,
) -> Agreement:
    """Steps 2 and 3, on the graph's own input: uint8 BGR canvases, or frames with a `letterbox`.

    Torch reads the same pixels as the graph's stem, so a frame's resampling is not counted here.
    """
    pixels = pixels_tensor(model)
    probes = exposing(model, [pixels, *PROBES])
    session, plain = open_session(probes), open_session(model)
    worst = Agreement(0, 0.0, 0.0)
    for source in sources:
        feed = {model.graph.input[0].name: source}
        detections, seen, *values = session.run(None, feed)
        found = dict(zip(PROBES, values, strict=True))
        box, score = _candidate_errors(found, torch_rows(unit_rgb(seen)))
        expected = _expected(found, nms, letterbox)
        differences = _row_differences(detections[0], expected) + _row_differences(
            plain.run(None, feed)[0][0], expected
        )
        worst = Agreement(
            worst.images + 1,
            max(worst.max_box_error_px, box),
            max(worst.max_score_error, score),
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


def _candidate_errors(found: dict[str, np.ndarray], rows: np.ndarray) -> tuple[float, float]:
    """Box error in px, and score error. A better row that was left out counts as score error."""
    index, label = found["candidates.row"], found["candidates.class"].astype(np.int64)
    chosen = rows[index]
    scores = chosen[np.arange(len(index)), 5 + label] * chosen[:, 4]
    left_out = np.delete(best_class(rows)[0], index)
    missed = max(0.0, float(left_out.max() - found["candidates.score"].min())) if left_out.size else 0.0
    box = _largest(corners(chosen[:, :4]) - found["candidates.boxes"])
    return box, max(missed, _largest(scores - found["candidates.score"]))


def _expected(found: dict[str, np.ndarray], nms: NmsShape, letterbox: FrameLetterbox | None) -> np.ndarray:
    """Rows (n,6) that the graph must return for its own candidates."""
    boxes, score, label = (found[f"candidates.{part}"] for part in ("boxes", "score", "class"))
    keep = np.flatnonzero(cluster_nms(boxes, label, nms.iou, nms.iterations))[: nms.max_det]
    placed = boxes[keep] if letterbox is None else to_frame(boxes[keep], letterbox)
    return np.concatenate([placed, score[keep, None], label[keep, None]], axis=1)


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
