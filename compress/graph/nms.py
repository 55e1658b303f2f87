"""Unrolled Cluster-NMS: candidates become finished detections.

A row is kept where no kept earlier row of its class overlaps it; repeated T times this equals greedy NMS for
suppression chains of up to T rows. Shapes are fixed and every operator is standard: no NonMaxSuppression, which
TensorRT-RTX cannot run and other versions run slowly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from compress.graph.builder import FLOAT, GraphBuilder
from compress.graph.decode import Candidates
from compress.graph.preprocess import FrameLetterbox


@dataclass(frozen=True)
class NmsShape:
    """Settings that are fixed inside the graph: `candidates` rows enter NMS, at most `max_det` leave it."""

    iou: float
    candidates: int
    max_det: int
    iterations: int


def detections(
    builder: GraphBuilder,
    candidates: Candidates,
    count: int,
    nms: NmsShape,
    letterbox: FrameLetterbox | None = None,
) -> str:
    """`count` candidates -> `detections` (1, max_det, 6): x1 y1 x2 y2 score class, best first.

    Rows without a detection are all zero and come last. Pixels of the canvas, or of the frame with a `letterbox`.
    """
    keep = _cluster_nms(builder, candidates.boxes, candidates.classes, count, nms)
    return _compact(builder, candidates, keep, min(nms.max_det, count), nms.max_det, letterbox)


def _cluster_nms(b: GraphBuilder, boxes: str, classes: str, count: int, nms: NmsShape) -> str:
    """The tensor `nms.keep` (1,K): 1 for the rows that are kept."""
    overlaps = _overlaps(b, boxes, nms.iou)
    column, line = (b.op("Reshape", classes, b.ints(shape, dims), name=f"nms.class_{shape}")
                    for shape, dims in (("column", [-1, 1]), ("line", [1, -1])))  # fmt: skip
    same = b.op("Equal", column, line, name="nms.same")
    rank = np.arange(count, dtype=np.float32)
    earlier = b.op("Less", b.floats("nms.rank", rank[:, None]), b.floats("nms.ranks", rank[None]), name="nms.earlier")
    pairs = b.op("And", b.op("And", overlaps, same, name="nms.rivals"), earlier, name="nms.pairs")
    suppresses = b.op("Cast", pairs, name="nms.suppresses", to=FLOAT)
    keep = b.floats("nms.all", np.ones((1, count)))
    for step in range(nms.iterations):
        last = step == nms.iterations - 1
        hits = b.op("MatMul", keep, suppresses, name=f"nms.{step}.hits")
        free = b.op("Less", hits, b.floats("half", 0.5), name=f"nms.{step}.free")
        keep = b.op("Cast", free, name="nms.keep" if last else f"nms.{step}.keep", to=FLOAT)
    return keep


def _overlaps(b: GraphBuilder, boxes: str, iou: float) -> str:
    """(K,K) bool: intersection > iou · union. Products are compared, nothing is divided."""
    ends = ("x1", "y1", "x2", "y2")
    ones = b.ints("nms.ones", [1, 1, 1, 1])
    columns = b.ops("Split", boxes, ones, names=[f"nms.{e}_column" for e in ends], axis=1)
    turned = b.op("Transpose", boxes, name="nms.turned", perm=[1, 0])
    lines = b.ops("Split", turned, ones, names=[f"nms.{e}_line" for e in ends], axis=0)
    sides, areas = [], []
    for low, high, side in ((0, 2, "width"), (1, 3, "height")):
        start = b.op("Max", columns[low], lines[low], name=f"nms.{side}_start")
        end = b.op("Min", columns[high], lines[high], name=f"nms.{side}_end")
        length = b.op("Sub", end, start, name=f"nms.{side}_signed")
        sides.append(b.op("Max", length, b.floats("nought", 0.0), name=f"nms.{side}"))
    for parts, way in ((columns, "column"), (lines, "line")):
        lengths = [b.op("Sub", parts[i + 2], parts[i], name=f"nms.{way}_{axis}") for i, axis in enumerate("wh")]
        areas.append(b.op("Mul", *lengths, name=f"nms.{way}_area"))
    inter = b.op("Mul", *sides, name="nms.intersection")
    union = b.op("Sub", b.op("Add", *areas, name="nms.areas"), inter, name="nms.union")
    bound = b.op("Mul", union, b.floats("nms.iou", iou), name="nms.bound")
    return b.op("Greater", inter, bound, name="nms.overlaps")


def _compact(
    b: GraphBuilder, candidates: Candidates, keep: str, count: int, max_det: int, letterbox: FrameLetterbox | None
) -> str:
    """Kept rows first: (1, max_det, 6), with zero rows behind them."""
    flat_keep = b.op("Reshape", keep, b.ints("flat", [-1]), name="out.keep")
    kept = b.op("Mul", candidates.scores, flat_keep, name="out.kept")
    best, order = b.ops("TopK", kept, b.ints("out.count", [count]), names=("out.score", "out.order"), axis=0)
    picked = b.op("Gather", candidates.boxes, order, name="out.boxes", axis=0)
    if letterbox is not None:
        picked = _to_frame(b, picked, letterbox)
    column = b.ints("column", [-1, 1])
    classes = b.op("Gather", candidates.classes, order, name="out.class", axis=0)
    label = b.op("Reshape", classes, column, name="out.class_column")
    points = b.op("Reshape", best, column, name="out.score_column")
    rows = b.op("Concat", picked, points, label, name="out.rows", axis=1)
    filled = b.op(
        "Cast", b.op("Greater", points, b.floats("nought", 0.0), name="out.some"), name="out.filled", to=FLOAT
    )
    rows = b.op("Mul", rows, filled, name="out.cleared")
    if count < max_det:
        rows = b.op("Concat", rows, b.floats("out.empty", np.zeros((max_det - count, 6))), name="out.padded", axis=0)
    return b.op("Reshape", rows, b.ints("out.shape", [1, max_det, 6]), name="detections")


def _to_frame(b: GraphBuilder, boxes: str, letterbox: FrameLetterbox) -> str:
    """Canvas pixels -> frame pixels, clipped to the frame."""
    height, width = letterbox.frame_hw
    shift = b.floats("frame.pad", [[*letterbox.geometry.pad_wh, *letterbox.geometry.pad_wh]])
    moved = b.op("Sub", boxes, shift, name="frame.moved")
    scaled = b.op("Div", moved, b.floats("frame.gain", letterbox.geometry.gain), name="frame.scaled")
    low = b.op("Max", scaled, b.floats("nought", 0.0), name="frame.low")
    return b.op("Min", low, b.floats("frame.limit", [[width, height, width, height]]), name="frame.boxes")


# ----------------------------------------------------------------------------------------- reference


def cluster_nms(boxes_xyxy: np.ndarray, classes: np.ndarray, iou: float, iterations: int) -> np.ndarray:
    """The same NMS in NumPy, each operation in float32 as in the graph: boxes (K,4), best first -> keep (K,) bool."""
    x1, y1, x2, y2 = boxes_xyxy.astype(np.float32).T
    width = np.maximum(np.minimum(x2[:, None], x2) - np.maximum(x1[:, None], x1), np.float32(0))
    height = np.maximum(np.minimum(y2[:, None], y2) - np.maximum(y1[:, None], y1), np.float32(0))
    area = (x2 - x1) * (y2 - y1)
    inter = width * height
    union = (area[:, None] + area) - inter
    suppresses = np.triu((inter > union * np.float32(iou)) & (classes[:, None] == classes), 1)
    keep = np.ones(len(boxes_xyxy), bool)
    for _ in range(iterations):
        keep = ~(suppresses & keep[:, None]).any(axis=0)
    return keep
