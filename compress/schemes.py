"""The forms of INT8 as data: what each inference library runs fast and right. `compress.graph.qdq` writes them all.

Imports neither torch nor onnx, because the table of flavours and the settings do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

CONSUMERS = ("Conv", "Add", "MaxPool", "Resize")
"""Operators that gain from integer inputs in TensorRT and OpenVINO. A Q/DQ pair behind a convolution, before its
activation, would keep the two from being fused, and rounds a second time: on COCO128 yolov5n then loses 0.7 mAP."""
EVERY_OPERATOR = ("Conv", "Sigmoid", "Mul", "Add", "Concat", "MaxPool", "Resize", "LeakyRelu", "Relu")
"""Operators for which ONNX Runtime has integer kernels on x86. It fuses none whose output is not quantised too."""


@dataclass(frozen=True)
class Scheme:
    """One form of INT8. Weights are always signed, with a scale for each output channel, and no zero point."""

    operators: tuple[str, ...] = CONSUMERS
    """Operators whose inputs are quantised."""
    unsigned: bool = False
    """Activations are 0..255 with a zero point, else -128..127 without."""
    outputs: bool = False
    """The outputs of the operators are quantised too, but not what an activation makes for a detect convolution;
    whatever reads a quantised tensor reads it dequantised."""
    weight_peak: int = 127
    """Largest magnitude of an integer weight; see `seven_bit_weights`."""
    integer_bias: bool = False
    """The bias is int32 in units of input scale times weight scale, else float."""
    float_stem: bool = False
    """The first convolution stays in float."""
    half_body: bool = False
    """All that is not INT8 between the stem and the detect convolutions is FP16."""
    space_to_depth: bool = False
    """The stem reads blocks of 2x2 pixels as 12 channels; see `compress.graph.stem`."""


SCHEMES: Mapping[str, Scheme] = {
    # A zero point is refused. The stem's weights, divided by 255, need scales that FP16 cannot hold.
    "tensorrt": Scheme(float_stem=True, half_body=True),
    # With signed activations OpenVINO 2026 computes wrong results: mAP 5 instead of 35.
    "openvino": Scheme(unsigned=True),
    # Signed activations are slower than float on x86.
    "onnxruntime": Scheme(EVERY_OPERATOR, unsigned=True, outputs=True, integer_bias=True, space_to_depth=True),
}
"""By the library that runs the file."""


def seven_bit_weights(scheme: Scheme) -> Scheme:
    """The scheme with weights of -64..64, if its activations are unsigned.

    On x86 CPUs without VNNI, the fast kernels add two products in 16 bits, where 2 · 255 · 127 does not fit and is cut
    off; 2 · 255 · 64 does. The lost bit costs yolov5n 0.6 to 1.3 mAP on COCO128.
    """
    return replace(scheme, weight_peak=64) if scheme.unsigned else scheme
