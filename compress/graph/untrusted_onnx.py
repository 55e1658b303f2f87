"""Read an ONNX file that may come from anyone, without risk to this process.

Parsing, checking and loading ONNX have crashed or used all memory in ways that no checker finds first (zero strides,
deep local functions, 85 bytes that expand to terabytes). So a child process with limits on memory and time tries the
bytes first, with our own list of operators, the full checker, and ONNX Runtime's loader. Only bytes that the child
accepted are parsed here, and they are the same bytes: the file is read once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx

from runtime.child_process import answer, limit, refusal
from runtime.errors import InputError, one_line

MAX_BYTES = 1 << 30
MAX_NODES = 20_000
MAX_ELEMENTS = 1 << 28
"""Most elements that one tensor may declare."""

_MEMORY_BYTES = 6 << 30
_CPU_SECONDS = 120
_REMEDY = "Give a model.onnx that `edgestill export` wrote"

_STANDARD = """
    Add And ArgMax AveragePool BatchNormalization Cast Clip Concat Constant Conv DequantizeLinear
    Div Equal Exp Expand Flatten Floor Gather GatherElements GatherND Gemm GlobalAveragePool Greater
    GreaterOrEqual HardSigmoid HardSwish Identity LeakyRelu Less LessOrEqual MatMul Max MaxPool Min
    Mul Neg Not Or Pad Pow QuantizeLinear Range ReduceMax ReduceMean ReduceMin ReduceSum Relu
    Reshape Resize Round Shape Sigmoid Slice Softmax Softplus Split Sqrt Squeeze Sub Tanh TopK
    Transpose Unsqueeze Where
"""
ALLOWED = frozenset(_STANDARD.split())
"""Operators of detectors and of our own rewrites: no loops, subgraphs, custom domains or NonMaxSuppression."""


def read_model(path: Path) -> onnx.ModelProto:
    """The model in `path`. Raises `InputError` when the limited child process refuses the file or crashes on it."""
    data = _read_bytes(path)
    if reason := refusal("from compress.graph.untrusted_onnx import main; main()", data, _CPU_SECONDS):
        raise InputError(f"{path.name} is not an ONNX model that edgestill can use: {reason}", _REMEDY)
    return onnx.ModelProto.FromString(data)


def _read_bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(
                f"{path.name} has {size} bytes; ONNX models of up to {MAX_BYTES} are read", "Give a smaller model"
            )
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}", "Give an existing .onnx file") from error


def problems(model: onnx.ModelProto) -> Iterator[str]:
    """Reasons why a parsed model may not be used, cheapest check first."""
    graph = model.graph
    if not graph.node:
        yield "it has no nodes"
    if model.functions:
        yield f"it defines {len(model.functions)} local functions"
    if len(graph.node) > MAX_NODES:
        yield f"it has {len(graph.node)} nodes, more than {MAX_NODES}"
    if len(graph.sparse_initializer) or len(model.training_info):
        yield "it holds sparse tensors or training graphs"
    for node in graph.node:
        yield from _node_problems(node)
    for tensor in [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]:
        yield from _tensor_problems(tensor)


def _node_problems(node: onnx.NodeProto) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"operator {node.op_type!r} is of domain {node.domain!r}"
    elif node.op_type not in ALLOWED:
        yield f"operator {node.op_type!r} is not allowed"
    for attribute in node.attribute:
        if attribute.HasField("g") or attribute.graphs:
            yield f"{node.op_type!r} holds a subgraph"
        if (
            attribute.name in ("strides", "dilations", "kernel_shape", "group")
            and min((attribute.i or 1, *attribute.ints)) < 1
        ):
            yield f"{node.op_type!r} has {attribute.name} below 1"


def _tensor_problems(tensor: onnx.TensorProto) -> Iterator[str]:
    elements = math.prod(max(side, 0) for side in tensor.dims)
    if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL:
        yield f"tensor {tensor.name!r} is stored in another file"
    if elements > MAX_ELEMENTS or any(side < 0 for side in tensor.dims):
        yield f"tensor {tensor.name!r} declares shape {list(tensor.dims)}"


def _load(data: bytes) -> str:
    from google.protobuf.message import DecodeError

    from runtime.backends.onnx import session_error  # loads ONNX Runtime, which the caller need not

    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError:
        return "its bytes are no ONNX model"
    for problem in problems(model):
        return problem
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        return f"the checker says: {one_line(error)}"
    reason = session_error(data)
    return f"ONNX Runtime says: {reason}" if reason else ""


def main() -> None:
    """The child: judges the bytes on standard input."""
    limit(_MEMORY_BYTES, _CPU_SECONDS)
    try:
        reason = _load(sys.stdin.buffer.read(MAX_BYTES + 1))
    except MemoryError:
        reason = f"loading it takes more than {_MEMORY_BYTES >> 30} GiB"
    answer(reason)
