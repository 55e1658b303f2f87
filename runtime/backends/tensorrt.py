"""Run plans with TensorRT 8.6 to 11 or TensorRT-RTX: tensor names, `execute_async_v3`, dtypes from the engine.

A plan is native code, so only bytes whose hash is in the model card are loaded.
"""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.backends import CUTOFF, Array, LoadRequest, RawOutput, TensorSpec, closed_error
from runtime.backends.cuda import Cuda, Host, open_cuda
from runtime.errors import EngineError, InputError, UnavailableError, UsageError, one_line
from runtime.layers import IN_LOG

DTYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT8": np.int8,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
}
"""TensorRT's own `nptype` fails on some NumPy versions (8.6 asks for `np.bool`)."""
INSTALL = {
    "tensorrt": "On a Jetson use JetPack's python3-libnvinfer, elsewhere pip install tensorrt",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
}
PROVIDER = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}


def import_tensorrt(name: str) -> Any:
    """The module `tensorrt` or `tensorrt_rtx`. Raises UnavailableError with the way to get it."""
    try:
        return import_module(name)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        raise UnavailableError(f"{name} cannot be loaded: {one_line(error)}", INSTALL[name]) from error


def collecting_logger(trt: Any) -> Any:
    """An ILogger that keeps `lines` of (severity, text), severities are "ERROR", "WARNING" and so on, and the message
    `layers` in which a builder prints those of the engine.
    """
    names = {
        int(getattr(trt.ILogger, name)): name for name in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
    }

    class Collector(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind classes must be initialised by name
            self.lines: list[tuple[str, str]] = []
            self.layers = ""

        def log(self, severity: Any, text: str) -> None:
            name = names.get(int(severity), "ERROR")
            if name not in ("INFO", "VERBOSE"):
                self.lines.append((name, text))
            elif text.startswith(IN_LOG):
                self.layers = text

    return Collector()


def errors_of(logger: Any) -> list[str]:
    return [text for severity, text in logger.lines if severity in ("ERROR", "INTERNAL_ERROR")]


class Block(NamedTuple):
    """Device memory of one tensor, and page-locked host memory of the same size where the host reads or writes it."""

    nbytes: int
    pointer: int
    host: Host | None


class TensorRTBackend:
    """One engine, one execution context, one stream. A lock keeps two threads from sharing the buffers."""

    def __init__(self, loaded: LoadedEngine, trt: Any, cuda: Cuda, path: Path, provider: str) -> None:
        engine = loaded.engine
        self.input, self.output = input_and_output(engine, trt, path)
        self.providers = (provider,)
        self._loaded: LoadedEngine | None = loaded
        self._cuda, self._path = cuda, path
        self._context = engine.create_execution_context()
        if self._context is None:
            raise EngineError(f"{path}: no execution context; the GPU is out of memory", "Close other GPU programs")
        self._extra = [spec for spec in outputs_of(engine, trt) if spec.name != self.output.name]
        self._blocks: dict[str, Block] = {}
        self._views: dict[str, Host] = {}
        self._lock = threading.Lock()

    def run(self, array: Array) -> RawOutput:
        with self._lock:
            if self._context is None:
                raise closed_error()
            if self.input.name not in self._views or self._views[self.input.name].shape != array.shape:
                self._set_shape(array.shape)
            source, outputs = self._views[self.input.name], [n for n in self._views if n != self.input.name]
            np.copyto(source, array, casting="no")
            self._cuda.upload(self._blocks[self.input.name].pointer, source)
            if not self._context.execute_async_v3(self._cuda.stream):
                raise EngineError(f"{self._path}: the engine refused to run on input {array.shape}")
            for name in outputs:
                self._cuda.download(self._views[name], self._blocks[name].pointer)
            self._cuda.synchronize()
            return RawOutput(*(self._views[name].copy() for name in outputs))

    def _set_shape(self, shape: tuple[int, ...]) -> None:
        """Make the next runs take an input of this shape. Memory is kept between shapes and grows to the largest."""
        self._views = {}
        if not self._context.set_input_shape(self.input.name, shape):
            raise InputError(f"{self._path}: takes {self.input.shape}, not input of shape {shape}")
        self._reserve(self.input, shape)
        for spec in (self.output, *self._extra):  # outputs that are not read need an address too
            self._reserve(spec, self._shape_of(spec.name))

    def _reserve(self, spec: TensorSpec, shape: tuple[int, ...]) -> None:
        """Give a tensor memory for this shape, and a view of it where the host reads or writes the tensor."""
        nbytes = int(np.prod(shape)) * spec.dtype.itemsize
        if spec.name not in self._blocks or self._blocks[spec.name].nbytes < nbytes:
            self._free(spec.name)
            on_host = spec.name in (self.input.name, self.output.name, CUTOFF)
            host = self._cuda.pinned(nbytes) if on_host else None
            self._blocks[spec.name] = Block(nbytes, self._cuda.allocate(nbytes), host)
            self._context.set_tensor_address(spec.name, self._blocks[spec.name].pointer)
        host = self._blocks[spec.name].host
        if host is not None:
            self._views[spec.name] = host[:nbytes].view(spec.dtype).reshape(shape)

    def _shape_of(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise InputError(f"{self._path}: the size of output {name} depends on the data", "Export with fixed boxes")
        return shape

    def _free(self, name: str) -> None:
        block = self._blocks.pop(name, None)
        if block is None:
            return
        self._cuda.free(block.pointer)
        if block.host is not None:
            self._cuda.free_pinned(block.host)

    def close(self) -> None:
        with self._lock:
            if self._context is None:
                return
            self._views = {}
            for name in list(self._blocks):
                self._free(name)
            self._context = self._loaded = None  # the context goes before its engine, both before the stream
            self._cuda.close()


class LoadedEngine(NamedTuple):
    """An engine, and the objects that must exist as long as it does."""

    engine: Any
    runtime: Any
    logger: Any


def load(request: LoadRequest) -> TensorRTBackend:
    """Raises UsageError when the device is the CPU, UnavailableError without TensorRT or a GPU, EngineError when the
    hash of the bytes was not checked or TensorRT refuses them.
    """
    path, data = request.path, request.data
    if request.options.device == "cpu":
        raise UsageError(
            f"{path}: an engine needs a GPU, device is cpu", "Give the bundle's .onnx file, or --device auto"
        )
    if data is None:
        raise EngineError(f"{path}: an engine is loaded only from bytes whose hash was checked")
    trt = import_tensorrt(request.backend)
    cuda = open_cuda()
    return TensorRTBackend(deserialize(trt, data, path), trt, cuda, path, PROVIDER[request.backend])


def deserialize(trt: Any, data: bytes, path: Path) -> LoadedEngine:
    """The engine. Raises EngineError with TensorRT's own last line: it returns None and logs why."""
    logger = collecting_logger(trt)
    runtime = trt.Runtime(logger)
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        why = "; ".join(errors_of(logger)[-2:]) or "no reason was logged"
        raise EngineError(f"{path}: {trt.__name__} {trt.__version__} cannot load it: {why}", "Build it again here")
    return LoadedEngine(engine, runtime, logger)


def input_and_output(engine: Any, trt: Any, path: Path) -> tuple[TensorSpec, TensorSpec]:
    """The one input and the first output."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
    if len(inputs) != 1:
        raise InputError(f"{path}: has {len(inputs)} inputs ({', '.join(inputs)}), expected 1")
    return _tensor_spec(engine, inputs[0]), outputs_of(engine, trt)[0]


def outputs_of(engine: Any, trt: Any) -> list[TensorSpec]:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [_tensor_spec(engine, name) for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]


def _tensor_spec(engine: Any, name: str) -> TensorSpec:
    dtype = engine.get_tensor_dtype(name).name
    if dtype not in DTYPES:
        raise InputError(f"tensor {name} is {dtype}, expected one of {', '.join(DTYPES)}")
    shape = tuple(side if side >= 0 else None for side in engine.get_tensor_shape(name))
    return TensorSpec(name, np.dtype(DTYPES[dtype]), shape)
