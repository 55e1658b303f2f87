from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.graph.assemble import yolov5_graph
from compress.graph.head import HeadShape
from compress.graph.network import trace
from compress.models import YOLOv5
from compress.stages.export import RawMaps
from compress.training.onnx_teacher import CERTAIN, OnnxTeacher, open_onnx
from runtime.errors import InputError

from .toys import NAMES, SIDE, network

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


def opened(model: onnx.ModelProto, folder: Path) -> OnnxTeacher:
    onnx.save(model, folder / "teacher.onnx")
    return open_onnx(folder / "teacher.onnx", CPU, NAMES)


@pytest.fixture(scope="module")
def teacher() -> YOLOv5:
    return network("p", seed=3).eval()


@pytest.fixture(scope="module")
def conventional(teacher: YOLOv5) -> onnx.ModelProto:
    """YOLOv5's own kind of export: decoded rows, the anchors among the constants."""
    head = HeadShape(len(NAMES), np.asarray(teacher.arch.anchors, np.float32), teacher.strides, (SIDE, SIDE))
    return yolov5_graph(
        trace(RawMaps(teacher.fuse()), (SIDE, SIDE)),
        head,
        opset=19,
        metadata={"names": str(dict(enumerate(NAMES))), "stride": "32"},
    )


def test_the_decode_of_a_conventional_export_is_undone(
    teacher: YOLOv5, conventional: onnx.ModelProto, tmp_path: Path
) -> None:
    found = opened(conventional, tmp_path)
    assert (found.anchors, found.strides, found.file.names) == (teacher.arch.anchors, (8, 16, 32), NAMES)
    images = torch.rand(3, 3, SIDE, SIDE)
    with torch.no_grad():
        for own, theirs in zip(teacher(images), found.maps(images), strict=True):
            torch.testing.assert_close(theirs, own, rtol=1e-2, atol=2e-2)


def test_rows_whose_anchors_are_not_inside_are_boxes(conventional: onnx.ModelProto, tmp_path: Path) -> None:
    hidden = onnx.ModelProto.FromString(conventional.SerializeToString())
    for tensor in hidden.graph.initializer:
        if tensor.name.endswith(".anchors"):  # as a graph has them that divides them by something
            values = numpy_helper.to_array(tensor).copy()
            values[0, 0] *= -1
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    found = opened(hidden, tmp_path)
    assert found.anchors is None
    boxes = found.boxes(torch.rand(2, 3, SIDE, SIDE))
    assert boxes.shape == (2, 252, 7)
    assert boxes.isfinite().all()


def fixed(
    outputs: dict[str, np.ndarray], shape: Sequence[int | str] = (1, 3, SIDE, SIDE), **metadata: str
) -> onnx.ModelProto:
    """A graph that gives these arrays for every image of `shape`."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    nodes, infos = [], []
    nodes.append(helper.make_node("ReduceMin", ["images"], ["least"], keepdims=0))
    nodes.append(helper.make_node("Mul", ["least", "zero"], ["nothing"]))
    constants = [numpy_helper.from_array(np.float32(0).reshape(()), "zero")]
    for name, values in outputs.items():
        constants.append(numpy_helper.from_array(values.astype(np.float32), f"{name}.values"))
        nodes.append(helper.make_node("Add", [f"{name}.values", "nothing"], [name]))
        infos.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(values.shape)))
    graph = helper.make_graph(nodes, "fixed", [images], infos, constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(made, metadata)
    return made


BOXES = np.array([[[16, 8, 48, 24, 0.75, 1], [0, 0, 0, 0, 0, 0], [8, 8, 24, 24, 0.5, 7]]], np.float32)
PARTS = {"boxes": BOXES[..., :4], "scores": BOXES[..., 4], "labels": BOXES[..., 5]}


@pytest.mark.parametrize("outputs", [{"output": BOXES}, PARTS, dict(reversed(PARTS.items()))])
def test_boxes_of_any_detector_are_shares_of_the_image_with_their_score_as_objectness(
    outputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    found = opened(fixed(outputs), tmp_path)
    assert (found.anchors, found.file.names, found.file.side) == (None, NAMES, SIDE)
    boxes = found.boxes(torch.rand(2, 3, SIDE, SIDE))
    assert boxes.shape == (2, 3, 7)
    expected = torch.tensor([0.5, 0.25, 0.5, 0.25, 1.0986, -CERTAIN, CERTAIN])
    torch.testing.assert_close(boxes[1, 0], expected, rtol=1e-3, atol=1e-4)
    assert not boxes[:, 1:, 2:4].any()  # an empty row, and a class that the data does not have


def raw_maps(teacher: YOLOv5, inside: Callable[[np.ndarray], bool]) -> onnx.ModelProto:
    """Three raw maps, and the groups of anchors that are `inside` as constants of a decode that is not asked for."""
    maps = {f"map{s}": np.full((1, 3, SIDE // s, SIDE // s, 7), s, np.float32) for s in (16, 8, 32)}
    made = fixed(maps)
    for level, anchors in enumerate(np.asarray(teacher.arch.anchors, np.float32)):
        if inside(anchors):
            made.graph.initializer.append(numpy_helper.from_array(anchors[None, :, None, None], f"anchors{level}"))
    return made


def test_raw_maps_are_taken_as_they_are_finest_first(teacher: YOLOv5, tmp_path: Path) -> None:
    found = opened(raw_maps(teacher, lambda _: True), tmp_path)
    assert (found.anchors, found.strides) == (teacher.arch.anchors, (8, 16, 32))
    assert [float(level.mean()) for level in found.maps(torch.rand(2, 3, SIDE, SIDE))] == [8, 16, 32]


def test_raw_maps_without_their_anchors_are_refused(teacher: YOLOv5, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"raw maps without their anchors\. Export it with its decode"):
        opened(raw_maps(teacher, lambda anchors: anchors[0, 0] > 20), tmp_path)


@pytest.mark.parametrize(
    ("outputs", "complaint"),
    [
        ({"output": np.zeros((1, 9, 4))}, r"output is float32 \[1, 9, 4\], expected raw maps"),
        ({"output": np.zeros((1, 252, 8))}, r"3 classes, and names for 2"),
    ],
)
def test_what_is_no_detector_is_refused(outputs: dict[str, np.ndarray], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        opened(fixed(outputs), tmp_path)


def test_a_file_for_several_images_a_call_is_refused(tmp_path: Path) -> None:
    shape = (4, 3, SIDE, SIDE)
    with pytest.raises(InputError, match=r"input is float32 \[4, 3, 64, 64\], expected .*\. Export it for one square"):
        opened(fixed({"output": np.zeros((4, 252, 7))}, shape), tmp_path)


def test_a_graph_that_fails_is_one_line(tmp_path: Path) -> None:
    made = fixed({"map": np.zeros((1, 3, 8, 8, 7))}, ("batch", 3, "side", "side"))
    made.graph.node.insert(0, helper.make_node("Reshape", ["images", "eight"], ["wrong"]))
    made.graph.initializer.append(numpy_helper.from_array(np.array([8, 3, SIDE, SIDE]), "eight"))
    made.graph.node[1].input[0] = "wrong"
    with pytest.raises(InputError, match=r"teacher\.onnx: fails for one image of 64x64 pixels: ") as failed:
        opened(made, tmp_path)
    assert "\n" not in str(failed.value)


def test_a_file_that_does_not_load_is_refused(tmp_path: Path) -> None:
    (tmp_path / "teacher.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match=r"teacher\.onnx"):
        open_onnx(tmp_path / "teacher.onnx", CPU, NAMES)
