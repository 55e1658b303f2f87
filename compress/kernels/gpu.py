"""The `Device` of the product: kernels on an NVIDIA GPU, through the CUDA driver, on torch's current stream.

Modules are loaded as driver libraries, which belong to no context; a launch makes the device's primary context, which
is torch's, current while it lasts, if it is not (autograd's threads may have none).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from compress.kernels import rescale, toolchain
from compress.kernels.device import Facts, Launch
from compress.kernels.toolchain import Source
from runtime.errors import EdgestillError, UnavailableError, one_line

SLAB_TICKETS = 1 << 16
"""Tickets that captured graphs share out among them before new ones are made: 256 KiB, enough for a hundred calls."""


class Gpu:
    """One NVIDIA GPU. Raises EdgestillError when bindings or compiler are missing, or do not support it."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._driver = load_driver()
        self._call("cuInit", 0)
        start_torch()
        device = self._call("cuDeviceGet", index)
        self._context = int(self._call("cuDevicePrimaryCtxRetain", device))
        self.facts = self._facts(device)
        self._architecture = toolchain.architecture_for(self.facts.capability)
        self._kernels: dict[tuple[Source, str], Any] = {}
        self._libraries: dict[Source, Any] = {}
        self._shared: dict[tuple[Source, str], int] = {}
        self._raising = Lock()
        self._tickets: dict[int, Tensor] = {}
        self._slabs: list[Tensor] = []  # all are kept: graphs write into them
        self._slab_tickets_left = 0
        self._sharing_out = Lock()
        self._library(rescale.SOURCE)  # every loss needs it; fails now if compiler or driver do not support the GPU

    def _facts(self, device: Any) -> Facts:
        def ask(name: str) -> int:
            what = getattr(self._driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
            return int(self._call("cuDeviceGetAttribute", what, device))

        return Facts(
            (ask("COMPUTE_CAPABILITY_MAJOR"), ask("COMPUTE_CAPABILITY_MINOR")),
            ask("L2_CACHE_SIZE"),
            ask("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        )

    def launch(self, launch: Launch) -> None:
        """See `Device.launch`."""
        grid, block, shared = launch.grid, launch.block, launch.shared
        stream = torch.cuda.current_stream(self.index).cuda_stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(launch.args))
        address = ctypes.addressof(parameters)
        with self._current():
            function = self._function(launch)
            if launch.cluster == 1:
                self._call("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared, stream, address, 0)
            else:
                self._call("cuLaunchKernelEx", self._clustered(launch, stream), function, address, 0)

    def tickets(self, count: int) -> Tensor:
        """See `Device.tickets`. A stream has its own, kept from call to call. A call in a captured graph has its own
        for good, since the graph may be replayed on any stream beside others.
        """
        if torch.cuda.is_current_stream_capturing():
            return self._tickets_of_a_graph(count)
        if self._slab_tickets_left < SLAB_TICKETS // 2:
            self._add_slab()
        stream = torch.cuda.current_stream(self.index).cuda_stream
        kept = self._tickets.get(stream)
        if kept is None or len(kept) < count:
            kept = self._tickets[stream] = self._zeros(max(count, 64))
        return kept

    def _tickets_of_a_graph(self, count: int) -> Tensor:
        """The next tickets of the slab. Without an eager call before, or beyond the slab, the graph sets its own to
        zero, which costs a launch in each replay.
        """
        with self._sharing_out:
            left = self._slab_tickets_left
            if count > left:
                return self._zeros(count)
            self._slab_tickets_left -= count
            return self._slabs[-1][left - count : left]

    def _add_slab(self) -> None:
        """New tickets for graphs, zero before any stream can use them. A capture could not make them: it would set them
        to zero in each replay.
        """
        slab = self._zeros(SLAB_TICKETS)
        torch.cuda.current_stream(self.index).synchronize()
        with self._sharing_out:
            self._slabs.append(slab)
            self._slab_tickets_left = SLAB_TICKETS

    def _zeros(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int32, device=f"cuda:{self.index}")

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Our context on this thread."""
        if int(self._call("cuCtxGetCurrent")) == self._context:
            yield
            return
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _function(self, launch: Launch) -> Any:
        """The kernel, its limits raised to what this launch asks for."""
        key = (launch.source, launch.kernel)
        if key not in self._kernels:
            handle = self._call("cuLibraryGetKernel", self._library(launch.source), launch.kernel.encode())
            self._kernels[key] = self._call("cuKernelGetFunction", handle)
        function = self._kernels[key]
        most = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._raising:  # and never lowered, or what another thread or a captured graph launches would be refused
            if launch.shared > self._shared.get(key, 0):  # unasked it is 48 KB less what the kernel has beside it
                self._call("cuFuncSetAttribute", function, most, launch.shared)
                self._shared[key] = launch.shared
        return function

    def _library(self, source: Source) -> Any:
        if source not in self._libraries:
            code = toolchain.code_for(source, self._architecture)
            self._libraries[source] = self._call("cuLibraryLoadData", code, [], [], 0, [], [], 0)
        return self._libraries[source]

    def _clustered(self, launch: Launch, stream: int) -> Any:
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = launch.grid, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.block, 1, 1
        config.sharedMemBytes, config.hStream = launch.shared, stream
        attribute = self._driver.CUlaunchAttribute()
        attribute.id = self._driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = launch.cluster, 1, 1
        config.attrs, config.numAttrs = [attribute], 1
        return config

    def _call(self, name: str, *arguments: Any) -> Any:
        code, *values = getattr(self._driver, name)(*arguments)
        if int(code) != 0:
            raise EdgestillError(f"CUDA {name}: {self._driver.cuGetErrorString(code)[1].decode()} ({int(code)})")
        return values[0] if values else None


def load_driver() -> Any:
    """The bindings to the CUDA driver, whose library was found. Raises UnavailableError when one of them is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise UnavailableError(f"cuda-bindings is not here: {one_line(error)}", toolchain.REMEDY) from error
    try:
        driver.cuDriverGetVersion()  # opens the library
    except (RuntimeError, OSError) as error:
        raise UnavailableError(
            f"the NVIDIA driver is not here: {one_line(error)}", "Install it, or use a CPU"
        ) from error
    return driver


def start_torch() -> None:
    """Have torch open the GPU. Raises UnavailableError when it has no CUDA or sees no GPU."""
    try:
        torch.cuda.init()
    except (AssertionError, RuntimeError) as error:  # a torch without CUDA, a machine without GPU
        raise UnavailableError(f"torch has no GPU here: {one_line(error)}", "Install a CUDA build of torch") from error


@cache
def gpu(index: int) -> Gpu:
    """The GPU that torch calls cuda:`index`."""
    return Gpu(index)
