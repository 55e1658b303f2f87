"""NMS in rounds: candidates become finished detections.

A round takes the best rows that are left, a block of them, and applies Cluster-NMS to these: a row is kept where no
kept better row of its class overlaps it, which repeated T times equals greedy NMS for suppression chains of up to T
rows. Then it removes what the kept rows suppress, and the best of the rest go on to the next, smaller round. So K rows
cost far less than K² pairs, and duplicates of good boxes do not take the place of other objects. Shapes are fixed and
every operator is standard: no NonMaxSuppression, which TensorRT-RTX cannot run and other versions run slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np

from compress.graph.builder import FLOAT, INT64, GraphBuilder
from compress.graph.columns import take, top_columns
from compress.graph.decode import Candidates
from compress.graph.preprocess import FrameLetterbox
from runtime.backends import CUTOFF
from runtime.boxes import CLASS_OFFSET_PX

BLOCK = 192
"""Rows that one round decides on."""
SHARES = (0.6, 0.7, 0.8, 0.9, 1.0)
"""Part of the rows behind its block that a round passes on: the first that decides on `max_det` rows in all. At 1 every
pair is compared.
"""
DETECTIONS = "detections"
"""Name of the first output; the second is `CUTOFF`."""


@dataclass(frozen=True)
class NmsShape:
    """Settings that are fixed inside the graph: `candidates` rows enter NMS, at most `max_det` leave it."""

    iou: float
    candidates: int
    max_det: int
    iterations: int


class Round(NamedTuple):
    """`length` rows enter it, the first `block` of them are decided on."""

    length: int
    block: int


class Rows(NamedTuple):
    """Tensors of rows, best first: matrices (B,6,L) of `LINES`, and scores (B,1,L), 0 for rows that were removed."""

    lines: str
    scores: str


LINES = ("x1", "y1", "x2", "y2", "area", "number")
"""Corners are shifted by class, of the area a part is kept (see `_suppressions`), and the number is the candidate's."""


def rounds_of(count: int, max_det: int) -> list[Round]:
    """The rounds that `count` candidates pass; they decide on `max_det` rows or more where there are so many."""
    plans = (_rounds(count, share) for share in SHARES)
    return next(plan for plan in plans if sum(step.block for step in plan) >= min(count, max_det))


def _rounds(count: int, share: float) -> list[Round]:
    plan = []
    while count:
        plan.append(Round(count, min(count, BLOCK)))
        count = ceil((count - plan[-1].block) * share)
    return plan


def detections(
    builder: GraphBuilder,
    candidates: Candidates,
    count: int,
    nms: NmsShape,
    letterbox: FrameLetterbox | None = None,
) -> tuple[str, str]:
    """`count` candidates -> `detections` (B, max_det, 6), x1 y1 x2 y2 score class, best first, and `cutoff` (B,).

    Rows without a detection are all zero and come last. Pixels of the canvas, or of the frame with a `letterbox`.
    Detections with a score above `cutoff` are complete; it is 0 where no row was left out for lack of room.
    """
    plan = rounds_of(count, nms.max_det)
    rows, cutoffs = Rows(_lines(builder, candidates, count, nms.iou), candidates.scores), [candidates.cutoff]
    decided = []
    for index, step in enumerate(plan):
        at, rest = f"nms.{index}", step.length - step.block
        block, others = _split(builder, rows, step, at)
        suppresses = _suppressions(builder, block.lines, rows.lines, at)
        keep, free = _cluster_nms(builder, suppresses, step, nms.iterations, at)
        decided.append(Rows(block.lines, builder.op("Mul", block.scores, keep, name=f"{at}.kept")))
        if rest:
            scores = builder.op("Mul", others.scores, free, name=f"{at}.free_scores")
            length = plan[index + 1].length
            best, places, cutoff = top_columns(builder, scores, rest, length, f"{at}.next")
            rows = Rows(take(builder, others.lines, places, len(LINES), length, f"{at}.next_lines"), best)
            cutoffs.append(cutoff)
    width = sum(step.block for step in plan)
    return _finish(builder, candidates, decided, width, nms.max_det, cutoffs, letterbox)


def _lines(b: GraphBuilder, candidates: Candidates, count: int, iou: float) -> str:
    """The matrices of all candidates. Classes are shifted apart in float32, which rounds as `runtime.boxes` does."""
    shift = b.op("Mul", candidates.classes, b.floats("nms.offset", CLASS_OFFSET_PX), name="nms.shift")
    low, high = (b.op("Add", end, shift, name=f"{end}_shifted") for end in (candidates.low, candidates.high))
    size = b.op("Sub", high, low, name="nms.size")
    width, height = b.ops("Split", size, b.ints("one_one", [1, 1]), names=("nms.width", "nms.height"), axis=1)
    area = b.op("Mul", width, height, name="nms.area")
    part = b.op("Mul", area, b.floats("nms.part", area_part(iou)), name="nms.area_part")
    shape = b.op("Shape", candidates.scores, name="nms.shape")  # a constant, unless the batch is open
    numbers = b.op("Expand", b.floats("nms.counted", np.arange(count)[None, None]), shape, name="nms.numbers")
    return b.op("Concat", low, high, part, numbers, name="nms.lines", axis=1)


def _split(b: GraphBuilder, rows: Rows, step: Round, at: str) -> tuple[Rows, Rows]:
    """The block, and the rows behind it; all rows twice where there are none."""
    if step.length == step.block:
        return rows, rows
    lengths = b.ints(f"{at}.lengths", [step.block, step.length - step.block])
    lines, scores = (
        b.ops("Split", source, lengths, names=[f"{at}.{part}_{kind}" for part in ("block", "rest")], axis=2)
        for kind, source in zip(Rows._fields, rows, strict=True)
    )
    return Rows(lines[0], scores[0]), Rows(lines[1], scores[1])


def _suppressions(b: GraphBuilder, block: str, lines: str, at: str) -> str:
    """float32 (B,block,L): 1 where the row of the block overlaps the other one, of its class, by more than iou.

    intersection > iou · union is the same as intersection > iou / (1 + iou) · (area + area).
    """
    ones = b.ints("nms.ones", [1] * len(LINES))
    turned = b.op("Transpose", block, name=f"{at}.turned", perm=[0, 2, 1])
    mine, other = (
        dict(
            zip(LINES, b.ops("Split", source, ones, names=[f"{at}.{e}_{whose}" for e in LINES], axis=axis), strict=True)
        )
        for whose, source, axis in (("mine", turned, 2), ("other", lines, 1))
    )
    width, height = (
        b.op(
            "Sub",
            b.op("Min", mine[f"{axis}2"], other[f"{axis}2"], name=f"{at}.{axis}_end"),
            b.op("Max", mine[f"{axis}1"], other[f"{axis}1"], name=f"{at}.{axis}_start"),
            name=f"{at}.{axis}_overlap",
        )
        for axis in "xy"
    )
    # with one of two negative sides at 0 their product is not positive
    shared = b.op("Mul", b.op("Relu", width, name=f"{at}.width"), height, name=f"{at}.intersection")
    bound = b.op("Add", mine["area"], other["area"], name=f"{at}.bound")
    over = b.op("Greater", shared, bound, name=f"{at}.overlaps")
    return b.op("Cast", over, name=f"{at}.suppresses", to=FLOAT)


def _cluster_nms(b: GraphBuilder, suppresses: str, step: Round, iterations: int, at: str) -> tuple[str, str]:
    """1 for rows of the block that are kept (B,1,block), and for those behind it that none suppresses (B,1,L-block)."""
    own = rest = suppresses
    if step.length > step.block:
        lengths = b.ints(f"{at}.lengths", [step.block, step.length - step.block])
        own, rest = b.ops("Split", suppresses, lengths, names=(f"{at}.own", f"{at}.others"), axis=2)
    rank = np.arange(step.block)  # compared in the graph, since every library folds it and the file stays small
    ranks = (
        b.floats(f"{at}.rank_{way}", rank.reshape(shape)) for way, shape in (("mine", (-1, 1)), ("other", (1, -1)))
    )
    later = b.op("Cast", b.op("Less", *ranks, name=f"{at}.behind"), name=f"{at}.later", to=FLOAT)
    own = b.op("Mul", own, later, name=f"{at}.own_later")
    keep = b.floats(f"nms.all_{step.block}", np.ones((1, 1, step.block)))
    for turn in range(iterations):
        keep = _unsuppressed(b, keep, own, f"{at}.{turn}")
    free = _unsuppressed(b, keep, rest, f"{at}.free") if rest != suppresses else ""
    return keep, free


def _unsuppressed(b: GraphBuilder, keep: str, suppresses: str, at: str) -> str:
    """1 where no kept row suppresses: 1 − the number of those that do, within 0..1."""
    hits = b.op("MatMul", keep, suppresses, name=f"{at}.hits")
    return b.op("HardSigmoid", hits, name=f"{at}.keep", alpha=-1.0, beta=1.0)


def _finish(
    b: GraphBuilder,
    candidates: Candidates,
    decided: Sequence[Rows],
    width: int,
    max_det: int,
    cutoffs: Sequence[str],
    letterbox: FrameLetterbox | None,
) -> tuple[str, str]:
    """Kept rows first, with zero rows behind them."""
    lines, scores = (
        parts[0] if len(parts) == 1 else b.op("Concat", *parts, name=f"out.{kind}", axis=2)
        for kind, parts in zip(Rows._fields, zip(*decided, strict=True), strict=True)
    )
    count = min(max_det, width)
    best, order, cutoff = top_columns(b, scores, width, count, "out")
    numbers = b.ops(
        "Split", lines, b.ints("out.line_parts", [len(LINES) - 1, 1]), names=("out.used", "out.numbers"), axis=1
    )
    number = b.op("Cast", take(b, numbers[1], order, 1, count, "out.number"), name="out.candidate", to=INT64)
    table = b.op("Concat", candidates.low, candidates.high, candidates.classes, name="out.candidates", axis=1)
    chosen = take(b, table, number, 5, count, "out.chosen")
    boxes, classes = b.ops("Split", chosen, b.ints("four_one", [4, 1]), names=("out.boxes", "out.class"), axis=1)
    if letterbox is not None:
        boxes = _to_frame(b, boxes, letterbox)
    table = b.op("Concat", boxes, best, classes, name="out.table", axis=1)
    some = b.op("Greater", best, b.floats("nought", 0.0), name="out.some")
    filled = b.op("Mul", table, b.op("Cast", some, name="out.filled", to=FLOAT), name="out.cleared")
    if count < max_det:
        empty = b.ints("out.empty", [0, 0, 0, 0, 0, max_det - count])
        filled = b.op("Pad", filled, empty, name="out.padded", mode="constant")
    highest = b.op("Max", *cutoffs, cutoff, name="out.highest")
    flat = b.op("Reshape", highest, b.ints("flat", [-1]), name=CUTOFF)
    return b.op("Transpose", filled, name=DETECTIONS, perm=[0, 2, 1]), flat


def _to_frame(b: GraphBuilder, boxes: str, letterbox: FrameLetterbox) -> str:
    """Canvas pixels -> frame pixels, clipped to the frame: (B,4,M)."""
    height, width = letterbox.frame_hw
    shift = b.floats("frame.pad", np.tile(letterbox.geometry.pad_wh, 2)[:, None])
    moved = b.op("Sub", boxes, shift, name="frame.moved")
    scaled = b.op("Div", moved, b.floats("frame.gain", letterbox.geometry.gain), name="frame.scaled")
    low = b.op("Max", scaled, b.floats("nought", 0.0), name="frame.low")
    return b.op("Min", low, b.floats("frame.limit", np.asarray([width, height] * 2)[:, None]), name="frame.boxes")


# ----------------------------------------------------------------------------------------- reference


class Kept(NamedTuple):
    """Indices of the kept candidates, best first, and the best score of a row that was left out for lack of room."""

    rows: np.ndarray
    cutoff: float


def nms_in_rounds(
    boxes_xyxy: np.ndarray, scores: np.ndarray, classes: np.ndarray, *, iou: float, iterations: int, max_det: int
) -> Kept:
    """The same NMS in NumPy, each operation in float32 as in the graph: boxes (K,4), best first."""
    left: np.ndarray = np.arange(len(scores))
    kept, cutoff = [], 0.0
    for step in rounds_of(len(scores), max_det):
        cutoff = max(cutoff, scores[left[step.length :]].max(initial=0))
        left = left[: step.length]
        block, rest = left[: step.block], left[step.block :]
        own = block[cluster_nms(boxes_xyxy[block], classes[block], iou, iterations)]
        free = ~suppression(boxes_xyxy[own], boxes_xyxy[rest], classes[own], classes[rest], iou).any(axis=0)
        kept.append(own)
        left = rest[free]
    found = np.concatenate(kept)
    return Kept(found[:max_det], float(max(cutoff, scores[found[max_det:]].max(initial=0))))


def cluster_nms(boxes_xyxy: np.ndarray, classes: np.ndarray, iou: float, iterations: int) -> np.ndarray:
    """Boxes (K,4), best first, and classes (K,) -> keep (K,) bool."""
    suppresses = np.triu(suppression(boxes_xyxy, boxes_xyxy, classes, classes, iou), 1)
    keep: np.ndarray = np.ones(len(boxes_xyxy), bool)
    for _ in range(iterations):
        keep = ~(suppresses & keep[:, None]).any(axis=0)
    return keep


def suppression(
    left_xyxy: np.ndarray, right_xyxy: np.ndarray, left_classes: np.ndarray, right_classes: np.ndarray, iou: float
) -> np.ndarray:
    """(N,M): whether boxes of one class overlap by more than `iou`."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = (
        (boxes + np.asarray(classes, np.float32)[:, None] * np.float32(CLASS_OFFSET_PX)).astype(np.float32).T
        for boxes, classes in ((left_xyxy, left_classes), (right_xyxy, right_classes))
    )
    width = np.maximum(np.minimum(ax2[:, None], bx2) - np.maximum(ax1[:, None], bx1), np.float32(0))
    height = np.minimum(ay2[:, None], by2) - np.maximum(ay1[:, None], by1)
    part = np.float32(area_part(iou))
    bound = ((ax2 - ax1) * (ay2 - ay1) * part)[:, None] + (bx2 - bx1) * (by2 - by1) * part
    return width * height > bound


def area_part(iou: float) -> float:
    """Intersection > iou · union is intersection > part · (area + area)."""
    return iou / (1 + iou)
