"""How much each layer loses by INT8, one pass of the network for each: the worst are the first to return to float.

The error of a file is the root of the mean squared difference of its raw maps from those of FP32, each cell weighed
by its objectness. Errors of layers add up in squares: on yolov5n 57 layers one at a time give a root of the sum of
0.269, all of them together 0.276.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from compress.graph.parts import GraphParts
from compress.graph.placement import layers
from compress.graph.qdq import quantised
from compress.graph.ranges import Ranges, body_model
from compress.graph.session import open_session
from compress.schemes import Scheme

Maps = list[NDArray[np.float32]]


class LayerError(NamedTuple):
    """A convolution, and the error in logits if it alone is INT8."""

    name: str
    error: float


def rank_layers(
    model: onnx.ModelProto, ranges: Ranges, scheme: Scheme, canvases: Sequence[np.ndarray]
) -> tuple[LayerError, ...]:
    """The layers of a scheme, worst first. `canvases` are uint8 (B,H,W,3), a few are enough."""
    body, form = body_model(model), number_form(scheme)
    reference = open_session(body)
    exact = [_maps(reference, canvas) for canvas in canvases]
    found = []
    for name in layers(GraphParts(body.graph), form):
        session = open_session(quantised(body, ranges, form, only=name), as_written=True)
        squares = [squared_error(maps, _maps(session, canvas)) for maps, canvas in zip(exact, canvases, strict=True)]
        found.append(LayerError(name, math.sqrt(float(np.mean(squares)))))
    return tuple(sorted(found, key=lambda layer: -layer.error))


def number_form(scheme: Scheme) -> Scheme:
    """The part of a scheme on which the error of one layer depends: schemes with the same one have one ranking."""
    return replace(scheme, half_body=False, integer_bias=False, space_to_depth=False)


def remaining_error(ranked: Iterable[LayerError], in_float: Collection[str]) -> float:
    """The error that is predicted with these layers in float."""
    return math.sqrt(sum(layer.error**2 for layer in ranked if layer.name not in in_float))


def squared_error(exact: Maps, found: Maps) -> float:
    """Mean squared difference of maps, a (box, class) pair a level as `split_detect` makes them, (B,C,H,W) each.

    Each cell counts by the highest objectness that FP32 gives there: most cells are background and alike.
    """
    total = weight = 0.0
    for level in range(0, len(exact), 2):
        boxes = exact[level]
        objectness = 1 / (1 + np.exp(-boxes[:, -(boxes.shape[1] // 5) :].max(1)))
        pairs = zip(exact[level : level + 2], found[level : level + 2], strict=True)
        squares = sum(((a - b) ** 2).mean(1) for a, b in pairs) / 2
        total += float((objectness * squares).sum())
        weight += float(objectness.sum())
    return total / weight


def _maps(session: Any, canvas: np.ndarray) -> Maps:
    return list(session.run(None, {session.get_inputs()[0].name: canvas}))
