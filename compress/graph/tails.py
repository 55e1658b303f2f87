"""What comes after the trunk: rows as YOLOv5's tools expect them, or finished boxes.

Decode, with σ the sigmoid, per level of stride s, cell (gx, gy), anchor (aw, ah) in pixels:
    xy = (2σ(t_xy) + (cell − 0.5))·s        wh = (2σ(t_wh))²·anchor        score = σ(t_obj)·max σ(t_cls)

The boxes tail is TopK and unrolled Cluster-NMS (k ← 1 where no kept earlier box of the same class overlaps it;
repeated T times it equals greedy NMS for suppression chains of up to T). Shapes are fixed and every operator is
standard: no NonMaxSuppression, which TensorRT-RTX cannot run and other versions run slowly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from compress.graph.builder import FLOAT, GraphBuilder
from compress.graph.heads import LetterboxGeometry


@dataclass(frozen=True)
class HeadShape:
    """The geometry of the raw maps. `anchors_px` is (nl, na, 2) width and height in pixels."""

    nc: int
    anchors_px: np.ndarray
    strides: tuple[int, ...]
    size_hw: tuple[int, int]

    @property
    def na(self) -> int:
        return int(self.anchors_px.shape[1])

    @property
    def no(self) -> int:
        return 5 + self.nc

    @property
    def grids_hw(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.size_hw[0] // s, self.size_hw[1] // s) for s in self.strides)

    @property
    def level_rows(self) -> tuple[int, ...]:
        return tuple(self.na * h * w for h, w in self.grids_hw)

    @property
    def rows(self) -> int:
        return sum(self.level_rows)


@dataclass(frozen=True)
class NmsShape:
    """What is fixed inside the graph: IoU, rows that enter NMS, rows that leave, unrolled iterations."""

    iou: float
    candidates: int
    max_det: int
    iterations: int


# ---------------------------------------------------------------------------------------------- rows


def rows_tail(builder: GraphBuilder, maps: Sequence[str], head: HeadShape) -> str:
    """Raw maps (B, na·no, H, W) of each level -> `output0` (B, N, 5+nc): xywh in pixels, objectness, classes."""
    levels = [_level_rows(builder, name, head, level) for level, name in enumerate(maps)]
    return builder.op("Concat", *levels, name="output0", axis=1)


def _level_rows(b: GraphBuilder, raw: str, head: HeadShape, level: int) -> str:
    (height, width), stride, at = head.grids_hw[level], head.strides[level], f"rows.{level}"
    shape = b.ints(f"{at}.map_shape", [0, head.na, head.no, height, width])
    split = b.op("Reshape", raw, shape, name=f"{at}.map")
    last = b.op("Transpose", split, name=f"{at}.last", perm=[0, 1, 3, 4, 2])
    unit = b.op("Sigmoid", last, name=f"{at}.sigmoid")
    lengths = b.ints("rows.parts", [2, 2, head.no - 4])
    xy, wh, rest = b.ops("Split", unit, lengths, names=[f"{at}.{part}" for part in ("txy", "twh", "rest")], axis=4)
    two = b.floats("two", 2.0)
    ys, xs = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    cells = b.floats(f"{at}.cells", np.stack([xs, ys], -1)[None, None] - 0.5)
    shifted = b.op("Add", b.op("Mul", xy, two, name=f"{at}.xy2"), cells, name=f"{at}.shifted")
    centre = b.op("Mul", shifted, b.floats(f"{at}.stride", stride), name=f"{at}.xy")
    anchors = b.floats(f"{at}.anchors", head.anchors_px[level][None, :, None, None])
    doubled = b.op("Mul", wh, two, name=f"{at}.wh2")
    size = b.op("Mul", b.op("Mul", doubled, doubled, name=f"{at}.wh4"), anchors, name=f"{at}.wh")
    joined = b.op("Concat", centre, size, rest, name=f"{at}.decoded", axis=4)
    flat = b.ints("rows.flat_shape", [0, -1, head.no])
    return b.op("Reshape", joined, flat, name=at)


# --------------------------------------------------------------------------------------------- boxes

PROBES = ("candidates.row", "candidates.boxes", "candidates.score", "candidates.class", "nms.keep")
"""Inner tensors of the boxes graph that the check against torch reads: (K,), (K,4), (K,), (K,), (1,K)."""


def boxes_tail(
    builder: GraphBuilder,
    maps: Sequence[tuple[str, str]],
    head: HeadShape,
    nms: NmsShape,
    geometry: LetterboxGeometry | None = None,
) -> str:
    """(box, class) maps of each level -> `detections` (1, max_det, 6): x1 y1 x2 y2 score class, best first.

    Rows without a detection are all zero and come last. Pixels of the canvas, or of the frame with a `geometry`.
    """
    row, score = _candidates(builder, maps, head, min(nms.candidates, head.rows))
    geometry_rows, box_logits, class_logits = _gather(builder, maps, head, row)
    boxes = _decode(builder, box_logits, *geometry_rows)
    best = builder.op("ArgMax", class_logits, name="candidates.index", axis=1, keepdims=0)
    classes = builder.op("Cast", best, name="candidates.class", to=FLOAT)
    keep = _cluster_nms(builder, boxes, classes, min(nms.candidates, head.rows), nms)
    return _compact(builder, boxes, score, classes, keep, head, nms, geometry)


def _candidates(b: GraphBuilder, maps: Sequence[tuple[str, str]], head: HeadShape, count: int) -> tuple[str, str]:
    """The `count` best rows: flat row number (K,) int64 and score (K,).

    The maximum over classes is taken on logits in the layout that the convolution wrote: σ is monotone, so two
    sigmoids a row remain of 1 + nc, and nothing is transposed.
    """
    levels = []
    for level, (box, cls) in enumerate(maps):
        cells, at = head.level_rows[level] // head.na, f"score.{level}"
        by_anchor = b.op("Reshape", box, b.ints(f"{at}.box_shape", [head.na, 5, cells]), name=f"{at}.box")
        objectness = b.op("Gather", by_anchor, b.ints("four", 4), name=f"{at}.obj", axis=1)
        classes = b.op("Reshape", cls, b.ints(f"{at}.cls_shape", [head.na, head.nc, cells]), name=f"{at}.cls")
        best = _reduce_max(b, classes, head.nc, f"{at}.best")
        pair = [b.op("Sigmoid", x, name=f"{x}.sigmoid") for x in (objectness, best)]
        product = b.op("Mul", *pair, name=f"{at}.product")
        levels.append(b.op("Reshape", product, b.ints("flat", [-1]), name=at))
    scores = b.op("Concat", *levels, name="scores", axis=0)
    score, row = b.ops(
        "TopK", scores, b.ints("candidates.count", [count]), names=("candidates.score", "candidates.row"), axis=0
    )
    return row, score


def _reduce_max(b: GraphBuilder, classes: str, nc: int, name: str) -> str:
    """(na, nc, cells) -> (na, cells)."""
    if nc == 1:
        return b.op("Squeeze", classes, b.ints("one", [1]), name=name)
    if b.opset < 18:  # axes became an input
        return b.op("ReduceMax", classes, name=name, axes=[1], keepdims=0)
    return b.op("ReduceMax", classes, b.ints("one", [1]), name=name, keepdims=0)


def _gather(
    b: GraphBuilder, maps: Sequence[tuple[str, str]], head: HeadShape, row: str
) -> tuple[tuple[str, str, str], str, str]:
    """Candidate rows -> ((cell − 0.5, stride, anchor), box logits (K,5), class logits (K,nc)), levels merged.

    Each level is read at every candidate, clipped into its range, and the level that owns the row is chosen after:
    K gathered rows a level cost less than joining the maps.
    """
    column = b.op("Reshape", row, b.ints("column", [-1, 1]), name="candidates.column")
    merged: list[str] = []
    for level, (box, cls) in enumerate(maps):
        parts = _gather_level(b, box, cls, head, level, column)
        if level == 0:
            merged = parts
            continue
        start = b.ints(f"gather.{level}.start", sum(head.level_rows[:level]))
        here = b.op("GreaterOrEqual", column, start, name=f"gather.{level}.here")
        merged = [
            b.op("Where", here, new, old, name=f"gather.{level}.part{i}")
            for i, (new, old) in enumerate(zip(parts, merged, strict=True))
        ]
    cell, stride, anchor, box_logits, class_logits = merged
    return (cell, stride, anchor), box_logits, class_logits


def _gather_level(b: GraphBuilder, box: str, cls: str, head: HeadShape, level: int, column: str) -> list[str]:
    (height, width), rows, at = head.grids_hw[level], head.level_rows[level], f"gather.{level}"
    cells = b.ints(f"{at}.cells", height * width)
    local = b.op("Sub", column, b.ints(f"{at}.offset", sum(head.level_rows[:level])), name=f"{at}.local")
    local = b.op("Max", local, b.ints("zero", 0), name=f"{at}.floor")
    local = b.op("Min", local, b.ints(f"{at}.last", rows - 1), name=f"{at}.clipped")
    anchor, cell = _divmod(b, local, cells, f"{at}.anchor", f"{at}.cell")
    y, x = _divmod(b, cell, b.ints(f"{at}.width", width), f"{at}.y", f"{at}.x")
    xy = b.op("Cast", b.op("Concat", x, y, name=f"{at}.xy", axis=1), name=f"{at}.xy_float", to=FLOAT)
    corner = b.op("Sub", xy, b.floats("half", 0.5), name=f"{at}.corner")
    sizes = b.floats(f"{at}.anchors", head.anchors_px[level])
    flat_anchor = b.op("Reshape", anchor, b.ints("flat", [-1]), name=f"{at}.anchor_flat")
    size = b.op("Gather", sizes, flat_anchor, name=f"{at}.size", axis=0)
    stride = b.floats(f"{at}.stride", [[head.strides[level]]])
    logits = [
        _gather_channels(b, source, count, height * width, anchor, cell, f"{at}.{kind}")
        for source, count, kind in ((box, 5, "box"), (cls, head.nc, "cls"))
    ]
    return [corner, stride, size, *logits]


def _divmod(b: GraphBuilder, value: str, divisor: str, quotient_name: str, rest_name: str) -> tuple[str, str]:
    quotient = b.op("Div", value, divisor, name=quotient_name)
    whole = b.op("Mul", quotient, divisor, name=f"{rest_name}.whole")
    return quotient, b.op("Sub", value, whole, name=rest_name)


def _gather_channels(b: GraphBuilder, source: str, count: int, cells: int, anchor: str, cell: str, at: str) -> str:
    """Map (1, na·count, H, W) and candidates' anchor and cell (K,1) -> (K, count)."""
    block = b.op("Mul", anchor, b.ints(f"{at}.block_size", count * cells), name=f"{at}.block")
    first = b.op("Add", block, cell, name=f"{at}.first")
    index = b.op("Add", first, b.ints(f"{at}.channels", np.arange(count)[None] * cells), name=f"{at}.index")
    flat = b.op("Reshape", source, b.ints("flat", [-1]), name=f"{at}.flat")
    return b.op("Gather", flat, index, name=f"{at}.values", axis=0)


def _decode(b: GraphBuilder, logits: str, cell: str, stride: str, anchor: str) -> str:
    """Box logits (K,5) -> `candidates.boxes` (K,4) x1 y1 x2 y2 in canvas pixels."""
    unit = b.op("Sigmoid", logits, name="decode.unit")
    parts = b.ints("decode.parts", [2, 2, 1])
    xy, wh, _ = b.ops("Split", unit, parts, names=("decode.txy", "decode.twh", "decode.obj"), axis=1)
    two = b.floats("two", 2.0)
    shifted = b.op("Add", b.op("Mul", xy, two, name="decode.xy2"), cell, name="decode.shifted")
    centre = b.op("Mul", shifted, stride, name="decode.xy")
    doubled = b.op("Mul", wh, two, name="decode.wh2")
    size = b.op("Mul", b.op("Mul", doubled, doubled, name="decode.wh4"), anchor, name="decode.wh")
    half = b.op("Mul", size, b.floats("half", 0.5), name="decode.half")
    corners = [b.op(kind, centre, half, name=f"decode.{kind.lower()}") for kind in ("Sub", "Add")]
    return b.op("Concat", *corners, name="candidates.boxes", axis=1)


def _cluster_nms(b: GraphBuilder, boxes: str, classes: str, count: int, nms: NmsShape) -> str:
    """`nms.keep` (1,K): 1 for the rows that survive."""
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
    b: GraphBuilder, boxes: str, score: str, classes: str, keep: str,
    head: HeadShape, nms: NmsShape, geometry: LetterboxGeometry | None,
) -> str:  # fmt: skip
    """Survivors first: (1, max_det, 6), padded with zero rows where there are fewer candidates than `max_det`."""
    flat_keep = b.op("Reshape", keep, b.ints("flat", [-1]), name="out.keep")
    kept = b.op("Mul", score, flat_keep, name="out.kept")
    count = min(nms.max_det, nms.candidates, head.rows)
    best, order = b.ops("TopK", kept, b.ints("out.count", [count]), names=("out.score", "out.order"), axis=0)
    picked = b.op("Gather", boxes, order, name="out.boxes", axis=0)
    if geometry is not None:
        picked = _to_frame(b, picked, geometry)
    column = b.ints("column", [-1, 1])
    label = b.op("Reshape", b.op("Gather", classes, order, name="out.class", axis=0), column, name="out.class_column")
    points = b.op("Reshape", best, column, name="out.score_column")
    rows = b.op("Concat", picked, points, label, name="out.rows", axis=1)
    filled = b.op(
        "Cast", b.op("Greater", points, b.floats("nought", 0.0), name="out.some"), name="out.filled", to=FLOAT
    )
    rows = b.op("Mul", rows, filled, name="out.cleared")
    if count < nms.max_det:
        rows = b.op(
            "Concat", rows, b.floats("out.empty", np.zeros((nms.max_det - count, 6))), name="out.padded", axis=0
        )
    return b.op("Reshape", rows, b.ints("out.shape", [1, nms.max_det, 6]), name="detections")


def _to_frame(b: GraphBuilder, boxes: str, geometry: LetterboxGeometry) -> str:
    """Canvas pixels -> frame pixels, clipped to the frame."""
    height, width = geometry.frame_hw
    shift = b.floats("frame.pad", [[*geometry.fit.pad_wh, *geometry.fit.pad_wh]])
    moved = b.op("Sub", boxes, shift, name="frame.moved")
    scaled = b.op("Div", moved, b.floats("frame.gain", geometry.fit.gain), name="frame.scaled")
    low = b.op("Max", scaled, b.floats("nought", 0.0), name="frame.low")
    return b.op("Min", low, b.floats("frame.limit", [[width, height, width, height]]), name="frame.boxes")


# ----------------------------------------------------------------------------------------- reference


def cluster_nms(boxes_xyxy: np.ndarray, classes: np.ndarray, iou: float, iterations: int) -> np.ndarray:
    """The same NMS in NumPy, operation by operation in float32: rows (K,4) best first -> keep (K,) bool."""
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
