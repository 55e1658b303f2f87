"""Ranges of the body's activations, measured on images: one calibration serves every INT8 flavour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from compress.graph.parts import GraphParts
from compress.graph.preprocess import PIXELS
from compress.graph.session import exposing, open_session
from runtime.errors import EdgestillError

METHODS = ("minmax", "mse")
BINS = 2048
CLIPS = np.linspace(0.2, 1.0, 81)
"""Shares of a measured range that `mse` tries."""
SILU_FLOOR = -6.0
"""SiLU makes -0.015 of it, and less of all below, while the values before it go down to -127 in yolov5n. Without them
the steps of the integers are finer at no cost: int8-ort loses 0.48 ± 0.09 mAP instead of 0.90 ± 0.08 on BCCD, and its
logits err by 0.21 instead of 0.32 on COCO128, where the difference in mAP is not resolved. At -4 the logits err less
still, but the boxes more: 1 - IoU with those of FP32 is 0.055 there instead of 0.046 at -6."""
BYTES_AT_ONCE = 256 << 20
"""Activations that one pass returns; a large network's do not fit in memory together."""


@dataclass(frozen=True)
class Observed:
    """The values of one tensor: their range and, for `mse`, how many fell into each of `BINS` equal parts of it."""

    low: float
    high: float
    counts: NDArray[np.int64] | None = None

    @property
    def peak(self) -> float:
        return max(abs(self.low), abs(self.high))


Ranges = Mapping[str, Observed]


def calibrate(model: onnx.ModelProto, canvases: Iterable[np.ndarray], method: str) -> Ranges:
    """The values of every float tensor that a body's node reads or makes, as far as they matter to INT8.

    Pixels are 0..255 whatever the images hold, and what nothing but a SiLU reads has no range below `SILU_FLOOR`.
    `canvases` are uint8 (B,H,W,3), what the graph's input takes. They are read one at a time, once for "minmax" and
    twice for "mse", so memory does not grow with their number. Raises `EdgestillError` when there are none.
    """
    body = body_model(model)
    floored = _read_by_silu(GraphParts(body.graph))
    ranges = {
        name: _above_floor(observed) if name in floored else observed
        for name, observed in measured(body, canvases).items()
    }
    if method == "mse":
        ranges = _with_counts(body, ranges, canvases)
    return {name: PIXEL_RANGE if name in PIXELS else observed for name, observed in ranges.items()}


def measured(body: onnx.ModelProto, canvases: Iterable[np.ndarray]) -> dict[str, Observed]:
    """Smallest and largest value of every float tensor that a node of the `body_model` reads or makes."""
    return {name: Observed(*ends) for name, ends in _ends(body, _activations(body), canvases).items()}


def _above_floor(observed: Observed) -> Observed:
    return Observed(max(observed.low, SILU_FLOOR), max(observed.high, SILU_FLOOR))


PIXEL_RANGE = Observed(0.0, 255.0)


def body_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model up to the raw maps of the detect convolutions: without decode and NMS."""
    parts = GraphParts(model.graph)
    outputs = [parts.nodes[i].output[0] for i in parts.detect_convs]
    source = model.graph.input[0].name
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([source], outputs)


def _activations(body: onnx.ModelProto) -> list[str]:
    """Float tensors that nodes between the preprocessing and the detect convolutions read or make, in order."""
    parts = GraphParts(body.graph)
    known = {value.name: value.type.tensor_type for value in [*body.graph.value_info, *body.graph.input]}
    inner = [node for i, node in enumerate(parts.nodes) if i not in parts.preprocessing and i not in parts.detect_convs]
    names = dict.fromkeys(name for node in inner for name in (*node.input, *node.output))
    return [name for name in names if name in known and known[name].elem_type == TensorProto.FLOAT]


def _read_by_silu(parts: GraphParts) -> set[str]:
    """The tensors that nothing reads but the two nodes of a SiLU, x · sigmoid(x)."""
    found = set()
    for name, readers in parts.consumers.items():
        nodes = [parts.nodes[i] for i in readers]
        gates = [node.output[0] for node in nodes if node.op_type == "Sigmoid"]
        products = [node for node in nodes if node.op_type == "Mul" and gates and {*node.input} == {name, gates[0]}]
        if len(gates) == len(products) == 1 and len(nodes) == 2:
            found.add(name)
    return found


def _ends(
    body: onnx.ModelProto, names: Sequence[str], canvases: Iterable[np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Smallest and largest value of each tensor over all images; the graph itself reduces them to two numbers."""
    reduced = onnx.ModelProto()
    reduced.CopyFrom(body)
    outputs = [f"{name}.{end}" for end in ("low", "high") for name in names]
    kinds = ["ReduceMin"] * len(names) + ["ReduceMax"] * len(names)
    for kind, name, output in zip(kinds, [*names, *names], outputs, strict=True):
        reduced.graph.node.append(helper.make_node(kind, [name], [output], name=output, keepdims=0))
        reduced.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    session, source = open_session(reduced), body.graph.input[0].name
    seen = np.array([session.run(outputs, {source: canvas}) for canvas in canvases], np.float64)
    if not len(seen):
        raise EdgestillError("there are no images to calibrate on", "Give a data set whose train split has images")
    low, high = seen[:, : len(names)].min(0), seen[:, len(names) :].max(0)
    return {name: (float(a), float(b)) for name, a, b in zip(names, low, high, strict=True)}


def _with_counts(body: onnx.ModelProto, ranges: Ranges, canvases: Iterable[np.ndarray]) -> dict[str, Observed]:
    counts = {name: np.zeros(BINS, np.int64) for name in ranges}
    for names in _groups(body, list(ranges)):
        session, source = open_session(exposing(body, names)), body.graph.input[0].name
        for canvas in canvases:
            for name, values in zip(names, session.run(names, {source: canvas}), strict=True):
                counts[name] += np.histogram(values, BINS, (ranges[name].low, _above(ranges[name])))[0]
    return {name: Observed(ends.low, ends.high, counts[name]) for name, ends in ranges.items()}


def _above(ends: Observed) -> float:
    """The upper end; a tensor that is constant, or all but constant, still has a range that can be divided."""
    narrowest = BINS * float(np.spacing(np.float32(ends.peak)))
    return ends.high if ends.high - ends.low > narrowest else ends.low + max(1.0, 2 * narrowest)


def _groups(body: onnx.ModelProto, names: Sequence[str]) -> Iterator[list[str]]:
    """The tensors in groups that fit into `BYTES_AT_ONCE`."""
    shapes = {value.name: value.type.tensor_type.shape.dim for value in body.graph.value_info}
    group: list[str] = []
    total = 0
    for name in names:
        size = 4 * int(np.prod([dimension.dim_value or 1 for dimension in shapes[name]]))
        if group and total + size > BYTES_AT_ONCE:
            yield group
            group, total = [], 0
        group.append(name)
        total += size
    yield group


# ------------------------------------------------------------------------------------------------------------- scales


def scale_of(observed: Observed, *, unsigned: bool) -> tuple[float, int]:
    """Scale and zero point of a tensor: 0 is exact, and the range is the measured one or, with counts, the one of the
    smallest mean squared error.

    Signed integers are symmetric, -127..127 for the range; unsigned ones cover 0..255.
    """
    if not unsigned:
        peak = _best(observed, [(-share * observed.peak, share * observed.peak) for share in CLIPS], unsigned)[1]
        return (peak / 127 or 1.0), 0
    low, high = min(observed.low, 0.0), max(observed.high, 0.0)
    low, high = _best(observed, [(low, share * high) for share in CLIPS], unsigned)
    low, high = _best(observed, [(share * low, high) for share in CLIPS], unsigned)
    return _unsigned(low, high)


def _unsigned(low: float, high: float) -> tuple[float, int]:
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def _best(observed: Observed, ends: Sequence[tuple[float, float]], unsigned: bool) -> tuple[float, float]:
    """The range of the smallest error; the last, the whole one, without counts."""
    if observed.counts is None:
        return ends[-1]
    edges = np.linspace(observed.low, _above(observed), BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    errors = [_squared_error(centres, observed.counts, pair, unsigned) for pair in ends]
    return ends[len(ends) - 1 - int(np.argmin(errors[::-1]))]  # of equal ones the widest


def _squared_error(values: Any, counts: Any, ends: tuple[float, float], unsigned: bool) -> float:
    scale, zero = _unsigned(*ends) if unsigned else ((ends[1] / 127 or 1.0), 0)
    least, most = (0, 255) if unsigned else (-128, 127)
    stored = np.clip(np.rint(values / scale) + zero, least, most)
    return float(counts @ (values - (stored - zero) * scale) ** 2)
