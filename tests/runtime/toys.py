"""Small ONNX detectors with known answers, made with the onnx package, which the runtime itself never loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from runtime.card import METADATA_KEY, Batches, ModelCard

SIZE = 64
NAMES = ("bolt", "nut")
BOXES = np.array(
    [
        [8, 16, 24, 32, 0.9, 1],
        [30, 20, 50, 40, 0.5, 0],
        [10, 10, 60, 50, 0.1, 1],
        [0, 0, 0, 0, 0, 0],
    ],
    np.float32,
)
"""The detections of the toy on an all-white canvas; scores fall with the brightness of the canvas' middle pixel."""


def save(path: Path, nodes: list, inputs: list, outputs: list, constants: dict, metadata: dict[str, str]) -> Path:
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def card(**changes: object) -> ModelCard:
    values = {
        "name": "toy",
        "names": NAMES,
        "size_hw": (SIZE, SIZE),
        "provenance": {"made": "by a test"},
        "weights": "5" * 64,
    }
    return ModelCard(**(values | changes))


def canvas_model(
    path: Path, model_card: ModelCard | None = None, *, boxes: np.ndarray = BOXES, cutoff: float | None = None
) -> Path:
    """uint8 [B,H,W,3] -> [B,K,6]: the fixed boxes, their scores times the middle pixel's brightness, as `cutoff` [B].

    B is that of the card.
    """
    model_card = model_card or card()
    batch, height, width, _ = model_card.input_shape
    batch = batch or "batch"
    scale = np.array([0, 0, 0, 0, 1, 0], np.float32)
    constants = {
        "boxes": boxes[None].astype(np.float32),
        "scored": scale,
        "kept": 1 - scale,
        "start": np.array([height // 2, width // 2], np.int64),
        "end": np.array([height // 2 + 1, width // 2 + 1], np.int64),
        "axes": np.array([1, 2], np.int64),
        "colours": np.array([3], np.int64),
        "flat": np.array([-1], np.int64),
        "white": np.array(255, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["canvas"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Slice", ["floats", "start", "end", "axes"], ["pixel"]),
        helper.make_node("ReduceMean", ["pixel", "colours"], ["mean"], keepdims=0),
        helper.make_node("Div", ["mean", "white"], ["brightness"]),
        helper.make_node("Mul", ["scored", "brightness"], ["faded"]),
        helper.make_node("Add", ["faded", "kept"], ["factor"]),
        helper.make_node("Mul", ["boxes", "factor"], ["detections"]),
    ]
    outputs = [helper.make_tensor_value_info("detections", TensorProto.FLOAT, [batch, len(boxes), 6])]
    if cutoff is not None:
        constants["limit"] = np.float32([cutoff])
        nodes.append(helper.make_node("Mul", ["brightness", "limit"], ["limits"]))
        nodes.append(helper.make_node("Reshape", ["limits", "flat"], ["cutoff"]))
        outputs.append(helper.make_tensor_value_info("cutoff", TensorProto.FLOAT, [batch]))
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("canvas", TensorProto.UINT8, [batch, height, width, 3])],
        outputs,
        constants,
        {METADATA_KEY: model_card.to_json(), "names": str(dict(enumerate(model_card.names))), "stride": "32"},
    )


def rows_model(
    path: Path,
    rows: np.ndarray,
    *,
    names: str | None = "{0: 'bolt', 1: 'nut'}",
    size: int = SIZE,
    dtype: int = TensorProto.FLOAT,
    input_shape: list | None = None,
    grid: bool = True,
    open_output: bool = False,
) -> Path:
    """float [B,3,H,W] -> the fixed rows [B,N,5+C] plus 0 x the image's mean: a conventional YOLOv5 export.

    With `grid`, rows of zeros follow until there is one for each of three anchors at strides 8, 16 and 32.
    """
    numpy_type = helper.tensor_dtype_to_np_dtype(dtype)
    shape = [1, 3, size, size] if input_shape is None else input_shape
    if grid:
        height, width = (side if isinstance(side, int) else 640 for side in shape[2:])
        cells = sum((height // stride) * (width // stride) for stride in (8, 16, 32))
        rows = np.pad(rows, ((0, 3 * cells - len(rows)), (0, 0)))
    output = ["batch", "rows", "channels"] if open_output else [shape[0], *rows.shape]
    nodes = [
        helper.make_node("ReduceMean", ["images", "sides"], ["mean"]),
        helper.make_node("Squeeze", ["mean", "last"], ["means"]),
        helper.make_node("Mul", ["means", "zero"], ["nothing"]),
        helper.make_node("Add", ["rows", "nothing"], ["output0"]),
    ]
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("images", dtype, shape)],
        [helper.make_tensor_value_info("output0", dtype, output)],
        {
            "rows": rows[None].astype(numpy_type),
            "zero": np.array(0, numpy_type),
            "sides": np.array([1, 2, 3], np.int64),
            "last": np.array([3], np.int64),
        },
        {"stride": "32"} | ({"names": names} if names is not None else {}),
    )


def conv_model(path: Path, *, batch: int | str = 1, size: int = SIZE, model_card: ModelCard | None = None) -> Path:
    """A convolution and a sigmoid, [B,3,S,S] -> [B,8,S/2,S/2]: something for TensorRT to build."""
    weights = np.random.default_rng(0).normal(0, 0.1, (8, 3, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], strides=[2, 2], pads=[1, 1, 1, 1], kernel_shape=[3, 3]),
        helper.make_node("Sigmoid", ["c"], ["out"]),
    ]
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [batch, 8, size // 2, size // 2])],
        {"w": weights},
        {METADATA_KEY: model_card.to_json()} if model_card else {},
    )


def one_image_model(path: Path) -> Path:
    """uint8 [B,H,W,3] -> [B,K,6], open in its card and its shapes, but reshaped to one image inside."""
    open_card = card(batches=Batches(1, None))
    nodes = [
        helper.make_node("Reshape", ["canvas", "one"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats", "side"], ["mean"]),
        helper.make_node("Mul", ["mean", "zero"], ["nothing"]),
        helper.make_node("Add", ["boxes", "nothing"], ["detections"]),
    ]
    return save(
        path,
        nodes,
        [helper.make_tensor_value_info("canvas", TensorProto.UINT8, ["batch", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("detections", TensorProto.FLOAT, ["batch", len(BOXES), 6])],
        {
            "one": np.array([1, SIZE * SIZE, 3], np.int64),
            "side": np.array([1, 2], np.int64),
            "zero": np.array(0, np.float32),
            "boxes": BOXES[None],
        },
        {METADATA_KEY: open_card.to_json()},
    )
