"""Run a graph through ONNX Runtime on the CPU, and read tensors inside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime

from runtime.machine import compute_threads, exact_sums

_ERRORS_ONLY = 3


def open_session(model: onnx.ModelProto, *, optimise: bool = True, as_written: bool = False) -> Any:
    """An `onnxruntime.InferenceSession`. `as_written` computes Q/DQ pairs in float instead of fusing them into integer
    kernels, which are not those of other libraries; without `optimise` nothing is fused at all.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ERRORS_ONLY
    options.intra_op_num_threads = compute_threads()  # see runtime.backends.onnx
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other work may have a core
    options.add_session_config_entry("session.x64quantprecision", exact_sums())
    options.add_session_config_entry("session.disable_quant_qdq", str(int(as_written)))
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def exposing(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """A copy of `model` that also returns these inner tensors."""
    result = onnx.shape_inference.infer_shapes(model)
    known = {value.name: value for value in result.graph.value_info}
    result.graph.output.extend(known[name] for name in tensors)
    return result
