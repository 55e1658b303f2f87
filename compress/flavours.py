"""The table of flavours: the reduced precisions into which `quantize` turns `model.onnx`.

A new flavour is a module with its maker and one row here. Nothing here imports torch or onnx: functions are given as
"module:function" and opened when they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

REFERENCE = "fp32"
"""The precision that `export` writes. Every flavour is made from it and compared with it."""
FOR_TENSORRT = "made for TensorRT; its latency on a CPU says nothing about a GPU"


@dataclass(frozen=True)
class Flavour:
    """One row of the table.

    `maker` names a function `(model) -> model` on `onnx.ModelProto`, or `(model, ranges) -> model` if the flavour
    is `calibrated`; `ranges` are the activation ranges that `compress.graph.calibration.calibrate` measured. `check`
    names a function `(model, canvases) -> str` that gives the reason why the flavour of this FP32 model fails on its
    own hardware, for faults that this CPU cannot show; empty without one.
    """

    name: str
    maker: str
    calibrated: bool
    for_this_cpu: bool
    """It is for this kind of CPU, so its latency here counts in the gate."""
    engine: bool
    """TensorRT plans are built from it."""
    note: str = ""
    """Printed beside its latency on a CPU in the report."""
    check: str = ""

    @property
    def make(self) -> Callable[..., Any]:
        function: Callable[..., Any] = resolve_name(self.maker)
        return function

    def fault(self, model: Any, canvases: Any) -> str:
        """The reason why the flavour fails on its own hardware, measured on the FP32 `model`; empty without one."""
        return str(resolve_name(self.check)(model, canvases)) if self.check else ""


_ROWS = (
    Flavour(
        "fp16",
        "compress.graph.fp16:body_to_fp16",
        calibrated=False,
        for_this_cpu=False,
        engine=True,
        note=FOR_TENSORRT,
        check="compress.graph.fp16:overflow",
    ),
    Flavour(
        "int8-trt",
        "compress.graph.int8_trt:int8_for_tensorrt",
        calibrated=True,
        for_this_cpu=False,
        engine=True,
        note=FOR_TENSORRT,
    ),
    Flavour("int8-cpu", "compress.graph.int8_cpu:int8_for_x86", calibrated=True, for_this_cpu=True, engine=False),
)

FLAVOURS: Mapping[str, Flavour] = {row.name: row for row in _ROWS}
"""By name. The device tries the plan of an earlier row first, until a benchmark there says otherwise: FP16 is safe
for accuracy, and INT8 by explicit Q/DQ is often no faster."""

FILES: Mapping[str, str] = {name: f"model.{name}.onnx" for name in FLAVOURS}
"""Name of the file of each flavour."""

PLAN_PRECISIONS = (*(row.name for row in _ROWS if row.engine), REFERENCE)
"""TensorRT plans are built from these, best first."""
