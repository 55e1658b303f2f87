"""Choose columns of matrices in a graph, one matrix an image: the best ones, and those of given numbers."""

from __future__ import annotations

import numpy as np

from compress.graph.builder import GraphBuilder

TENSORRT_MOST = 3840
"""Most values that TensorRT's TopK returns."""


def top_columns(b: GraphBuilder, scores: str, width: int, count: int, at: str) -> tuple[str, str, str]:
    """The `count` best of `scores` (B,1,`width`), best first: value and index (B,1,count), and the next value (B,1,1).

    Scores are 0 or more. Of equal ones the first comes first, but not in OpenVINO. The next value is 0 where there is
    none; the column that then stands for it is worse than any, so that it is never among the best.
    """
    is_all = count == width
    if is_all:
        pads, worse = b.ints("one_column", [0, 0, 0, 0, 0, 1]), b.floats("worse_than_any", -1.0)
        scores = b.op("Pad", scores, pads, worse, name=f"{at}.and_none", mode="constant")
        width += 1
    taken = max(count + 1, _fewest(width))
    ends = ("", "_next", "_worse")
    lengths = [length for length in (count, 1, taken - count - 1) if length > 0]
    found = b.ops("TopK", scores, b.ints(f"{at}.size", [taken]), names=[f"{at}.sorted", f"{at}.sorted_row"], axis=2)
    parts = b.ints(f"{at}.parts", lengths)
    values, rows = (
        b.ops("Split", source, parts, names=[f"{at}.{part}{end}" for end in ends[: len(lengths)]], axis=2)
        for source, part in zip(found, ("score", "row"), strict=True)
    )
    following = b.op("Relu", values[1], name=f"{at}.score_after") if is_all else values[1]
    return values[0], rows[0], following


def _fewest(width: int) -> int:
    """The fewest of `width` values that ONNX Runtime selects at once; it takes longer for fewer, with a heap.

    It changes over at width^0.725. Half of the time at 25200 rows, and no more at a few hundred.
    """
    fewest = int(width**0.725) + 1
    return fewest if width > 1000 and fewest <= TENSORRT_MOST else 0


def take(b: GraphBuilder, matrix: str, numbers: str, lines: int, count: int, name: str) -> str:
    """Columns `numbers` (B,1,count) of `matrix` (B,lines,N). ONNX Runtime's Gather would copy value by value."""
    if lines > 1:
        numbers = b.op("Expand", numbers, b.ints(f"{name}.shape", [1, lines, count]), name=f"{name}.index")
    return b.op("GatherElements", matrix, numbers, name=name, axis=2)


def look_up(b: GraphBuilder, table: np.ndarray, numbers: str, name: str) -> str:
    """Columns `numbers` (B,1,count) of the constant `table` (lines,N), which all images share: (B,lines,count)."""
    flat = b.op("Reshape", numbers, b.ints("image_rows", [0, -1]), name=f"{name}.numbers")
    rows = b.op("Gather", b.constant(f"{name}.table", table.T), flat, name=f"{name}.rows", axis=0)
    return b.op("Transpose", rows, name=name, perm=[0, 2, 1])
