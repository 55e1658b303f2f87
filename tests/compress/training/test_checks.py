from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.compute.resize import reduced
from compress.data import Dataset, Sample
from compress.evaluate import evaluate
from compress.losses.preflight import Check
from compress.training.checks import (
    Accuracy,
    Cost,
    check_anchors,
    check_teacher,
    compared,
    measured_cost,
    require_passed,
    student_accuracy,
    teacher_accuracy,
)
from compress.training.class_map import map_classes
from compress.training.teacher import Source, Teacher, load_sources, make_teacher
from runtime.errors import EdgestillError

from .test_teacher_group import saved
from .toys import NAMES, batch, config, network, quiet, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def source(path: str = "big.pt", imgsz: int | None = None, names: tuple[str, ...] = NAMES) -> Source:
    return Source(Path(path), map_classes("it", names, NAMES, {}), None, (), imgsz=imgsz)


def warnings(one: Source, teacher: float = 0.5, start: float | None = None, **changes: object) -> list[str]:
    begun = None if start is None else Accuracy(start, start, 4, rect=True)
    checks = check_teacher([one], Accuracy(teacher, teacher, 4, rect=True), begun, config(**changes), NAMES)
    assert all(check.ok for check in checks)
    return [check.detail for check in checks if check.warns]


def test_a_sound_teacher_needs_no_warning() -> None:
    assert warnings(source(imgsz=64)) == warnings(source(), 0.5, 0.2) == []


@pytest.mark.parametrize(
    ("size", "remedy"), [(128, "set distill.teacher_imgsz=128 or fine-tune it at 64"), (96, ": fine-tune it at 64")]
)
def test_another_size_than_the_teachers_own_is_told_with_the_remedy(size: int, remedy: str) -> None:
    (told,) = warnings(source(imgsz=size))
    assert told.startswith(f"trained at {size} pixels, used at 64")
    assert told.endswith(remedy)


def test_a_map_that_loses_classes_says_which() -> None:
    (told,) = warnings(source(names=("nut", "car", "dog")))
    assert told == "1 of 2 classes, 2 of its own left out; only the labels teach bolt"


def test_a_class_that_neither_teacher_nor_labels_teach_is_told() -> None:
    (told,) = warnings(source(names=("nut", "car", "dog")), label_weight=0)
    assert told.endswith("; nothing teaches bolt")


@pytest.mark.parametrize("start", [None, 0.01])
def test_a_teacher_that_finds_next_to_nothing_is_told(start: float | None) -> None:
    (told,) = warnings(source(), 0.02, start)
    assert told.endswith("fine-tune it on this data")


@pytest.mark.parametrize(
    ("side", "said"), [(0.25, "100.0% of the labelled boxes match one at 64"), (0.02, "raise imgsz")]
)
def test_boxes_that_match_no_anchor_are_told(side: float, said: str) -> None:
    labels = np.array([[0, 0.5, 0.5, side, side]], np.float32)
    sample = Sample(Path("a.png"), "a.png", labels, (48, 64), "")
    (check,) = check_anchors(network().arch.anchors, [sample], config())
    assert check.ok
    assert said in check.detail
    assert check.warns == (side == 0.02)
    assert not list(check_anchors(network().arch.anchors, [replace(sample, labels=labels[:0])], config()))


@pytest.mark.parametrize("start", [0.5, 0.6])
def test_a_teacher_no_better_than_the_student_is_told(start: float) -> None:
    (told,) = warnings(source(), 0.5, start)
    assert f"the student starts at {start:.4f}: train the teacher longer" in told


def test_the_line_at_the_end_compares_both() -> None:
    assert compared(0.48, 0.5) == "the student reaches 96% of its teacher: mAP50-95 0.4800 against 0.5000 on val"
    assert "a better teacher would teach it more" in compared(0.5, 0.5)
    assert compared(0.1, 0.0).endswith("its teacher 0")


def test_the_first_failed_check_is_one_line() -> None:
    lines: list[str] = []
    require_passed([Check("a", True, "fine"), Check("b", True, "look", warns=True)], lines.append)
    assert lines == ["b: look"]
    with pytest.raises(EdgestillError, match="would not work: b: bad"):
        require_passed([Check("b", False, "bad"), Check("c", False, "worse")], quiet)


def test_the_teacher_is_measured_as_a_network_is(tiny_data: Dataset, tmp_path: Path) -> None:
    val, asked = tiny_data.splits["val"].samples, config()
    model = network("n", seed=1)
    found = teacher_accuracy(Teacher(model, "cpu"), val, asked)
    expected = evaluate(model, val, imgsz=asked.imgsz, batch=2 * asked.batch, device="cpu", coco=False).yolo
    assert (found.map50_95, found.map50) == pytest.approx((expected.map50_95, expected.map50))
    assert found == student_accuracy(model, val, asked, "cpu", rect=True)


def test_a_group_is_measured_in_its_own_pixels(tiny_data: Dataset, tmp_path: Path) -> None:
    """A teacher of images twice as large finds the boxes where they are, to the cell that is twice as wide."""
    val = tiny_data.splits["val"].samples
    asked = config(losses={"soft": 1.0}, teacher_imgsz=128)
    sources = load_sources([saved(tmp_path, names=tiny_data.names)], tiny_data.names, asked, "cpu")
    group = make_teacher(sources, network(), asked, "cpu", quiet)
    assert teacher_accuracy(group, val, asked).images == len(val)


def test_the_estimate_grows_with_batch_images_and_epochs() -> None:
    cost = Cost(teacher_ms=10, student_ms=30, fixed_bytes=1 << 30, image_bytes=float(1 << 28))
    told = cost.estimate(config(batch=4, epochs=60), images=1000)
    assert told == (
        "160 ms a step of 4 images, 15000 steps, 40 min without loading and validation; 2.0 GiB beside torch itself"
    )


def test_more_images_keep_more_memory(tmp_path: Path) -> None:
    made = trainer(config(), tmp_path, distils=True)
    assert made.job.teacher is not None
    costs = [measured_cost(made.objective, made.job.teacher, batch(0, n), made.job.config) for n in (1, 2)]
    one, two = (cost.image_bytes * n for cost, n in zip(costs, (1, 2), strict=True))
    assert 100_000 < one < two
    assert costs[0].fixed_bytes == costs[1].fixed_bytes > 4 * sum(p.numel() for p in made.objective.parameters())


def test_smaller_images_are_means_of_squares() -> None:
    images = torch.rand(2, 3, 8, 8)
    assert reduced(images, 8) is images
    assert torch.allclose(reduced(images, 4)[0, 0, 1, 0], images[0, 0, 2:4, 0:2].mean())


def test_a_teacher_that_trains_too_costs_a_training_of_its_own(tmp_path: Path) -> None:
    costs = {}
    for strategy in ("offline", "joint"):
        made = trainer(config(strategy=strategy, losses={"soft": "auto"}), tmp_path, distils=True)
        teacher = made.job.teacher or Teacher(network("n", seed=1), "cpu")
        costs[strategy] = measured_cost(made.objective, teacher, batch(0, 1), made.job.config)
    offline, joint = costs.values()
    assert joint.image_bytes > 2 * offline.image_bytes
    assert joint.fixed_bytes > 2 * offline.fixed_bytes
    assert offline.line.startswith("teacher: ")
    assert joint.line.startswith("teacher, which trains too: ")
