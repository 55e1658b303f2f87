from __future__ import annotations

import json
from pathlib import Path

from compress.inputs import kept_files, measured_files


def test_a_flavour_that_could_not_be_made_is_neither_measured_nor_shipped(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("export", "quantize")}
    folders["quantize"].mkdir()
    entries = [
        {"name": "fp32", "file": "model.onnx", "kept": True, "reason": "the reference"},
        {"name": "fp16", "file": None, "kept": False, "reason": "it cannot be made"},
        {"name": "int8-cpu", "file": "model.int8-cpu.onnx", "kept": False, "reason": "loses 0.5"},
        {"name": "int8-trt", "file": "model.int8-trt.onnx", "kept": True, "reason": "loses 0.0"},
    ]
    (folders["quantize"] / "quantize.json").write_text(json.dumps(entries))
    files = {(file.role, file.precision): file.path.name for file in measured_files(folders)}
    assert files == {
        ("teacher", "fp32"): "teacher.onnx",
        ("student", "fp32"): "model.onnx",
        ("student", "int8-cpu"): "model.int8-cpu.onnx",
        ("student", "int8-trt"): "model.int8-trt.onnx",
    }
    assert set(kept_files(folders)) == {"fp32", "int8-trt"}
