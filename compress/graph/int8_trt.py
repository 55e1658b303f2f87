"""INT8 for TensorRT: symmetric signed activations before convolutions, float bias, no zero point."""

from __future__ import annotations

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData

from compress.graph.qdq import Scheme, quantised

SCHEME = Scheme(
    QuantType.QInt8,
    ("Conv",),
    {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
)
"""TensorRT refuses any zero point, and fuses the other operators by itself."""


def int8_for_tensorrt(model: onnx.ModelProto, ranges: TensorsData) -> onnx.ModelProto:
    """A Q/DQ copy of the FP32 `model` for TensorRT, with the activation `ranges` of a calibration."""
    return quantised(model, ranges, SCHEME)
