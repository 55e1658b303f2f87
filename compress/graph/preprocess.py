"""Preprocessing inside the graph: from camera bytes to the tensor that the stem convolution reads.

`Cast` is always the first operator: TensorRT refuses `Transpose` on uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from compress.graph.builder import FLOAT, GraphBuilder
from runtime.image import LETTERBOX_FILL, Geometry, geometry

CANVAS_PIXELS = "canvas.nchw"
PIXELS = ("letterbox.canvas", "letterbox.rounded", CANVAS_PIXELS)
"""Tensors that hold the canvas as float32 BGR 0..255; the first that a graph has is the network's input."""


@dataclass(frozen=True)
class FrameLetterbox:
    """The letterbox of one frame size, the same as `runtime.image` computes."""

    frame_hw: tuple[int, int]
    canvas_hw: tuple[int, int]

    @property
    def geometry(self) -> Geometry:
        return geometry(self.frame_hw, self.canvas_hw)

    @property
    def borders(self) -> tuple[int, int, int, int]:
        """Top, left, bottom and right border in pixels."""
        (left, top), (height, width) = self.geometry.left_top, self.geometry.resized_hw
        return top, left, self.canvas_hw[0] - top - height, self.canvas_hw[1] - left - width


def canvas_pixels(builder: GraphBuilder, source: str) -> str:
    """uint8 BGR (B,H,W,3) -> float32 BGR 0..255 (B,3,H,W)."""
    floats = builder.op("Cast", source, name="canvas.float", to=FLOAT)
    return builder.op("Transpose", floats, name=CANVAS_PIXELS, perm=[0, 3, 1, 2])


def frame_pixels(builder: GraphBuilder, source: str, letterbox: FrameLetterbox, batch: int | None = 1) -> str:
    """uint8 BGR frames -> letterboxed float32 BGR 0..255 (B,3,H,W), within one level of cv2's bilinear letterbox."""
    pixels = canvas_pixels(builder, source)
    if letterbox.geometry.resized_hw != letterbox.frame_hw:
        sizes = _sizes(builder, pixels, (3, *letterbox.geometry.resized_hw), batch)
        pixels = builder.op(
            "Resize", pixels, "", "", sizes,
            name="letterbox.resized", mode="linear", coordinate_transformation_mode="half_pixel",
        )  # fmt: skip
        pixels = builder.op("Round", pixels, name="letterbox.rounded")
    top, left, bottom, right = letterbox.borders
    if any(letterbox.borders):
        pads = builder.ints("letterbox.pads", [0, 0, top, left, 0, 0, bottom, right])
        fill = builder.floats("letterbox.fill", LETTERBOX_FILL)
        pixels = builder.op("Pad", pixels, pads, fill, name="letterbox.canvas", mode="constant")
    return pixels


def _sizes(builder: GraphBuilder, pixels: str, sides: tuple[int, int, int], batch: int | None) -> str:
    """The shape (B, *sides), where B is that of `pixels` if it is open."""
    if batch is not None:
        return builder.ints("letterbox.sizes", [batch, *sides])
    images = builder.op("Shape", pixels, name="letterbox.images", end=1)
    return builder.op("Concat", images, builder.ints("letterbox.sides", sides), name="letterbox.sizes", axis=0)


def pixels_tensor(model: onnx.ModelProto) -> str:
    """The tensor that holds the canvas as float32 BGR 0..255 (B,3,H,W), whichever preprocessing the graph has."""
    made = {name for node in model.graph.node for name in node.output}
    return next(name for name in PIXELS if name in made)


def unit_rgb(builder: GraphBuilder, pixels: str) -> str:
    """BGR 0..255 -> RGB 0..1, for stems whose weights cannot include this conversion."""
    order = builder.ints("rgb.order", [2, 1, 0])
    rgb = builder.op("Gather", pixels, order, name="rgb.pixels", axis=1)
    return builder.op("Mul", rgb, builder.floats("rgb.scale", np.float32(1.0) / np.float32(255.0)), name="rgb.unit")
