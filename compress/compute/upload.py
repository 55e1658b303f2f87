"""Copies of tensors to a device that travel while it computes."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor

PORTABLE = 1
"""CUDA's flag for memory that is pinned for every GPU."""


class Upload:
    """One copy of tensors, under way or there."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self._device = device
        with torch.cuda.stream(stream) if stream else nullcontext():
            self._copies = tuple(tensor.to(device, non_blocking=True, copy=True) for tensor in tensors)
        self._done = stream.record_event() if stream else None

    def wait(self) -> None:
        """Wait until the tensors that were copied may be overwritten."""
        if self._done:
            self._done.synchronize()

    def copies(self) -> tuple[Tensor, ...]:
        """The tensors on the device; what it is asked to do from now on waits until they are there."""
        if self._done:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._done)
            for copy in self._copies:
                copy.record_stream(current)  # their memory goes to others only when this stream is done with it
        return self._copies


class Uploader:
    """Copies tensors to `device`, beside what a GPU does meanwhile; most of them lie in the memory of `source`.

    For a GPU that memory is pinned as long as this lives: from other memory a copy would keep this process waiting.
    """

    def __init__(self, source: np.ndarray, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._stream:
            _pin(source)
            weakref.finalize(self, _unpin, source)

    def start(self, *tensors: Tensor) -> Upload:
        """Start to copy tensors as they are laid out. For a GPU it returns before they are there."""
        if self._stream:
            tensors = tuple(tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in tensors)
        return Upload(tensors, self._device, self._stream)


def _pin(array: np.ndarray) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(array.ctypes.data, array.nbytes, PORTABLE))


def _unpin(array: np.ndarray) -> None:
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(array.ctypes.data))
