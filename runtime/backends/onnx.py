"""ONNX files by ONNX Runtime, on its CPU, CUDA or TensorRT provider. Hardware that is named is used, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtime.backends import CUTOFF, Array, LoadOptions, LoadRequest, RawOutput, TensorSpec, closed_error
from runtime.backends.child_load import load_in_child
from runtime.errors import EngineError, InputError, UnavailableError, UsageError, one_line
from runtime.files import is_utf8
from runtime.machine import compute_threads, exact_sums

try:
    import onnxruntime
except ImportError as error:
    raise UnavailableError(
        "ONNX files need onnxruntime, which is not installed", "pip install onnxruntime (or onnxruntime-gpu)"
    ) from error

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
PROVIDERS = {"cpu": (CPU,), "cuda": (CUDA, CPU), "tensorrt": (TENSORRT, CUDA, CPU)}
"""Device -> providers in order of preference; nodes that one cannot run fall to the next."""
DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(int32)": np.int32,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}
ONLY_FATAL = 4
REMEDY = "Install onnxruntime-gpu with its CUDA libraries, or use --device cpu"


class OnnxBackend:
    """A session with one input. Its first output and the cutoff are read (YOLOv5's older exports add the raw maps)."""

    def __init__(self, session: Any, path: Path) -> None:
        inputs, outputs = session.get_inputs(), session.get_outputs()
        if len(inputs) != 1:
            names = ", ".join(node.name for node in inputs)
            raise InputError(f"{path}: has {len(inputs)} inputs ({names}), expected 1", "Give a detector's export")
        self.input, self.output = tensor_spec(inputs[0], path), tensor_spec(outputs[0], path)
        self.providers = tuple(session.get_providers())
        self._session, self._path = session, path
        self._wanted = [self.output.name, *(node.name for node in outputs[1:] if node.name == CUTOFF)]

    def run(self, array: Array) -> RawOutput:
        session = self._session
        if session is None:
            raise closed_error()
        try:
            return RawOutput(*session.run(self._wanted, {self.input.name: array}))
        except Exception as error:  # ONNX Runtime's errors share no other base
            reason = f"ONNX Runtime cannot run it on {array.dtype} {list(array.shape)}: {one_line(error)}"
            raise EngineError(f"{self._path}: {reason}") from error

    def close(self) -> None:
        self._session = None


def load(request: LoadRequest) -> OnnxBackend:
    """A detector. Raises the errors of `open_session`, and InputError when it has several inputs."""
    return OnnxBackend(open_session(request), request.path)


def open_session(request: LoadRequest) -> Any:
    """An `onnxruntime.InferenceSession`, by default with one thread a core. A file without a card is first loaded in a
    child process.

    Raises InputError when the file cannot be loaded, UnavailableError when the device is not there.
    """
    path = request.path
    if not request.has_card:
        load_in_child(path, f"{__name__}:load_error")
    providers = choose_providers(request.options.device, onnxruntime.get_available_providers())
    try:
        session = onnxruntime.InferenceSession(
            request.data or readable(path), session_options(request.options), providers=list(providers)
        )
    except Exception as error:  # ONNX Runtime's errors share no other base
        raise InputError(f"{path}: ONNX Runtime cannot load it: {one_line(error)}") from error
    require_provider(request.options.device, providers, session.get_providers())
    return session


def readable(path: Path) -> str | bytes:
    """The file as ONNX Runtime takes it: its path, or its bytes where the path is no UTF-8."""
    return str(path) if is_utf8(path) else path.read_bytes()


def load_error(path: Path) -> str:
    """Why ONNX Runtime does not load the file, on one thread; empty when it loads."""
    reason = session_error(readable(path))
    return reason and f"ONNX Runtime cannot load it: {reason}"


def session_error(model: str | bytes) -> str:
    """ONNX Runtime's error on loading the file of this path, or these bytes; empty when it loads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = ONLY_FATAL
    try:
        onnxruntime.InferenceSession(model, options, providers=[CPU])
    except Exception as error:  # ONNX Runtime's errors share no other base
        return one_line(error)
    return ""


def session_options(load: LoadOptions) -> Any:
    """`onnxruntime.SessionOptions` of every session: threads, waiting, and how integers are summed."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = ONLY_FATAL  # its errors also arrive as exceptions
    # without a number, ONNX Runtime pins each worker to a core, and the caller's thread may share one of them for the
    # session's whole life: on two cores the same file then took 13 ms in one session and 6.3 ms in the next
    options.intra_op_num_threads = load.threads or compute_threads()
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(load.spin)))
    options.add_session_config_entry("session.x64quantprecision", exact_sums())
    options.add_session_config_entry("session.disable_quant_qdq", str(int(load.as_written)))
    return options


def choose_providers(device: str, available: list[str]) -> tuple[str, ...]:
    """Providers for a device; "auto" takes CUDA if it is built in. Raises UnavailableError when one is not."""
    if device == "auto":
        return PROVIDERS["cuda"] if CUDA in available else PROVIDERS["cpu"]
    if device not in PROVIDERS:
        raise UsageError(f"device is {device!r}, expected auto, {', '.join(PROVIDERS)}")
    wanted = PROVIDERS[device]
    if wanted[0] not in available:
        raise UnavailableError(
            f"device {device} needs {wanted[0]}, this onnxruntime has {', '.join(available)}", REMEDY
        )
    return wanted


def require_provider(device: str, wanted: tuple[str, ...], got: list[str]) -> None:
    """Raises UnavailableError when the provider did not start: ONNX Runtime only warns, and falls back to the CPU."""
    if device != "auto" and wanted[0] not in got:
        raise UnavailableError(f"device {device}: {wanted[0]} did not start, the session got {', '.join(got)}", REMEDY)


def tensor_spec(node: Any, path: Path) -> TensorSpec:
    if node.type not in DTYPES:
        raise InputError(f"{path}: {node.name} is {node.type}, expected one of {', '.join(DTYPES)}")
    shape = tuple(side if isinstance(side, int) and side > 0 else None for side in node.shape)
    return TensorSpec(node.name, np.dtype(DTYPES[node.type]), shape)
