"""Two INT8 graphs from one calibration: explicit Q/DQ for TensorRT, and for ONNX Runtime on x86.

They differ because the runtimes do: TensorRT takes symmetric S8 with float bias and refuses any zero point; x86
kernels of ONNX Runtime fuse U8 activations with S8 weights and run S8 activations slower than float. Decode, NMS,
preprocessing and the detect convolutions stay in float in both: one scale cannot span 0-640 px and 0-1.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationMethod, QuantType, create_calibrator
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from compress.graph.walk import Walk, sort_topologically, strip_unused_opsets
from runtime.errors import EdgestillError

METHODS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "minmax": (CalibrationMethod.MinMax, {}),
    "entropy": (CalibrationMethod.Entropy, {}),
    "percentile": (CalibrationMethod.Percentile, {"percentile": 99.99}),
}


@dataclass(frozen=True)
class Scheme:
    """How one runtime wants its integers. `operators` empty means every operator of the body."""

    activation: QuantType
    operators: tuple[str, ...]
    options: Mapping[str, bool]


SCHEMES: dict[str, Scheme] = {
    "int8-trt": Scheme(
        QuantType.QInt8,
        ("Conv",),
        {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    ),
    "int8-cpu": Scheme(QuantType.QUInt8, (), {}),
}

BODY_OPERATORS = ("Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "LeakyRelu", "Relu")


class _Once:
    """One image for ONNX Runtime's calibrator, which would otherwise keep the activations of all of them."""

    def __init__(self, feed: dict[str, np.ndarray]) -> None:
        self.feed: dict[str, np.ndarray] | None = feed

    def get_next(self) -> dict[str, np.ndarray] | None:
        feed, self.feed = self.feed, None
        return feed


def calibrate(model: onnx.ModelProto, canvases: Iterable[np.ndarray], method: str) -> Any:
    """Ranges of every activation of the body (`TensorsData` of ONNX Runtime).

    `canvases` are uint8 (1,S,S,3), what the graph's input takes; they are consumed one at a time, so memory does not
    grow with their number. Raises `EdgestillError` when there are none.
    """
    kind, options = METHODS[method]
    source = model.graph.input[0].name
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder, _quiet():
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
            calibrator.collect_data(_Once({source: canvas}))
        if not count:
            raise EdgestillError("there are no images to calibrate on", "give a data set whose train split has images")
        return calibrator.compute_data()


def _body_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model cut at the detect convolutions' inputs: calibration needs no decode and no NMS."""
    walk = Walk(model.graph)
    outputs = list(dict.fromkeys(walk.nodes[i].input[0] for i in walk.detect_convs))
    source = model.graph.input[0].name
    return onnx.utils.Extractor(onnx.shape_inference.infer_shapes(model)).extract_model([source], outputs)


def quantised(model: onnx.ModelProto, ranges: Any, scheme: Scheme) -> onnx.ModelProto:
    """A Q/DQ copy of `model` in which only the body between stem and detect convolutions is quantised.

    Raises `EdgestillError` when a node outside that body came out quantised.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    walk = Walk(inferred.graph)
    outside = [walk.nodes[i].name for i in sorted(walk.tail | walk.preprocessing | set(walk.detect_convs))]
    with _quiet():
        quantizer = QDQQuantizer(
            inferred,
            True,  # a scale for each output channel
            False,
            QuantType.QInt8,
            scheme.activation,
            ranges,
            [],
            outside,
            list(scheme.operators or BODY_OPERATORS),
            dict(scheme.options),
        )
        quantizer.quantize_model()
    result = quantizer.model.model
    _restore_metadata(result, model)
    strip_unused_opsets(result)
    sort_topologically(result.graph)
    del result.graph.value_info[:]
    onnx.checker.check_model(result, full_check=True)
    _check_float_parts(result)
    return result


def _restore_metadata(result: onnx.ModelProto, source: onnx.ModelProto) -> None:
    onnx.helper.set_model_props(result, {entry.key: entry.value for entry in source.metadata_props})
    result.producer_name, result.producer_version = source.producer_name, source.producer_version


def _check_float_parts(model: onnx.ModelProto) -> None:
    """Detect convolutions read float weights, and nothing behind them is quantised."""
    walk = Walk(model.graph)
    behind = [walk.nodes[i] for i in sorted(walk.tail)]
    weights = [walk.nodes[i] for conv in walk.detect_convs for i in walk.before(conv)[1:]]
    wrong = [node.name for node in (*behind, *weights) if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if wrong:
        raise EdgestillError(
            f"quantisation reached {wrong[0]!r} in the detect layer or behind it, which must stay in float",
            "report the ONNX Runtime version: its quantiser ignored the excluded nodes",
        )


@contextmanager
def _quiet() -> Any:
    """ONNX Runtime's quantiser prints and warns through the root logger; none of it tells a user what to do."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        root.setLevel(level)
