"""NumPy arrays in memory that a process shares with the children that it starts."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from collections.abc import Sequence

import numpy as np

AVAILABLE = hasattr(os, "memfd_create")
"""Whether this system has memory without a name: Linux has."""


class SharedArray:
    """An array, at first all zeros, that this process and its children read and write.

    Its memory has no name: the system frees it with the last process that has it, however that ends, and the size of
    /dev/shm, 64 MB in a container, does not limit it. A child must inherit `fd` under its number (`pass_fds`); there
    the pickled array is the same memory. Pages that nobody wrote take no memory.
    """

    def __init__(self, shape: Sequence[int], dtype: type[np.generic], fd: int | None = None) -> None:
        size_bytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        if fd is None:
            fd = os.memfd_create("edgestill")
            os.ftruncate(fd, size_bytes)
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self.array: np.ndarray = np.ndarray(shape, dtype, buffer=mmap.mmap(fd, size_bytes))
        self._made_of = tuple(shape), dtype, fd

    def __reduce__(self) -> tuple[type[SharedArray], tuple[tuple[int, ...], type[np.generic], int]]:
        return SharedArray, self._made_of
