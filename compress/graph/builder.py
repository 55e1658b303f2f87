"""Write ONNX nodes by name: the same calls give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from compress.graph.opsets import for_opset
from runtime.files import atomic_write

FLOAT, UINT8, INT64, BOOL = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64, TensorProto.BOOL
Shape = Sequence[int | str]
"""Dimensions; a string names a dynamic one."""


class GraphBuilder:
    """Nodes and constants of one graph, in topological order because each node names existing tensors.

    Nodes are added in the forms of opset 18; `build` writes older ones where the opset is older.
    """

    def __init__(self, opset: int = 19) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        """Add an initialiser. Raises ValueError when the name exists with other values."""
        tensor = numpy_helper.from_array(np.asarray(values, dtype, order="C"), name)
        if self.constants.setdefault(name, tensor) != tensor:
            raise ValueError(f"constant {name!r} exists with other values")
        return name

    def floats(self, name: str, values: Any) -> str:
        return self.constant(name, values, np.float32)

    def ints(self, name: str, values: Any) -> str:
        return self.constant(name, values, np.int64)

    def op(self, kind: str, *inputs: str, name: str, **attributes: Any) -> str:
        """One node with one output that carries the node's name."""
        return self.ops(kind, *inputs, names=(name,), **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str], **attributes: Any) -> Sequence[str]:
        """One node with one output for each of `names`; the node is named after the first."""
        self.nodes.append(helper.make_node(kind, list(inputs), list(names), name=names[0], **attributes))
        return names

    def extend(self, nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]) -> None:
        """Add nodes and the constants that they read."""
        self.nodes.extend(nodes)
        for name, values in constants.items():
            self.constant(name, values)

    def build(
        self,
        inputs: Mapping[str, tuple[int, Shape]],
        outputs: Mapping[str, tuple[int, Shape]],
        metadata: Mapping[str, str],
    ) -> onnx.ModelProto:
        """The finished model, checked with shape inference. Tensors are `{name: (TensorProto dtype, shape)}`."""
        nodes, constants = for_opset(self.nodes, self.constants, self.opset)
        graph = helper.make_graph(
            nodes,
            "edgestill",
            [helper.make_tensor_value_info(name, *spec) for name, spec in inputs.items()],
            [helper.make_tensor_value_info(name, *spec) for name, spec in outputs.items()],
            list(constants.values()),
        )
        opsets = [helper.make_opsetid("", self.opset)]
        model = helper.make_model(
            graph,
            opset_imports=opsets,
            ir_version=max(8, helper.find_min_ir_version_for(opsets)),
            producer_name="edgestill",
        )
        helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model, full_check=True)
        return model


def write_model(model: onnx.ModelProto, path: Path) -> Path:
    """Write the model atomically; equal models make equal bytes."""
    with atomic_write(path) as temporary:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
    return path
