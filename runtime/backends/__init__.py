"""What runs a model file: one array in, one array out. Which module serves which file is a table."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UsageError

Array = NDArray[Any]

SUFFIXES = {".onnx": "onnx", ".engine": "tensorrt", ".plan": "tensorrt", ".trt": "tensorrt"}
MODULES = {
    "onnx": "runtime.backends.onnx",
    "tensorrt": "runtime.backends.tensorrt",
    "tensorrt_rtx": "runtime.backends.tensorrt",
}
"""Backend of an artifact -> the module that runs it; opened by name, so that only the needed library is loaded."""
DEVICES = ("auto", "cpu", "cuda", "tensorrt")


class Port(NamedTuple):
    """An input or output of a model. A dimension that the file leaves open is None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Backend(Protocol):
    """A loaded model. `providers` says what computes it, fastest first. `run` may be called from several threads."""

    input: Port
    output: Port
    providers: tuple[str, ...]

    def run(self, array: Array) -> Array:
        """The first output for `array`, which has the input's dtype and shape, in memory that the caller owns."""

    def close(self) -> None:
        """Give memory and device back; calling twice is harmless."""


def kind_of(path: Path) -> str:
    """Backend by the suffix. Raises UsageError on another one."""
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise UsageError(
            f"{path}: no backend runs {path.suffix or 'a file without suffix'}", f"Give {known}, or a bundle"
        )
    return SUFFIXES[path.suffix.lower()]


class Opening(NamedTuple):
    """What to load: `data` are the file's bytes where its hash was checked; `threads` limits the CPU's."""

    backend: str
    path: Path
    data: bytes | None = None
    device: str = "auto"
    threads: int | None = None


def open_backend(opening: Opening) -> Backend:
    """Raises UnavailableError when a library, provider or GPU is missing, EngineError when the file does not suit."""
    return import_module(MODULES[opening.backend]).open_model(opening)
