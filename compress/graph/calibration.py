"""Activation ranges of the body, measured on images: one calibration serves every INT8 flavour."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, create_calibrator
from onnxruntime.quantization.calibrate import TensorsData

from compress.graph.parts import GraphParts
from runtime.errors import EdgestillError

METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": 99.99}),
}
BODY_OPERATORS = ("Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "LeakyRelu", "Relu")
"""Operators of the body whose inputs and outputs are measured."""


class _OneImageReader:
    """Gives ONNX Runtime's calibrator one image; with several it would keep the activations of all of them."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self.feed = self.feed, None
        return feed


def calibrate(model: onnx.ModelProto, canvases: Iterable[np.ndarray], method: str) -> TensorsData:
    """The range of every activation of the body.

    `canvases` are what the graph's input takes, uint8 (B,H,W,3) for the shipped one; they are consumed one at a time,
    so memory does not grow with their number. Raises `EdgestillError` when there are none.
    """
    kind, options = METHODS[method]
    source = model.graph.input[0].name
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, quiet():
        plain = Path(folder) / "body.onnx"
        onnx.save(_body_model(model), plain)
        calibrator = create_calibrator(
            plain,
            list(BODY_OPERATORS),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=kind,
            providers=["CPUExecutionProvider"],
            extra_options=options,
        )
        count = 0
        for count, canvas in enumerate(canvases, 1):  # noqa: B007 - the last number is the count
            calibrator.collect_data(_OneImageReader({source: canvas}))
        if not count:
            raise EdgestillError("there are no images to calibrate on", "Give a data set whose train split has images")
        return calibrator.compute_data()


def _body_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model up to the inputs of the detect convolutions: calibration needs no decode and no NMS."""
    parts = GraphParts(model.graph)
    outputs = list(dict.fromkeys(parts.nodes[i].input[0] for i in parts.detect_convs))
    source = model.graph.input[0].name
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([source], outputs)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the prints and warnings of ONNX Runtime's quantiser: they do not tell a user what to do."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)
