"""Choose columns of a matrix in a graph: the best ones, and those of given numbers."""

from __future__ import annotations

from compress.graph.builder import GraphBuilder

TENSORRT_MOST = 3840
"""Most values that TensorRT's TopK returns."""


def top_columns(b: GraphBuilder, scores: str, width: int, count: int, at: str) -> tuple[str, str, str]:
    """The `count` best of `scores` (1,`width`), best first: value and index (1,count), and the next value (1,1).

    Of equal ones the first comes first. The next value is 0 where there is none.
    """
    taken = max(min(count + 1, width), _fewest(width))
    ends = ("", "_next", "_worse")
    lengths = [length for length in (count, min(1, taken - count), taken - count - 1) if length > 0]
    names = [f"{at}.score", f"{at}.row"] if taken == count else [f"{at}.sorted", f"{at}.sorted_row"]
    found = b.ops("TopK", scores, b.ints(f"{at}.size", [taken]), names=names, axis=1)
    if taken == count:
        return found[0], found[1], b.floats("nothing", [[0.0]])
    parts = b.ints(f"{at}.parts", lengths)
    values, rows = (
        b.ops("Split", source, parts, names=[f"{at}.{part}{end}" for end in ends[: len(lengths)]], axis=1)
        for source, part in zip(found, ("score", "row"), strict=True)
    )
    return values[0], rows[0], values[1]


def _fewest(width: int) -> int:
    """The fewest of `width` values that ONNX Runtime selects at once; it takes longer for fewer, with a heap.

    It changes over at width^0.725. Half of the time at 25200 rows, and no more at a few hundred.
    """
    fewest = int(width**0.725) + 1
    return fewest if width > 1000 and fewest <= TENSORRT_MOST else 0


def take(b: GraphBuilder, matrix: str, numbers: str, lines: int, count: int, name: str) -> str:
    """Columns `numbers` (1,count) of `matrix` (lines,N). ONNX Runtime's Gather would copy value by value."""
    if lines > 1:
        numbers = b.op("Expand", numbers, b.ints(f"{name}.shape", [lines, count]), name=f"{name}.index")
    return b.op("GatherElements", matrix, numbers, name=name, axis=1)
