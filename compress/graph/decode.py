"""Raw maps become rows: all of them, or the best ones that enter NMS.

Decode, with σ the sigmoid, per level of stride s, cell (gx, gy), anchor (aw, ah) in pixels:
    xy = (2σ(t_xy) + (cell − 0.5))·s        wh = (2σ(t_wh))²·anchor        score = σ(t_obj)·max σ(t_cls)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from compress.graph.builder import FLOAT, GraphBuilder


@dataclass(frozen=True)
class HeadShape:
    """The detection head: its raw maps, and `anchors_px` (nl, na, 2), width and height in pixels."""

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


class Candidates(NamedTuple):
    """Names of the tensors of the K rows that enter NMS, best first."""

    boxes: str
    """float32 (K,4), x1 y1 x2 y2 in canvas pixels."""
    scores: str
    """float32 (K,), objectness times best class."""
    classes: str
    """float32 (K,), the index of the best class."""


# ------------------------------------------------------------------------------------------ all rows


def decode_all_rows(builder: GraphBuilder, maps: Sequence[str], head: HeadShape) -> str:
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


# ---------------------------------------------------------------------------------------- candidates


def decode_candidates(
    builder: GraphBuilder, maps: Sequence[tuple[str, str]], head: HeadShape, count: int
) -> Candidates:
    """(box, class) maps of each level -> the `count` best rows, decoded."""
    row, score = _best_rows(builder, maps, head, count)
    cells, box_logits, class_logits = _gather(builder, maps, head, row)
    boxes = _decode(builder, box_logits, *cells)
    best = builder.op("ArgMax", class_logits, name="candidates.index", axis=1, keepdims=0)
    return Candidates(boxes, score, builder.op("Cast", best, name="candidates.class", to=FLOAT))


def _best_rows(b: GraphBuilder, maps: Sequence[tuple[str, str]], head: HeadShape, count: int) -> tuple[str, str]:
    """The `count` best rows: flat row number (K,) int64 and score (K,).

    The maximum over classes is taken on logits, in the layout that the convolution wrote: σ is monotone, so a row takes
    two sigmoids instead of 1 + nc, and nothing is transposed.
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

    Each level is read at every candidate, with the index clipped into its range; then the level that has the row is
    chosen. Gathering K rows a level costs less than joining the maps.
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
