from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.graph.untrusted_onnx import read_model
from runtime.errors import InputError


def model_of(*nodes: onnx.NodeProto, constants: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [numpy_helper.from_array(values, name) for name, values in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def external() -> onnx.ModelProto:
    model = model_of(helper.make_node("Add", ["x", "w"], ["y"]), constants={"w": np.ones(1, np.float32)})
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return model


def nested_functions() -> onnx.ModelProto:
    model = model_of(helper.make_node("Deep", ["x"], ["y"], domain="evil"))
    model.functions.append(
        helper.make_function("evil", "Deep", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [])
    )
    return model


def huge_tensor() -> onnx.ModelProto:
    model = model_of(helper.make_node("Add", ["x", "w"], ["y"]), constants={"w": np.ones(1, np.float32)})
    model.graph.initializer[0].dims[:] = [1 << 40]
    return model


KERNEL = {"w": np.ones((1, 3, 1, 1), np.float32)}
HOSTILE = {
    "zero stride": (model_of(helper.make_node("Conv", ["x", "w"], ["y"], strides=[0, 0]), constants=KERNEL), "below 1"),
    "zero pool stride": (
        model_of(helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[0, 0])),
        "below 1",
    ),
    "NonMaxSuppression": (model_of(helper.make_node("NonMaxSuppression", ["x", "x"], ["y"])), "not allowed"),
    "ConstantOfShape bomb": (model_of(helper.make_node("ConstantOfShape", ["x"], ["y"])), "not allowed"),
    "Tile bomb": (model_of(helper.make_node("Tile", ["x", "x"], ["y"])), "not allowed"),
    "custom domain": (model_of(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")), "domain"),
    "local functions": (nested_functions(), "local functions"),
    "external data": (external(), "another file"),
    "huge tensor": (huge_tensor(), "declares shape"),
    "mixed types": (
        model_of(helper.make_node("Add", ["x", "w"], ["y"]), constants={"w": np.ones(1, np.int64)}),
        "says",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_graphs_are_one_line(tmp_path: Path, kind: str):
    model, reason = HOSTILE[kind]
    path = tmp_path / "hostile.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError, match=reason) as caught:
        read_model(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 50, b"\x08\x09"], ids=["empty", "html", "cut"])
def test_other_files_are_one_line(tmp_path: Path, data: bytes):
    path = tmp_path / "other.onnx"
    path.write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX model"):
        read_model(path)


def test_a_missing_file_is_one_line(tmp_path: Path):
    with pytest.raises(InputError, match="cannot read"):
        read_model(tmp_path / "absent.onnx")


def test_memory_of_an_expanding_constant_is_bounded(tmp_path: Path):
    """Expand to 24 TB at load: the child dies or refuses, the caller lives."""
    model = model_of(
        helper.make_node("Expand", ["one", "shape"], ["big"]),
        helper.make_node("Add", ["x", "big"], ["y"]),
        constants={"one": np.ones(1, np.float32), "shape": np.asarray([100_000, 3, 10_000_000, 8])},
    )
    path = tmp_path / "bomb.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(InputError):
        read_model(path)


def test_our_own_graphs_are_read(case, tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(case.boxes(), path)
    assert read_model(path) == onnx.load(path)
