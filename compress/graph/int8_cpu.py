"""INT8 for ONNX Runtime on x86: its kernels fuse U8 activations with S8 weights, and run S8 ones slower than float.

Without VNNI these kernels add two products in 16 bits, where 2 · 255 · 127 does not fit and is cut off; the sum of two
products with weights of 7 bits, 2 · 255 · 64, does. So the file computes the same on every CPU.
"""

from __future__ import annotations

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData

from compress.graph.qdq import Scheme, quantised

SCHEME = Scheme(QuantType.QUInt8, seven_bit_weights=True)


def int8_for_x86(model: onnx.ModelProto, ranges: TensorsData) -> onnx.ModelProto:
    """A Q/DQ copy of the FP32 `model` for CPUs, with the activation `ranges` of a calibration."""
    return quantised(model, ranges, SCHEME)
