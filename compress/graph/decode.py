"""Raw maps become rows: all of them, or the best ones that enter NMS.

Decode, with σ the sigmoid, per level of stride s, cell (gx, gy), anchor (aw, ah) in pixels:
    xy = (2σ(t_xy) + (cell − 0.5))·s        wh = (2σ(t_wh))²·anchor        score = σ(t_obj)·max σ(t_cls)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from compress.graph.builder import FLOAT, INT64, GraphBuilder
from compress.graph.classes import FewClasses, ManyClasses
from compress.graph.columns import look_up, take, top_columns
from compress.graph.head import HeadShape


class Candidates(NamedTuple):
    """Names of the tensors of the K rows that enter NMS, best first."""

    low: str
    """float32 (B,2,K), x1 y1 in canvas pixels."""
    high: str
    """float32 (B,2,K), x2 y2 in canvas pixels."""
    scores: str
    """float32 (B,1,K), objectness times best class."""
    classes: str
    """float32 (B,1,K), the index of the best class."""
    cutoff: str
    """float32 (B,1,1), the score of the best row that was left out; 0 where none was."""


# ------------------------------------------------------------------------------------------ all rows


def decode_all_rows(builder: GraphBuilder, maps: Sequence[str], head: HeadShape, *, fixed: bool = True) -> str:
    """Raw maps (B, na·no, H, W) of each level -> `output0` (B, N, 5+nc): xywh in pixels, objectness, classes.

    H and W are those of the head where it is `fixed`, else those of the maps.
    """
    grid = _fixed_grid if fixed else _open_grid
    levels = [
        _level_rows(builder, name, head, level, *grid(builder, name, head, level)) for level, name in enumerate(maps)
    ]
    return builder.op("Concat", *levels, name="output0", axis=1)


def _fixed_grid(b: GraphBuilder, _: str, head: HeadShape, level: int) -> tuple[str, str]:
    """The shape (5,) of the map with its channels split, and x − 0.5, y − 0.5 of its cells (1,1,H,W,2)."""
    (height, width), at = head.grids_hw[level], f"rows.{level}"
    ys, xs = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    cells = b.floats(f"{at}.cells", np.stack([xs, ys], -1)[None, None] - 0.5)
    return b.ints(f"{at}.map_shape", [0, head.na, head.no, height, width]), cells


def _open_grid(b: GraphBuilder, raw: str, head: HeadShape, level: int) -> tuple[str, str]:
    """As `_fixed_grid`, computed from the shape of the map."""
    at = f"rows.{level}"
    whole = b.op("Shape", raw, name=f"{at}.whole_shape")
    sides = b.op("Slice", whole, b.ints("spot.sides", [2]), b.ints("spot.end", [4]), name=f"{at}.sides")
    shape = b.op("Concat", b.ints("rows.channels", [0, head.na, head.no]), sides, name=f"{at}.map_shape", axis=0)
    axes = [
        _counted(
            b, b.op("Gather", whole, b.ints(f"spot.{side}", spot), name=f"{at}.{side}", axis=0), line, f"{at}.{axis}"
        )
        for axis, side, spot, line in (("x", "width", 3, [1, 1, 1, -1, 1]), ("y", "height", 2, [1, 1, -1, 1, 1]))
    ]
    grid = b.op("Concat", b.ints("rows.ones", [1, 1]), sides, b.ints("rows.one", [1]), name=f"{at}.grid_shape", axis=0)
    planes = [b.op("Expand", axis, grid, name=f"{axis}.plane") for axis in axes]
    return shape, b.op("Concat", *planes, name=f"{at}.cells", axis=4)


def _counted(b: GraphBuilder, count: str, shape: Sequence[int], at: str) -> str:
    """−0.5, 0.5, 1.5, ... as float32 in a `shape`; `count` () int64 is their number."""
    numbers = b.op("Range", b.ints("first", 0), count, b.ints("step", 1), name=f"{at}.range")
    floats = b.op("Cast", numbers, name=f"{at}.floats", to=FLOAT)
    line = b.op("Reshape", floats, b.ints("line." + "x".join(map(str, shape)), shape), name=f"{at}.line")
    return b.op("Sub", line, b.floats("half", 0.5), name=at)


def _level_rows(b: GraphBuilder, raw: str, head: HeadShape, level: int, shape: str, cells: str) -> str:
    stride, at = head.strides[level], f"rows.{level}"
    split = b.op("Reshape", raw, shape, name=f"{at}.map")
    last = b.op("Transpose", split, name=f"{at}.last", perm=[0, 1, 3, 4, 2])
    unit = b.op("Sigmoid", last, name=f"{at}.sigmoid")
    lengths = b.ints("rows.parts", [2, 2, head.no - 4])
    xy, wh, rest = b.ops("Split", unit, lengths, names=[f"{at}.{part}" for part in ("txy", "twh", "rest")], axis=4)
    two = b.floats("two", 2.0)
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
    """(box, class) maps of each level, as `network.split_detect` makes them -> the `count` best rows, decoded."""
    b = builder
    levels = [b.op("Reshape", box, b.ints("box_lines", [0, 5, -1]), name=f"{box}.matrix") for box, _ in maps]
    boxes = b.op("Concat", *levels, name="head.boxes", axis=2)
    parts = b.ints("four_one", [4, 1])
    sides, objectness = b.ops("Split", boxes, parts, names=("head.sides", "head.objectness"), axis=1)
    classes = (FewClasses if head.few_classes else ManyClasses)(b, [cls for _, cls in maps], head)
    pair = [b.op("Sigmoid", x, name=f"{x}.sigmoid") for x in (objectness, classes.best)]
    scores = b.op("Mul", *pair, name="scores")
    score, row, cutoff = top_columns(b, scores, head.rows, count, "candidates")
    place = look_up(b, _places(head), row, "candidates.place")
    cell, kind = b.ops("Split", place, b.ints("two_one", [2, 1]), names=("place.cell", "place.kind_value"), axis=1)
    kind = b.op("Cast", kind, name="place.kind", to=INT64)
    sizes = look_up(b, _sizes(head), kind, "place.sizes")
    low, high = _decode(b, take(b, sides, row, 4, count, "candidates.logits"), cell, sizes)
    return Candidates(low, high, score, classes.of_rows(row, kind, count), cutoff)


def _places(head: HeadShape) -> np.ndarray:
    """(3,N): x − 0.5, y − 0.5 and kind of each row, a number for each level and anchor."""
    levels = []
    for level, (height, width) in enumerate(head.grids_hw):
        ys, xs = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
        kinds = np.repeat(np.arange(head.na) + level * head.na, height * width)
        levels.append(np.stack([*(np.tile(values.ravel() - 0.5, head.na) for values in (xs, ys)), kinds]))
    return np.concatenate(levels, axis=1).astype(np.float32)


def _sizes(head: HeadShape) -> np.ndarray:
    """(3, nl·na): stride and twice the anchor of each kind."""
    anchors = 2 * np.asarray(head.anchors_px).reshape(-1, 2)
    return np.concatenate([np.repeat(head.strides, head.na)[:, None], anchors], axis=1).T.astype(np.float32)


def _decode(b: GraphBuilder, logits: str, cell: str, sizes: str) -> tuple[str, str]:
    """Box logits (B,4,K) -> x1 y1 (B,2,K) and x2 y2 (B,2,K) in canvas pixels."""
    stride, anchor = b.ops("Split", sizes, b.ints("one_two", [1, 2]), names=("decode.stride", "decode.anchor"), axis=1)
    unit = b.op("Sigmoid", logits, name="decode.unit")
    xy, wh = b.ops("Split", unit, b.ints("two_two", [2, 2]), names=("decode.txy", "decode.twh"), axis=1)
    shifted = b.op("Add", b.op("Mul", xy, b.floats("two", 2.0), name="decode.xy2"), cell, name="decode.shifted")
    centre = b.op("Mul", shifted, stride, name="decode.xy")
    half = b.op("Mul", b.op("Mul", wh, wh, name="decode.squared"), anchor, name="decode.half")
    low, high = (b.op(kind, centre, half, name=f"candidates.{end}") for kind, end in (("Sub", "low"), ("Add", "high")))
    return low, high
