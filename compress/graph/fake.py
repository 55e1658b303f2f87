"""Fake quantisation: the body of a graph in torch, which rounds where the body's INT8 file will round.

In: an FP32 graph, ranges and a scheme. Out: `FakeBody`, steps that compute the features of the head. They are the
nodes of the graph itself, and tensors are rounded by the placement that `compress.graph.qdq` writes, so a network
cannot be trained for another file than the one that is written. Gradients pass a rounding unchanged (the
straight-through estimator), and reach the scales (LSQ: Esser et al., ICLR 2020).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor

from compress.graph.parts import GraphParts
from compress.graph.placement import Placement, place
from compress.graph.preprocess import pixels_tensor
from compress.graph.ranges import PIXEL_RANGE, Observed, Ranges, scale_of
from compress.schemes import Scheme
from runtime.errors import EdgestillError

HALF_STEP = 0.5 * (1 + 1e-4)
"""A value that differs by more steps from its rounded one was clipped; the excess is for the error of the rounding."""


class Parameters(NamedTuple):
    """Everything that is learned."""

    weights: Mapping[str, Tensor]
    """Weights and biases by their names in the graph."""
    scales: Sequence[Tensor]
    """() float32 for each of `FakeBody.scaled`."""


class Step(NamedTuple):
    """One node of the graph, or one rounding, as a function of the parameters and the values that it reads."""

    run: Callable[[Parameters, Sequence[Tensor]], Tensor]
    inputs: tuple[str, ...]
    output: str
    spent: tuple[str, ...] = ()
    """Values that no later step reads."""


@dataclass(frozen=True)
class FakeBody:
    """The body of one graph as steps for torch."""

    steps: tuple[Step, ...]
    pixels: str
    """Name of the tensor with float BGR 0..255 (B,3,H,W), which the first step reads."""
    stem: str
    """Name of the weights that are multiplied with these pixels; empty if something lies between."""
    features: tuple[str, ...]
    """Values that the detect convolutions read, finest level first."""
    scaled: tuple[str, ...]
    """Tensors whose scale is learned; all that is quantised has the scale of one of them, but the pixels, whose range
    is known."""
    scales: tuple[float, ...]
    """Scales of the calibration."""
    zero_points: tuple[int, ...]
    unsigned: bool

    def __call__(self, pixels: Tensor, parameters: Parameters) -> list[Tensor]:
        """The features (B,C,H/s,W/s) of float BGR pixels 0..255 (B,3,H,W)."""
        values = {self.pixels: pixels}
        for step in self.steps:
            values[step.output] = step.run(parameters, [values[name] for name in step.inputs])
            for name in step.spent:
                del values[name]
        return [values[name] for name in self.features]

    def ranges(self, scales: Sequence[float]) -> dict[str, Observed]:
        """Ranges from which `scale_of` gives these scales, and the zero points."""
        least, most = (0, 255) if self.unsigned else (-127, 127)
        ends = zip(self.scaled, scales, self.zero_points, strict=True)
        learned = {name: Observed((least - zero) * scale, (most - zero) * scale) for name, scale, zero in ends}
        return {self.pixels: PIXEL_RANGE, **learned}


def fake_body(model: onnx.ModelProto, ranges: Ranges, scheme: Scheme, float_layers: Collection[str] = ()) -> FakeBody:
    """The body of the FP32 `model`, which rounds as the file of `quantised(model, ranges, scheme, float_layers=...)`.

    Raises `EdgestillError` naming the operator when the body has one that is not known here.
    """
    parts = GraphParts(model.graph)
    placement, pixels = place(parts, scheme, float_layers), pixels_tensor(model)
    scaled = tuple(dict.fromkeys(placement.ranged_by[name] for name in placement.readers))
    scaled = tuple(name for name in scaled if name != pixels)
    made = [scale_of(ranges[name], unsigned=scheme.unsigned) for name in scaled]
    zero_points = tuple(zero for _, zero in made)
    compiler = _Compiler(model, parts, placement, scheme, pixels, scaled, zero_points)
    steps = tuple(compiler.steps())
    features = tuple(dict.fromkeys(compiler.read(i, 0) for i in parts.detect_convs))
    return FakeBody(
        tuple(_with_spent(steps, features)), pixels, compiler.stem, features, scaled,
        tuple(scale for scale, _ in made), zero_points, scheme.unsigned,
    )  # fmt: skip


@dataclass(frozen=True)
class _Compiler:
    """Turns nodes into steps, each behind the roundings of what it reads."""

    model: onnx.ModelProto
    parts: GraphParts
    placement: Placement
    scheme: Scheme
    pixels: str
    scaled: tuple[str, ...]
    zero_points: tuple[int, ...]

    @property
    def stem(self) -> str:
        node = self.parts.nodes[self.parts.convs[0]]
        return node.input[1] if node.input[0] == self.pixels else ""

    def read(self, index: int, at: int) -> str:
        """The value that a node reads at one of its inputs: the tensor as it is, or rounded."""
        name = self.parts.nodes[index].input[at]
        return _rounded(name) if (index, at) in self.placement.readers.get(name, ()) else name

    def steps(self) -> Iterator[Step]:
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}
        made: set[str] = set()
        for index in self._needed():
            node = self.parts.nodes[index]
            inputs = [self.read(index, at) for at, name in enumerate(node.input) if name not in constants and name]
            yield from (self._rounding(name) for name in dict.fromkeys(node.input) if self._is_due(name, inputs, made))
            made.update(inputs)
            if node.op_type == "Conv":
                yield self._convolution(index, node, inputs[0])
            else:
                yield Step(_operator(node, constants), tuple(inputs), node.output[0])
        detect = dict.fromkeys((self.parts.nodes[i].input[0], self.read(i, 0)) for i in self.parts.detect_convs)
        yield from (self._rounding(name) for name, value in detect if self._is_due(name, [value], made))

    @staticmethod
    def _is_due(name: str, inputs: Sequence[str], made: Collection[str]) -> bool:
        """Whether the rounded tensor is read here first."""
        return _rounded(name) in inputs and _rounded(name) not in made

    def _needed(self) -> list[int]:
        """Nodes on which the detect convolutions depend, as far as the pixels, in the graph's order."""
        found: set[int] = set()
        todo = [self.parts.nodes[i].input[0] for i in self.parts.detect_convs]
        while todo:
            name = todo.pop()
            index = self.parts.producer.get(name)
            if name != self.pixels and index is not None and index not in found:
                found.add(index)
                todo.extend(self.parts.nodes[index].input)
        return sorted(found)

    def _rounding(self, name: str) -> Step:
        source, half = self.placement.ranged_by[name], self.scheme.half_body
        least, most = (0, 255) if self.scheme.unsigned else (-128, 127)
        if source == self.pixels:
            scale, _ = scale_of(PIXEL_RANGE, unsigned=self.scheme.unsigned)
            return Step(partial(_round_pixels, scale, least, most), (name,), _rounded(name))
        position = self.scaled.index(source)
        zero = self.zero_points[position]
        return Step(partial(_round_values, position, least - zero, most - zero, half), (name,), _rounded(name))

    def _convolution(self, index: int, node: onnx.NodeProto, source: str) -> Step:
        peak = self.scheme.weight_peak if index in self.placement.convs else 0
        bias = node.input[2] if len(node.input) > 2 else ""
        run = partial(_convolve, node.input[1], bias, _conv_settings(node), peak, self.scheme.half_body)
        return Step(run, (source,), node.output[0])


def _rounded(name: str) -> str:
    return f"{name}.dequantised"


def _with_spent(steps: Sequence[Step], features: Collection[str]) -> Iterator[Step]:
    last = {name: index for index, step in enumerate(steps) for name in step.inputs}
    for index, step in enumerate(steps):
        spent = tuple(name for name in dict.fromkeys(step.inputs) if last[name] == index and name not in features)
        yield step._replace(spent=spent)


# ---- roundings ------------------------------------------------------------------------------------------------------


def stored(scale: Tensor, half: bool) -> Tensor:
    """The scale as the file holds it, with the gradient of the scale: FP16 has few digits."""
    if not half:
        return scale
    with torch.no_grad():
        values = scale.clamp_min(torch.finfo(torch.float16).tiny).half().float()
    return values + (scale - scale.detach())


def fake_weights(weights: Tensor, peak: int, half: bool = False) -> Tensor:
    """Weights (O,I,h,w) rounded to integers of at most `peak` times a scale for each output channel.

    The gradient by the rounded weights is that by the weights.
    """
    with torch.no_grad():
        peaks = weights.abs().amax((1, 2, 3), keepdim=True)
        scales = stored(torch.where(peaks > 0, peaks / peak, torch.ones_like(peaks)), half)
        rounded = (weights / scales).round_().clamp_(-peak, peak).mul_(scales)
    return rounded + (weights - weights.detach())


class FakeQuantise(torch.autograd.Function):
    """round(x / scale), clipped, times the scale, with a straight-through gradient.

    With y the result, m 1 where x is not clipped, and g the gradient by y: the gradient by x is g m, and the one by the
    scale, g (y / scale - m x / scale), summed. Where x is clipped, y / scale is the end of the range.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
        """`least` and `most` are the ends of the integers less their zero point."""
        y = (x / scale).round_().clamp_(least, most).mul_(scale)
        ctx.save_for_backward(x, y, scale)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (x, y, scale) = gradients, ctx.saved_tensors
        passed = gradient * ((x - y).abs_() <= HALF_STEP * scale)
        return passed, ((gradient * y).sum() - (passed * x).sum()) / scale, None, None


def _round_values(
    position: int, least: int, most: int, half: bool, parameters: Parameters, values: Sequence[Tensor]
) -> Tensor:
    found: Tensor = FakeQuantise.apply(values[0], stored(parameters.scales[position], half), least, most)
    return found


def _round_pixels(scale: float, least: int, most: int, _: Parameters, values: Sequence[Tensor]) -> Tensor:
    return (values[0] / scale).round_().clamp_(least, most).mul_(scale)


# ---- operators ------------------------------------------------------------------------------------------------------


def _convolve(
    weight: str, bias: str, settings: Mapping[str, Any], peak: int, half: bool, parameters: Parameters,
    values: Sequence[Tensor],
) -> Tensor:  # fmt: skip
    weights = parameters.weights[weight]
    weights = fake_weights(weights, peak, half) if peak else weights
    return F.conv2d(values[0], weights, parameters.weights[bias] if bias else None, **settings)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _conv_settings(node: onnx.NodeProto) -> dict[str, Any]:
    known = _attributes(node)
    return {
        "stride": tuple(known["strides"]),
        "padding": tuple(known["pads"][:2]),
        "dilation": tuple(known["dilations"]),
        "groups": known["group"],
    }


Constants = Mapping[str, NDArray[Any]]


def _operator(node: onnx.NodeProto, constants: Constants) -> Callable[[Parameters, Sequence[Tensor]], Tensor]:
    if node.op_type not in OPERATORS:
        raise EdgestillError(
            f"the graph uses {node.op_type}, which fake quantisation does not know",
            f"Known: Conv, {', '.join(sorted(OPERATORS))}",
        )
    return partial(_apply, OPERATORS[node.op_type](node, constants))


def _apply(function: Callable[..., Tensor], _: Parameters, values: Sequence[Tensor]) -> Tensor:
    return function(*values)


def _plain(function: Callable[..., Tensor]) -> Callable[[onnx.NodeProto, Constants], Callable[..., Tensor]]:
    """An operator with one or two operands, of which the second may be a constant."""

    def make(node: onnx.NodeProto, constants: Constants) -> Callable[..., Tensor]:
        fixed = [float(constants[name]) for name in node.input if name in constants]
        return partial(_with_constants, function, tuple(fixed)) if fixed else function

    return make


def _with_constants(function: Callable[..., Tensor], fixed: tuple[float, ...], *values: Tensor) -> Tensor:
    return function(*values, *fixed)


def _max_pool(node: onnx.NodeProto, _: Constants) -> Callable[..., Tensor]:
    known = _attributes(node)
    kernel, stride, padding = known["kernel_shape"], known["strides"], known["pads"][:2]
    return partial(F.max_pool2d, kernel_size=kernel, stride=stride, padding=padding)


def _resize(node: onnx.NodeProto, constants: Constants) -> Callable[..., Tensor]:
    return partial(F.interpolate, scale_factor=tuple(map(float, constants[node.input[2]][2:])), mode="nearest")


def _concat(node: onnx.NodeProto, _: Constants) -> Callable[..., Tensor]:
    return partial(_joined, int(_attributes(node)["axis"]))


def _joined(axis: int, *values: Tensor) -> Tensor:
    return torch.cat(values, axis)


def _slice(node: onnx.NodeProto, constants: Constants) -> Callable[..., Tensor]:
    starts, ends, axes, steps = (constants[name].tolist() for name in node.input[1:5])
    window = {axis: slice(*one) for *one, axis in zip(starts, ends, steps, axes, strict=True)}
    return partial(_sliced, tuple(window.get(axis, slice(None)) for axis in range(4)))


def _sliced(window: tuple[slice, ...], values: Tensor) -> Tensor:
    return values[window]


def _gather(node: onnx.NodeProto, constants: Constants) -> Callable[..., Tensor]:
    order = torch.from_numpy(np.array(constants[node.input[1]]))
    return partial(_gathered, int(_attributes(node)["axis"]), order)


def _gathered(axis: int, order: Tensor, values: Tensor) -> Tensor:
    return values.index_select(axis, order.to(values.device))


def _leaky_relu(node: onnx.NodeProto, _: Constants) -> Callable[..., Tensor]:
    return partial(F.leaky_relu, negative_slope=_attributes(node)["alpha"])


OPERATORS: Mapping[str, Callable[[onnx.NodeProto, Constants], Callable[..., Tensor]]] = {
    "Sigmoid": _plain(torch.sigmoid),
    "Mul": _plain(torch.mul),
    "Add": _plain(torch.add),
    "Relu": _plain(torch.relu),
    "HardSwish": _plain(F.hardswish),
    "LeakyRelu": _leaky_relu,
    "MaxPool": _max_pool,
    "Resize": _resize,
    "Concat": _concat,
    "Slice": _slice,
    "Gather": _gather,
}
"""Operator of the graph -> what makes its function of torch; convolutions read parameters and are apart."""
