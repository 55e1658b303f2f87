from __future__ import annotations

from onnx import TensorProto, helper

from compress.graph.session import open_session


def test_threads_of_a_session_do_not_spin() -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "toy", [value], [out])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])
    model.ir_version = 9
    options = open_session(model).get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
