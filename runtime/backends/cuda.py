"""Device memory and streams behind a few functions, over cuda-bindings or pycuda, whichever is installed.

cuda-bindings comes first: it has wheels, works from any thread and leaves no context behind at exit.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import EngineError, UnavailableError

Host = NDArray[Any]


class Cuda(Protocol):
    """Pointers and streams are plain integers. Copies and launches are ordered on the one `stream`."""

    stream: int

    def allocate(self, nbytes: int) -> int:
        """Device memory."""

    def free(self, pointer: int) -> None: ...

    def pinned(self, nbytes: int) -> Host:
        """Page-locked host memory, uint8 (nbytes,): the GPU copies from it twice as fast and without blocking the host.

        It lasts until `free_pinned`.
        """

    def free_pinned(self, host: Host) -> None:
        """Give back memory of `pinned`; no view of it may be used afterwards."""

    def upload(self, pointer: int, host: Host) -> None:
        """Start copying a contiguous host array to the device."""

    def download(self, host: Host, pointer: int) -> None:
        """Start copying from the device to a contiguous host array."""

    def synchronize(self) -> None:
        """Wait until the stream has done all its work."""

    def close(self) -> None: ...


class CudaBindings:
    """NVIDIA's cuda-bindings (12 and 13; in 12 also as `cuda.cudart`): every call returns an error code first."""

    def __init__(self) -> None:
        self._api = import_module("cuda.bindings.runtime" if _exists("cuda.bindings.runtime") else "cuda.cudart")
        self._call("cudaSetDevice", 0)
        self._handle = self._call("cudaStreamCreate")
        self.stream = int(self._handle)

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._api, name)(*arguments)
        if int(code) != 0:
            _, text = self._api.cudaGetErrorString(code)
            raise EngineError(f"CUDA {name}: {text.decode() if isinstance(text, bytes) else text} ({int(code)})")
        return values[0] if values else None

    def allocate(self, nbytes: int) -> int:
        return int(self._call("cudaMalloc", nbytes))

    def free(self, pointer: int) -> None:
        self._call("cudaFree", pointer)

    def pinned(self, nbytes: int) -> Host:
        import ctypes

        pointer = int(self._call("cudaMallocHost", nbytes))
        return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(pointer))

    def free_pinned(self, host: Host) -> None:
        self._call("cudaFreeHost", host.ctypes.data)

    def upload(self, pointer: int, host: Host) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", pointer, host.ctypes.data, host.nbytes, kind, self._handle)

    def download(self, host: Host, pointer: int) -> None:
        kind = self._api.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host.ctypes.data, pointer, host.nbytes, kind, self._handle)

    def synchronize(self) -> None:
        self._call("cudaStreamSynchronize", self._handle)

    def close(self) -> None:
        self._call("cudaStreamDestroy", self._handle)


class PyCuda:
    """pycuda on the device's primary context, the one that TensorRT uses too.

    pycuda binds a context to a thread and aborts the process if one is still active at exit. So the context is entered
    for each call, in the thread of the call, and left again.
    """

    def __init__(self) -> None:
        self._driver = import_module("pycuda.driver")
        try:
            self._driver.init()
            self._context = self._driver.Device(0).retain_primary_context()
        except self._driver.Error as error:  # it is not a RuntimeError
            raise EngineError(f"CUDA: {error}") from error
        self._memory: dict[int, Any] = {}
        self._handle = self._inside(self._driver.Stream)
        self.stream = int(self._handle.handle)

    def _inside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._context.push()
        try:
            return function(*arguments)
        except self._driver.Error as error:
            raise EngineError(f"CUDA: {error}") from error
        finally:
            self._driver.Context.pop()

    def allocate(self, nbytes: int) -> int:
        memory = self._inside(self._driver.mem_alloc, nbytes)
        self._memory[int(memory)] = memory
        return int(memory)

    def free(self, pointer: int) -> None:
        self._inside(self._memory.pop(pointer).free)

    def pinned(self, nbytes: int) -> Host:
        return self._inside(self._driver.pagelocked_empty, (nbytes,), np.uint8)

    def free_pinned(self, host: Host) -> None:
        allocation: Any = host.base
        self._inside(allocation.free)

    def upload(self, pointer: int, host: Host) -> None:
        self._inside(self._driver.memcpy_htod_async, pointer, host, self._handle)

    def download(self, host: Host, pointer: int) -> None:
        self._inside(self._driver.memcpy_dtoh_async, host, pointer, self._handle)

    def synchronize(self) -> None:
        self._inside(self._handle.synchronize)

    def close(self) -> None:
        self._handle = None
        self._context.detach()


PACKAGES: dict[str, type[CudaBindings] | type[PyCuda]] = {
    "cuda.bindings.runtime": CudaBindings,
    "cuda.cudart": CudaBindings,
    "pycuda.driver": PyCuda,
}


def open_cuda() -> Cuda:
    """The first package of `PACKAGES` that is installed. Raises UnavailableError without one, or without a driver."""
    for module, implementation in PACKAGES.items():
        if _exists(module):
            try:
                return implementation()
            except (EngineError, ImportError, RuntimeError) as error:
                raise UnavailableError(f"CUDA does not start: {error}", "Check the driver with nvidia-smi") from error
    raise UnavailableError(
        "engines need cuda-bindings or pycuda, neither is installed", "pip install cuda-bindings (or pycuda)"
    )


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is not installed
        return False
