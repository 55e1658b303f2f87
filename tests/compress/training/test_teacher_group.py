"""Files that teach together, mirrored, at a larger size, or with other classes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.config import DistillConfig
from compress.losses.distill import Outputs
from compress.losses.maps import coarser, mirrored
from compress.models import Architecture, YOLOv5, save_model
from compress.training import teacher as teachers
from compress.training.class_map import map_classes
from compress.training.onnx_teacher import OnnxTeacher
from compress.training.teacher import (
    AnyTeacher,
    Source,
    Teacher,
    build_losses,
    load_sources,
    make_teacher,
    student_anchors,
)
from runtime.errors import UsageError

from .toys import NAMES, SIDE, config, quiet

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(folder: Path, seed: int = 0, names: tuple[str, ...] = NAMES, **more: Any) -> Path:
    torch.manual_seed(seed)
    file = folder / f"{seed}.safetensors"
    save_model(YOLOv5(Architecture.of_scale("n", names, **more)), file)
    return file


def made(files: list[Path], names: tuple[str, ...] = NAMES, **settings: Any) -> AnyTeacher:
    """The teacher of these files, for a fresh student."""
    asked = config(losses={"soft": 1.0}, **settings)
    sources = load_sources(files, names, asked, "cpu")
    student = YOLOv5(Architecture.of_scale("p", names, student_anchors(sources, asked)))
    return make_teacher(sources, student, asked, "cpu", quiet)


def alone(file: Path) -> Teacher:
    return Teacher(load_sources([file], NAMES, config(), "cpu")[0].model, "cpu")  # type: ignore[arg-type]


def same(outputs: Outputs, raw: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(outputs.raw, raw, strict=True))


def test_one_file_that_needs_no_change_is_the_network_itself(tmp_path: Path) -> None:
    assert type(made([saved(tmp_path)])) is Teacher


def test_a_file_whose_classes_have_other_names_answers_alike_under_the_datas(tmp_path: Path) -> None:
    file, images = saved(tmp_path, names=("screw", "washer")), torch.rand(1, 3, SIDE, SIDE)
    renamed = made([file], class_map=dict(zip(("screw", "washer"), NAMES, strict=True)))
    assert renamed.arch.names == NAMES
    assert same(renamed(images), made([saved(tmp_path)])(images).raw)


def test_several_teach_by_the_mean_of_their_logits_and_the_first_ones_features(tmp_path: Path) -> None:
    files, images = [saved(tmp_path, 0), saved(tmp_path, 1)], torch.rand(2, 3, SIDE, SIDE)
    first, second = (alone(file)(images) for file in files)
    outputs = made(files)(images)
    assert same(outputs, [(a + b) / 2 for a, b in zip(first.raw, second.raw, strict=True)])
    assert all(torch.equal(a, b) for a, b in zip(outputs.features, first.features, strict=True))
    assert not any(tensor.requires_grad for tensor in (*outputs.raw, *outputs.features))


def test_the_mirrored_image_is_seen_too(tmp_path: Path) -> None:
    file, images = saved(tmp_path), torch.rand(2, 3, SIDE, SIDE)
    network, teacher = alone(file), made([file], teacher_flip=True)
    mirror = mirrored(network(images.flip(3)).raw)
    assert same(teacher(images), [(a + b) / 2 for a, b in zip(network(images).raw, mirror, strict=True)])
    assert same(teacher(images.flip(3)), mirrored(teacher(images).raw))


def test_a_teacher_of_larger_images_gives_the_students_grids(tmp_path: Path) -> None:
    file, images = saved(tmp_path), torch.rand(2, 3, 2 * SIDE, 2 * SIDE)
    network, teacher = alone(file), made([file], teacher_imgsz=2 * SIDE)
    outputs = teacher(images)
    assert same(outputs, [coarser(level, 2) for level in network(images).raw])
    assert [level.shape[2] for level in outputs.raw] == [level.shape[2] for level in outputs.features] == [8, 4, 2]
    halves = torch.tensor(network.arch.anchors) / 2
    assert torch.equal(torch.tensor(teacher.arch.anchors), halves)
    student = YOLOv5(Architecture.of_scale("p", NAMES, teacher.arch.anchors))
    assert build_losses(student, teacher, config(losses={"soft": 1.0, "feat_mse": 1.0}))


def test_a_class_that_one_teacher_knows_is_told_by_it(tmp_path: Path) -> None:
    files = [saved(tmp_path, 0, names=("bolt",)), saved(tmp_path, 1)]
    teacher, images = made(files, class_map={}), torch.rand(1, 3, SIDE, SIDE)
    assert torch.allclose(teacher(images).raw[0][..., 6], alone(files[1])(images).raw[0][..., 6])
    assert (teacher.shape.unknown, teacher.shape.tells_all) == ((1,), False)


def test_an_unknown_class_is_nan(tmp_path: Path) -> None:
    teacher = made([saved(tmp_path, names=("bolt", "washer"))], class_map={"washer": None})
    raw = teacher(torch.rand(1, 3, SIDE, SIDE)).raw
    assert all(level[..., 6].isnan().all() and level[..., :6].isfinite().all() for level in raw)


def test_other_anchors_have_no_mean(tmp_path: Path) -> None:
    other = [[(w + 5, h) for w, h in level] for level in Architecture.of_scale("n", NAMES).anchors]
    with pytest.raises(UsageError, match=r"has other anchors or strides than .* no mean"):
        made([saved(tmp_path, 0), saved(tmp_path, 1, anchors=other)])


@pytest.mark.parametrize("size", [96, 32, 63])
def test_a_size_that_is_no_multiple_is_refused_with_those_that_are(size: int) -> None:
    with pytest.raises(ValueError, match="no multiple of imgsz 64: set 64, 128 or 192"):
        DistillConfig(imgsz=64, teacher_imgsz=size)


ONE_BOX = torch.tensor([[0.5, 0.5, 0.4, 0.4, 2.0, 4.6, -4.6]])


def boxes_file() -> OnnxTeacher:
    """Stands for an ONNX file that gives one box in the middle of each image."""
    file: Any = SimpleNamespace(names=NAMES, side=SIDE, run=lambda image: [])
    return OnnxTeacher(file, lambda *_: ONE_BOX)


@pytest.fixture
def boxes() -> Source:
    return Source(Path("other.onnx"), map_classes("it", NAMES, NAMES, {}), None, (), onnx=boxes_file())


def test_boxes_become_maps_that_a_head_loss_can_compare(boxes: Source) -> None:
    student, asked = YOLOv5(Architecture.of_scale("p", NAMES)), config(losses={"soft": 1.0})
    teacher = make_teacher([boxes], student, asked, "cpu", quiet)
    images = torch.rand(2, 3, SIDE, SIDE)
    outputs = teacher(images)
    assert not outputs.features
    assert any((level[..., 4] == 2).any() for level in outputs.raw)
    (loss,) = build_losses(student, teacher, asked).values()
    value = loss(Outputs(*student.forward_features(images)), outputs)
    assert value.isfinite()
    value.backward()
    assert all(conv.weight.grad.isfinite().all() for conv in student.detect.m)


def test_a_feature_loss_with_boxes_is_refused(boxes: Source) -> None:
    student, asked = YOLOv5(Architecture.of_scale("p", NAMES)), config(losses={"feat_mse": 1.0})
    teacher = make_teacher([boxes], student, asked, "cpu", quiet)
    with pytest.raises(UsageError, match="'feat_mse' compares features, which an ONNX file does not give"):
        build_losses(student, teacher, asked)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"teacher_flip": True}, r"gives boxes, which have no mean .*\. Let it teach alone"),
        ({"teacher_imgsz": 2 * SIDE}, r"takes images of 64 pixels, not of 128\. Set distill.teacher_imgsz=64"),
        ({"imgsz": 96}, r"takes images of 64 pixels, not of 96\. Export it at 96 pixels"),
    ],
)
def test_what_boxes_cannot_do_is_refused(
    settings: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "open_onnx", lambda *_: boxes_file())
    with pytest.raises(UsageError, match=complaint):
        load_sources([Path("other.onnx")], NAMES, config(**settings), "cpu")
