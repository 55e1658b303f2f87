"""Backends: each runs one kind of model file, from one array to one array and a cutoff. `BACKENDS` is their table.

A new backend is a module with `load(request) -> Backend` and a row here; nothing else in `runtime` names a backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime import onnx_file, openvino_ir
from runtime.errors import InputError, UsageError

Array = NDArray[Any]


class BackendSpec(NamedTuple):
    """A row of the table. A file of a backend that is not `portable` is native code: it runs only with the version of
    the library, the platform and the NVIDIA GPUs it was built for, and is loaded only if a card knows its hash.
    """

    name: str
    """The backend's name in model cards, and the import name of its library unless `package` says another."""
    module: str
    """Module with `load(request)`; imported when a file is loaded, so that only the needed library is."""
    suffixes: tuple[str, ...]
    """Suffixes of its files. If two rows have the same one, the caller or the card decides, else the first row."""
    distributions: tuple[str, ...]
    """Distributions that install its library; they give its version."""
    remedy: str
    """Hint of an error when a file is missing, altered or has no card."""
    package: str = ""
    devices: tuple[str, ...] = ()
    """Values of `device`, besides "auto", for which files of this backend are taken from a bundle."""
    portable: bool = True
    metadata: Mapping[str, Callable[[Path], dict[str, str]]] = {}
    """Suffix -> the reader of the text that such a file carries, a model card for example, without the library."""

    @property
    def library(self) -> str:
        """Import name of the library."""
        return self.package or self.name

    @property
    def is_installed(self) -> bool:
        return find_spec(self.library) is not None


BACKENDS: Mapping[str, BackendSpec] = {
    spec.name: spec
    for spec in (
        BackendSpec(
            name="onnx",
            module="runtime.backends.onnx",
            suffixes=(".onnx",),
            distributions=("onnxruntime", "onnxruntime-gpu"),
            remedy="Copy or export it again",
            package="onnxruntime",
            devices=("cpu", "cuda", "tensorrt"),
            metadata={".onnx": onnx_file.read_metadata},
        ),
        BackendSpec(
            name="openvino",
            module="runtime.backends.openvino",
            suffixes=(".onnx", ".xml"),
            distributions=("openvino",),
            remedy="Copy or convert it again",
            devices=("cpu",),
            metadata={".onnx": onnx_file.read_metadata, ".xml": openvino_ir.read_metadata},
        ),
        BackendSpec(
            name="tensorrt",
            module="runtime.backends.tensorrt",
            suffixes=(".engine", ".plan", ".trt"),
            distributions=("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11"),
            remedy="Build it again from its ONNX file with `python -m runtime build`",
            devices=("tensorrt",),
            portable=False,
        ),
        BackendSpec(
            name="tensorrt_rtx",
            module="runtime.backends.tensorrt",
            suffixes=(".engine", ".plan", ".trt"),
            distributions=(
                "tensorrt-rtx",
                "tensorrt-rtx-cu13",
                "tensorrt-rtx-cu12",
                "tensorrt_rtx",
                "tensorrt-rtx-cu13-bindings",
            ),
            remedy="Build it again from its ONNX file with `python -m runtime build`",
            devices=("tensorrt",),
            portable=False,
        ),
    )
}
SUFFIXES = tuple(dict.fromkeys(suffix for spec in BACKENDS.values() for suffix in spec.suffixes))
NAMES = ("auto", *BACKENDS)
"""Values of `backend`."""
DEVICES = ("auto", *dict.fromkeys(device for spec in BACKENDS.values() for device in spec.devices))


def backend_of(path: Path) -> BackendSpec:
    """The backend of a file by its suffix. Raises InputError when no backend has it."""
    suffix = path.suffix.lower()
    for spec in BACKENDS.values():
        if suffix in spec.suffixes:
            return spec
    known = ", ".join(SUFFIXES)
    raise InputError(f"{path}: no backend runs {suffix or 'a file without suffix'}", f"Give {known}, or a bundle")


class TensorSpec(NamedTuple):
    """An input or output of a model. A dimension that the file leaves open is None."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


CUTOFF = "cutoff"
"""Name of the output with the score up to which boxes may be missing, in models that have it."""


class RawOutput(NamedTuple):
    """The outputs of a model: rows or boxes (B, ...), and the `cutoff` of each image (B,) if the model has it."""

    array: Array
    cutoff: Array | None = None


class Backend(Protocol):
    """A loaded model. `providers` names what computes it, fastest first. `run` may be called from several threads."""

    input: TensorSpec
    output: TensorSpec
    providers: tuple[str, ...]

    def run(self, array: Array) -> RawOutput:
        """The outputs for `array`, which has the input's dtype and shape, in memory that the caller owns.

        Raises UsageError (`closed_error`) when the model is closed, EngineError when it fails on this input.
        """

    def close(self) -> None:
        """Free memory and device; calling twice is harmless."""


class LoadOptions(NamedTuple):
    """`threads` limits the threads of the CPU; with `spin` those of ONNX Runtime wait actively. `as_written` computes
    quantised layers in float, as the file says, instead of by integer kernels, which differ from library to library;
    OpenVINO refuses it. Backends of a GPU ignore all three.
    """

    device: str = "auto"
    threads: int | None = None
    spin: bool = True
    as_written: bool = False


class LoadRequest(NamedTuple):
    """A file to load. `contents` maps the file's name, and the names of its parts, to their bytes if their hashes
    were checked; it is empty if no hash is known. A file with `has_card` comes from edgestill's own export.
    """

    backend: str
    path: Path
    contents: Mapping[str, bytes] = {}
    options: LoadOptions = LoadOptions()
    has_card: bool = True

    @property
    def data(self) -> bytes | None:
        """The file's own bytes, if its hash was checked."""
        return self.contents.get(self.path.name)


def closed_error() -> UsageError:
    return UsageError("the detector is closed", "Load it again, or call it inside its with block")


def load_backend(request: LoadRequest) -> Backend:
    """Raises UnavailableError when a library, provider or GPU is missing, EngineError when the file does not suit."""
    return import_module(BACKENDS[request.backend].module).load(request)
