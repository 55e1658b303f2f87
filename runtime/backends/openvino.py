"""ONNX and IR files by OpenVINO, on the CPU."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import CUTOFF, Array, LoadOptions, LoadRequest, RawOutput, TensorSpec, closed_error
from runtime.backends.child_load import load_in_child
from runtime.errors import EngineError, InputError, UnavailableError, UsageError
from runtime.files import is_utf8
from runtime.machine import compute_threads

try:
    import openvino
except ImportError as error:
    raise UnavailableError("openvino is not installed", "pip install 'edgestill[openvino]', or openvino") from error

PROVIDER = "OpenVINO on the CPU"
IR = ".xml"
DTYPES = (np.float32, np.float16, np.uint8, np.int8, np.int32, np.int64, np.bool_)


class OpenVinoBackend:
    """A compiled model with one input. Its first output and the cutoff are read.

    A lock keeps two threads from sharing the request; a model that is compiled for latency has one stream anyway.
    """

    providers = (PROVIDER,)

    def __init__(self, compiled: Any, path: Path) -> None:
        inputs, outputs = compiled.inputs, compiled.outputs
        if len(inputs) != 1:
            names = ", ".join(port.any_name for port in inputs)
            raise InputError(f"{path}: has {len(inputs)} inputs ({names}), expected 1", "Give a detector's export")
        self.input, self.output = tensor_spec(inputs[0], path), tensor_spec(outputs[0], path)
        self._read = [0, *(index for index, port in enumerate(outputs) if index and CUTOFF in port.names)]
        self._request, self._path = compiled.create_infer_request(), path
        self._lock = threading.Lock()

    def run(self, array: Array) -> RawOutput:
        with self._lock:
            if self._request is None:
                raise closed_error()
            try:
                self._request.infer([array], share_inputs=True)
            except RuntimeError as error:
                reason = f"OpenVINO cannot run it on {array.dtype} {list(array.shape)}: {reason_of(error)}"
                raise EngineError(f"{self._path}: {reason}") from error
            return RawOutput(*(self._request.get_output_tensor(index).data.copy() for index in self._read))

    def close(self) -> None:
        with self._lock:
            self._request = None


def load(request: LoadRequest) -> OpenVinoBackend:
    """A detector, by default with one thread a core. A file without a card is first loaded in a child process.

    Raises UsageError when the device is a GPU or layers shall be computed as written, InputError when the file cannot
    be loaded, has several inputs, or would be computed wrongly.
    """
    options, path = request.options, request.path
    if options.device not in ("auto", "cpu"):
        raise UsageError(f"{path}: device is {options.device}, openvino runs it on the CPU", "Choose --device cpu")
    if options.as_written:
        raise UsageError(f"{path}: openvino has integer kernels only", "Choose --backend onnx to compute it as written")
    if not request.has_card:
        load_in_child(path, f"{__name__}:load_error")
    try:
        model = read(path, request.contents)
        refuse_signed_activations(model, path)
        compiled = openvino.Core().compile_model(model, "CPU", settings(options))
    except RuntimeError as error:
        raise InputError(f"{path}: OpenVINO cannot load it: {reason_of(error)}") from error
    return OpenVinoBackend(compiled, path)


def load_error(path: Path) -> str:
    """Why OpenVINO does not load the file, on one thread; empty when it loads."""
    try:
        openvino.Core().compile_model(read(path, {}), "CPU", settings(LoadOptions(threads=1)))
    except RuntimeError as error:
        return f"OpenVINO cannot load it: {reason_of(error)}"
    return ""


def settings(options: LoadOptions) -> dict[str, Any]:
    """One stream with all threads. Its own default computes in bfloat16 where the CPU can: boxes move by 1.5 px."""
    return {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": options.threads or compute_threads(),
        "ENABLE_CPU_PINNING": False,  # other work may have the core for the model's whole life
    }


def read(path: Path, contents: Mapping[str, bytes]) -> Any:
    """The `openvino.Model`, from the checked `contents` where there are some.

    Raises InputError when the weights of an IR file are not there, or its card does not list them.
    """
    if not contents and is_utf8(path):
        return openvino.Core().read_model(str(path))
    files = (path, path.with_suffix(".bin")) if path.suffix.lower() == IR else (path,)
    try:
        parts = [contents[file.name] if contents else file.read_bytes() for file in files]
    except (KeyError, OSError) as error:
        raise InputError(
            f"{path}: {files[-1].name} is not beside it, or not listed in its card", "Convert it again"
        ) from error
    return openvino.Core().read_model(*parts)


def refuse_signed_activations(model: Any, path: Path) -> None:
    """Raises InputError when activations are quantised to signed integers: the frontends read such a pair as a
    `FakeQuantize` before a `Convert` to i8, for which OpenVINO 2026 computes wrong results (mAP 5 instead of 35).
    """
    converts = (op for op in model.get_ops() if op.get_type_name() == "Convert")
    signed = (op for op in converts if op.get_output_element_type(0) == openvino.Type.i8)
    if any(op.input_value(0).get_node().get_type_name() == "FakeQuantize" for op in signed):
        raise InputError(
            f"{path}: its activations are signed integers, with which OpenVINO computes wrong results",
            "Give the int8-openvino flavour, or choose --backend onnx",
        )


def reason_of(error: RuntimeError) -> str:
    """The last line of OpenVINO's message that is no place in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '"))]
    return told[-1][:300] if told else "it says no reason"


def tensor_spec(port: Any, path: Path) -> TensorSpec:
    dtype = port.element_type.to_dtype()
    if dtype not in DTYPES:
        known = ", ".join(np.dtype(kind).name for kind in DTYPES)
        raise InputError(f"{path}: {port.any_name} is {port.element_type.get_type_name()}, expected one of {known}")
    shape = tuple(None if side.is_dynamic else side.get_length() for side in port.partial_shape)
    return TensorSpec(port.any_name, np.dtype(dtype), shape)
