"""The stage with the teachers that one has: several, mirrored, of larger images, of other classes, ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from compress.config import DistillConfig, StudentConfig
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, load_model, save_model
from compress.stages import distill as stage
from compress.stages.distill import ACCURACY, Config, Inputs, all_checks, run
from compress.training.state import load_state
from runtime.errors import EdgestillError, InputError, UsageError
from runtime.files import read_json, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
MAP = {"crimson": "red", "scarlet": "red", "blue": None}


def quiet(_line: str) -> None: ...


def config(init: str = "auto", **changes: Any) -> Config:
    base = {
        "epochs": 2, "batch": 4, "imgsz": 64, "val_interval": 2, "workers": 0, "tensorboard": False,
        "losses": {"soft": "auto", "feat_mse": 0.1},
    }  # fmt: skip
    student = StudentConfig.model_validate({"scale": "p", "init": init})
    return Config(distill=DistillConfig.model_validate(base | changes), student=student, device="cpu")


def saved(folder: Path, seed: int, names: tuple[str, ...] = ("red", "green")) -> Path:
    torch.manual_seed(seed)
    model = YOLOv5(Architecture.of_scale("n", names))
    model.init_detect_bias()
    save_model(model, folder / f"{seed}.safetensors", {"imgsz": 64})
    return folder / f"{seed}.safetensors"


def onnx_of_one_box(folder: Path) -> Path:
    """Boxes [1, 1, 6] in the middle of every image, of the first class."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 64, 64])
    box = np.array([[[20, 20, 44, 44, 0.9, 0]]], np.float32)
    nodes = [
        helper.make_node("ReduceMin", ["images"], ["least"], keepdims=0),
        helper.make_node("Mul", ["least", "zero"], ["nothing"]),
        helper.make_node("Add", ["box", "nothing"], ["output"]),
    ]
    constants = [numpy_helper.from_array(np.float32(0).reshape(()), "zero"), numpy_helper.from_array(box, "box")]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 1, 6])
    graph = helper.make_graph(nodes, "one", [images], [output], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / "one.onnx")
    return folder / "one.onnx"


def cut_after_one_epoch(settings: Config, inputs: Inputs, out: Path) -> None:
    def stop(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(settings, inputs, out, stop)


def test_a_resumed_distillation_with_everything_equals_a_straight_one_and_measures_no_teacher_again(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = saved(tmp_path, 1, ("green", *MAP)), saved(tmp_path, 2, ("red", "green"))
    settings = config(teachers=[second], teacher_flip=True, teacher_imgsz=128, class_map=MAP)
    run(settings, Inputs(tiny_data, first), tmp_path / "straight", quiet)
    cut_after_one_epoch(settings, Inputs(tiny_data, first), tmp_path / "cut")
    monkeypatch.setattr(stage, "teacher_accuracy", None)
    lines: list[str] = []
    run(settings, Inputs(tiny_data, first, resume=True), tmp_path / "cut", lines.append)
    straight, cut = (load_state(tmp_path / name / "state.pt") for name in ("straight", "cut"))
    for one, other in zip([straight["objective"], *straight["ema"]], [cut["objective"], *cut["ema"]], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())
    accuracy = read_json(tmp_path / "cut" / ACCURACY)
    assert accuracy == read_json(tmp_path / "straight" / ACCURACY)
    assert accuracy.keys() == {"map50_95", "map50", "images", "rect", "student_map50_95"}
    assert [line for line in lines if line.startswith("the student reaches")]
    taken = read_json(tmp_path / "straight" / "inheritance.json")
    assert taken["classes"] == ["red", "green"]
    names = [one["name"] for one in read_json(tmp_path / "cut" / "checks.json")]
    assert {"size of 1.safetensors", "classes of 1.safetensors", "accuracy of the teacher"} <= set(names)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"teachers": []}, "teacher = sha256 .*, sha256 .*, not sha256 "),
        ({"teacher_flip": True}, "teacher_flip = False, not True"),
        ({"teacher_imgsz": 128}, "teacher_imgsz = None, not 128"),
        ({"class_map": {}}, "class_map = None, not {}"),
    ],
)
def test_another_teacher_than_it_began_with_is_refused(
    change: dict[str, Any], said: str, tiny_data: Dataset, tmp_path: Path
) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    begun: dict[str, Any] = {"teachers": [second], "losses": {}}
    cut_after_one_epoch(config(**begun), Inputs(tiny_data, first), tmp_path / "cut")
    with pytest.raises(UsageError, match=f"was trained with {said}") as caught:
        run(config(**begun | change), Inputs(tiny_data, first, resume=True), tmp_path / "cut", quiet)
    assert "\n" not in str(caught.value)


def test_a_teacher_that_moved_is_the_same(tiny_data: Dataset, tmp_path: Path) -> None:
    first, second = saved(tmp_path, 1), saved(tmp_path, 2)
    cut_after_one_epoch(config(teachers=[second], losses={}), Inputs(tiny_data, first), tmp_path / "cut")
    moved = second.rename(tmp_path / "moved.safetensors")
    run(config(teachers=[moved], losses={}), Inputs(tiny_data, first, resume=True), tmp_path / "cut", quiet)


def test_a_check_makes_all_checks_and_leaves_nothing(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    found = {one.name: one for one in all_checks(config(), Inputs(tiny_data, saved(tmp_path, 1)), quiet)}
    assert all(one.ok for one in found.values())
    assert found["time and memory, estimated"].detail.endswith("GiB beside torch itself")
    assert "the student starts at" in found["accuracy of the teacher"].detail
    assert not list((tmp_path / "tmp").iterdir())


def test_boxes_of_another_detector_teach_a_student_from_scratch(tiny_data: Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    file = onnx_of_one_box(tmp_path)
    run(config(losses={"soft": "auto"}), Inputs(tiny_data, file), tmp_path / "out", lines.append)
    assert any("an ONNX file has none that it could inherit" in line for line in lines)
    assert [line for line in lines if line.startswith("anchors: ")]
    assert load_model(tmp_path / "out" / "student.safetensors").arch.names == tiny_data.names
    assert not (tmp_path / "out" / "inheritance.json").exists()


def test_a_training_on_labels_alone_is_not_compared_with_an_earlier_ones_teacher(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    write_json(tmp_path / ACCURACY, {"map50_95": 0.5, "map50": 0.8, "images": 9, "rect": True})
    lines: list[str] = []
    alone = config("scratch", losses={}, epochs=1)
    run(alone, Inputs(tiny_data, saved(tmp_path, 1), resume=False), tmp_path, lines.append)
    assert not [line for line in lines if "of its teacher" in line]
    assert not (tmp_path / ACCURACY).exists()


@pytest.mark.parametrize(
    ("settings", "error", "complaint"),
    [
        ({"init": "inherit"}, UsageError, "there is no network to inherit from"),
        ({"losses": {"pkd": "auto"}}, UsageError, "'pkd' compares features, which an ONNX file does not give"),
        ({"teacher_imgsz": 128}, UsageError, "takes images of 64 pixels, not of 128"),
        ({"class_map": {"rde": "red"}}, UsageError, "no teacher has a class 'rde'. Did you mean 'red'"),
    ],
)
def test_what_an_onnx_file_cannot_do_is_one_line(
    settings: dict[str, Any], error: type[EdgestillError], complaint: str, tiny_data: Dataset, tmp_path: Path
) -> None:
    with pytest.raises(error, match=complaint) as caught:
        all_checks(
            config(**{"losses": {"soft": "auto"}} | settings), Inputs(tiny_data, onnx_of_one_box(tmp_path)), quiet
        )
    assert "\n" not in str(caught.value)


def test_other_classes_are_refused_with_the_map_to_write(tiny_data: Dataset, tmp_path: Path) -> None:
    file = saved(tmp_path, 1, ("green", "blue", "pink"))
    with pytest.raises(InputError, match=r"distill\.class_map: \{blue: null, pink: null\}"):
        all_checks(config(), Inputs(tiny_data, file), quiet)


def test_a_teacher_that_trains_too_is_a_checkpoint_of_the_datas_classes(tiny_data: Dataset, tmp_path: Path) -> None:
    other = saved(tmp_path, 1, ("green", "blue"))
    asked = config(strategy="joint", losses={"soft": "auto"}, class_map={"green": "red"})
    for teacher in (other, onnx_of_one_box(tmp_path)):
        settings = asked if teacher == other else config(strategy="joint", losses={"soft": "auto"})
        with pytest.raises(UsageError, match=r"strategy joint trains the teacher .* is no checkpoint of its classes"):
            all_checks(settings, Inputs(tiny_data, teacher), quiet)
