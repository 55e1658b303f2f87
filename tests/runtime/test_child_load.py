from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtime import Detector, child_process
from runtime.backends import child_load, onnx
from runtime.backends.child_load import load_in_child
from runtime.errors import InputError

LOADER = "runtime.backends.onnx:load_error"


def bomb(toys, path, side):
    """A few hundred bytes that ask for side x side floats while ONNX Runtime folds its constants."""
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["huge"]),
        helper.make_node("ReduceMax", ["huge"], ["most"], keepdims=0),
        helper.make_node("Add", ["images", "most"], ["out"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 8, 8])
    return toys.save(path, nodes, [images], [out], {"shape": np.array([side, side], np.int64)}, {})


def test_a_memory_bomb_ends_the_child_only(toys, tmp_path):
    import resource

    path = bomb(toys, tmp_path / "bomb.onnx", 60_000)  # 14 GB
    assert path.stat().st_size < 1000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError) as caught:
        Detector.load(path)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_a_crash_of_the_reader_is_one_line(toys, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -SEGV $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(child_process.sys, "executable", str(script))
    with pytest.raises(InputError, match="signal 11"):
        load_in_child(toys.rows_model(tmp_path / "a.onnx", np.zeros((9, 7), np.float32)), LOADER)


def test_a_reader_that_never_ends_is_stopped(toys, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr(child_process.sys, "executable", str(script))
    monkeypatch.setattr(child_load, "CPU_SECONDS", 0.2)
    with pytest.raises(InputError, match="takes more than"):
        load_in_child(toys.rows_model(tmp_path / "a.onnx", np.zeros((9, 7), np.float32)), LOADER)


def test_a_sound_file_passes(toys, tmp_path):
    load_in_child(toys.rows_model(tmp_path / "a.onnx", np.zeros((9, 7), np.float32)), LOADER)


def test_files_with_a_card_are_not_tried_first(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, "load_in_child", lambda *_: pytest.fail("it was tried in a child"))
    Detector.load(toys.canvas_model(tmp_path / "toy.onnx"))
