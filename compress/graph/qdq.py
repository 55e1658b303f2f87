"""Explicit Q/DQ: which tensors of a graph become INT8, and which stay in float.

Decode, NMS, preprocessing and the detect convolutions stay in float in every scheme: one scale cannot cover 0-640 px
and 0-1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from compress.graph.calibration import BODY_OPERATORS, quiet
from compress.graph.parts import GraphParts, sort_topologically, strip_unused_opsets
from runtime.errors import EdgestillError


@dataclass(frozen=True)
class Scheme:
    """The form of INT8 that one inference library runs fast; `options` are those of ONNX Runtime's quantiser."""

    activation: QuantType
    operators: tuple[str, ...] = BODY_OPERATORS
    options: Mapping[str, bool] = field(default_factory=dict)


def quantised(model: onnx.ModelProto, ranges: TensorsData, scheme: Scheme) -> onnx.ModelProto:
    """A Q/DQ copy of `model` in which only the body between stem and detect convolutions is quantised.

    Raises `EdgestillError` when a node outside that body came out quantised.
    """
    inferred = onnx.shape_inference.infer_shapes(model)
    parts = GraphParts(inferred.graph)
    outside = [
        parts.nodes[i].name for i in sorted(parts.postprocessing | parts.preprocessing | set(parts.detect_convs))
    ]
    with quiet():
        quantizer = QDQQuantizer(
            inferred,
            True,  # a scale for each output channel
            False,
            QuantType.QInt8,
            scheme.activation,
            ranges,
            [],
            outside,
            list(scheme.operators),
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
    parts = GraphParts(model.graph)
    behind = [parts.nodes[i] for i in sorted(parts.postprocessing)]
    weights = [parts.nodes[i] for conv in parts.detect_convs for i in parts.before(conv)[1:]]
    wrong = [node.name for node in (*behind, *weights) if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    if wrong:
        raise EdgestillError(
            f"quantisation reached {wrong[0]!r} in the detect layer or behind it, which must stay in float",
            "Report the ONNX Runtime version: its quantiser ignored the excluded nodes",
        )
