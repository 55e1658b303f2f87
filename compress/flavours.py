"""The table of flavours: the reduced precisions into which `quantize` turns `model.onnx`.

A new flavour is a module with its maker and one row here. Nothing here imports torch or onnx: functions are given as
"module:function" and opened when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from typing import Any

from compress.schemes import SCHEMES, Scheme
from runtime.backends import BACKENDS

REFERENCE = "fp32"
"""The precision that `export` writes. Every flavour is made from it and compared with it."""


@dataclass(frozen=True)
class Flavour:
    """One row of the table.

    `maker` names a function `(model) -> model` on `onnx.ModelProto`; of a flavour with a `scheme` it is
    `(model, ranges, scheme, *, float_layers, draw) -> model`, with the activation ranges that
    `compress.graph.ranges.calibrate` measured. `check` names a function `(model, canvases) -> str` that gives the
    reason why the flavour of this FP32 model fails on its own hardware, for faults that this CPU cannot show.
    """

    name: str
    maker: str
    scheme: Scheme | None = None
    """Its form of INT8; None needs no calibration."""
    backend: str = ""
    """Backend of the runtime that runs the file on a CPU. Where its library is installed, its kernels judge accuracy
    and its latency counts in the gate; elsewhere the accuracy is that of the graph as it is written."""
    devices: tuple[str, ...] = ()
    """Devices of the runtime that the file is made for, the best first. Its card names them and the backend, so that
    the runtime takes these, or refuses the file in one line, unless the caller names others."""
    engine: bool = False
    """TensorRT plans are built from it."""
    note: str = ""
    """Printed in the report beside its latency on a CPU, where another library than its own was timed."""
    check: str = ""

    @property
    def is_run_here(self) -> bool:
        """Whether the library that the file is made for runs it on this CPU."""
        return self.backend != "" and BACKENDS[self.backend].is_installed

    @property
    def judge(self) -> str:
        """Says in which library its accuracy is measured here."""
        if self.is_run_here:
            return f"in {BACKENDS[self.backend].library}"
        if not self.backend:
            return "computed as it is written"
        return f"computed as it is written, as {BACKENDS[self.backend].library} is not installed"

    @property
    def make(self) -> Callable[..., Any]:
        function: Callable[..., Any] = resolve_name(self.maker)
        return function if self.scheme is None else partial(function, scheme=self.scheme)

    def fault(self, model: Any, canvases: Any) -> str:
        """The reason why the flavour fails on its own hardware, measured on the FP32 `model`; empty without one."""
        return str(resolve_name(self.check)(model, canvases)) if self.check else ""


QDQ = "compress.graph.qdq:quantised"
FP16_OVERFLOW = "compress.graph.fp16:overflow"
FOR_TENSORRT = "made for TensorRT; its latency on a CPU says nothing about a GPU"
FOR_OPENVINO = "made for OpenVINO (pip install 'edgestill[openvino]'); its latency in another library says nothing"
FOR_ORT = "made for ONNX Runtime; its latency in another library says nothing"

_ROWS = (
    Flavour(
        "fp16",
        "compress.graph.fp16:body_to_fp16",
        devices=("cuda", "tensorrt"),
        engine=True,
        note=FOR_TENSORRT,
        check=FP16_OVERFLOW,
    ),
    Flavour(
        "int8-trt",
        QDQ,
        SCHEMES["tensorrt"],
        devices=("tensorrt",),
        engine=True,
        note=FOR_TENSORRT,
        check=FP16_OVERFLOW,
    ),
    Flavour("int8-openvino", QDQ, SCHEMES["openvino"], "openvino", ("cpu",), note=FOR_OPENVINO),
    Flavour("int8-ort", QDQ, SCHEMES["onnxruntime"], "onnx", ("cpu",), note=FOR_ORT),
)

FLAVOURS: Mapping[str, Flavour] = {row.name: row for row in _ROWS}
"""By name. The device tries the plan of an earlier row first, until a benchmark there says otherwise: FP16 is safe
for accuracy, and INT8 by explicit Q/DQ is often no faster."""

FILES: Mapping[str, str] = {name: f"model.{name}.onnx" for name in FLAVOURS}
"""Name of the file of each flavour."""

PLAN_PRECISIONS = (*(row.name for row in _ROWS if row.engine), REFERENCE)
"""TensorRT plans are built from these, best first."""
