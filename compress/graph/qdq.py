"""Write explicit Q/DQ: one pair for each placed tensor, integer weights with a scale for each output channel.

Preprocessing, detect convolutions, decode and NMS stay in float in every scheme: one scale cannot cover 0-640 px and
0-1.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from compress.graph.fp16 import body_to_fp16
from compress.graph.parts import GraphParts, sort_topologically
from compress.graph.placement import Placement, place
from compress.graph.ranges import Ranges, scale_of
from compress.graph.stem import space_to_depth
from compress.schemes import Scheme

DRAW_STEP = 3e-6
HALF_DRAW_STEP = 2.0**-10
"""Share by which a draw moves one scale: a few units in the last place of float32, one of FP16."""


def quantised(
    model: onnx.ModelProto,
    ranges: Ranges,
    scheme: Scheme,
    *,
    float_layers: Collection[str] = (),
    only: str | None = None,
    draw: int = 0,
) -> onnx.ModelProto:
    """A Q/DQ copy of the FP32 `model`, with activation `ranges` of a calibration.

    `float_layers` and `only` are those of `compress.graph.placement.place`. Rounding is chaotic: a change of 3e-6 in
    one scale moves mAP by 0.1 to 0.35. Each `draw` above 0 moves the first scale by so little, so the spread of
    several draws is that of the rounding.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    parts = GraphParts(result.graph)
    writer = _Writer(result.graph, parts, scheme)
    placement = place(parts, scheme, float_layers, only)
    writer.activations(placement, ranges, draw)
    for conv in placement.convs:
        writer.weights(parts.nodes[conv])
    writer.finish()
    sort_topologically(result.graph)
    del result.graph.value_info[:]
    if scheme.space_to_depth:
        space_to_depth(result)
    onnx.checker.check_model(result, full_check=True)
    return body_to_fp16(result) if scheme.half_body else result


def nudged(scale: float, draw: int, step: float) -> float:
    """The scale of a draw: 0 leaves it, 1 and 2 are a step above and below, 3 and 4 two steps."""
    return scale * (1 + (draw + 1) // 2 * (1 if draw % 2 else -1) * step)


@dataclass
class _Writer:
    """Adds pairs to one graph. New nodes are appended, and sorted at the end."""

    graph: onnx.GraphProto
    parts: GraphParts
    scheme: Scheme
    input_scales: dict[str, float] = field(default_factory=dict)
    """Dequantised tensor -> its scale."""

    def activations(self, placement: Placement, ranges: Ranges, draw: int) -> None:
        step = HALF_DRAW_STEP if self.scheme.half_body else DRAW_STEP
        for position, (name, readers) in enumerate(placement.readers.items()):
            scale, zero = scale_of(ranges[placement.ranged_by[name]], unsigned=self.scheme.unsigned)
            scale = float(self._stored(nudged(scale, 0 if position else draw, step)))
            stored, dequantised = f"{name}.quantised", f"{name}.dequantised"
            constants = [
                self._constant(f"{name}.scale", np.float32(scale)),
                self._constant(f"{name}.zero_point", np.asarray(zero, np.uint8 if self.scheme.unsigned else np.int8)),
            ]
            self._node("QuantizeLinear", [name, *constants], stored)
            self._node("DequantizeLinear", [stored, *constants], dequantised)
            self.input_scales[dequantised] = scale
            for index, at in readers:
                self.parts.nodes[index].input[at] = dequantised

    def weights(self, conv: onnx.NodeProto) -> None:
        name, peak = conv.input[1], self.scheme.weight_peak
        weights = self._values(name)
        channel_peaks = np.abs(weights).reshape(len(weights), -1).max(1)
        scales = self._stored(np.where(channel_peaks > 0, channel_peaks / peak, 1.0))
        integers = np.rint(weights / scales.reshape(-1, *[1] * (weights.ndim - 1)))
        conv.input[1] = self._dequantised(name, np.clip(integers, -peak, peak).astype(np.int8), scales)
        if self.scheme.integer_bias and len(conv.input) > 2 and conv.input[0] in self.input_scales:
            units = scales * np.float32(self.input_scales[conv.input[0]])
            most = np.iinfo(np.int32).max
            bias = np.clip(np.rint(self._values(conv.input[2]).astype(np.float64) / units), -most, most)
            conv.input[2] = self._dequantised(conv.input[2], bias.astype(np.int32), units)

    def finish(self) -> None:
        """Drop the float tensors that nothing reads any more."""
        used = {name for node in self.graph.node for name in node.input}
        kept = [tensor for tensor in self.graph.initializer if tensor.name in used]
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del self.graph.initializer[:]
        self.graph.initializer.extend(copies)

    def _stored(self, scale: float | NDArray[np.floating]) -> NDArray[np.float32]:
        """The scale as the file will hold it, so that integers and scale agree: FP16 has few digits, and no small
        numbers below 6e-5 that every library accepts.
        """
        values = np.asarray(scale, np.float32)
        if self.scheme.half_body:
            values = np.maximum(values, np.finfo(np.float16).tiny).astype(np.float16).astype(np.float32)
        return values

    def _dequantised(self, name: str, integers: NDArray[np.integer], scales: NDArray[np.float32]) -> str:
        constants = [
            self._constant(f"{name}.quantised", integers),
            self._constant(f"{name}.scale", scales),
            self._constant(f"{name}.zero_point", np.zeros(len(scales), integers.dtype)),
        ]
        return self._node("DequantizeLinear", constants, f"{name}.dequantised", axis=0)

    def _values(self, name: str) -> NDArray[np.floating]:
        return numpy_helper.to_array(next(tensor for tensor in self.graph.initializer if tensor.name == name))

    def _constant(self, name: str, values: NDArray | np.floating) -> str:
        self.graph.initializer.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def _node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.graph.node.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name
