from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from compress.config import DistillConfig
from compress.data import Dataset
from compress.stages.report import (
    not_made,
    reference_of_run,
    require_one_model,
    shared_images,
    teacher_left_out,
    trained_for_int8,
)
from runtime.errors import InputError
from runtime.files import write_json
from tests.runtime.toys import card


def test_rows_of_one_student_and_its_plans_are_one_model() -> None:
    mine, other = card(), card(iou=0.45)
    teacher = {"role": "teacher", "file": "teacher.onnx", "identity": "a" * 64}
    student = {"role": "student", "file": "model.onnx", "identity": mine.identity}
    require_one_model([teacher, student, student], mine)
    with pytest.raises(InputError, match=f"model.onnx is of model {mine.identity[:12]}, the plans are of"):
        require_one_model([teacher, student], other)
    with pytest.raises(InputError, match=f"{other.identity[:12]}"):
        require_one_model([student, student | {"identity": other.identity}], mine)


def test_a_flavour_without_a_file_has_a_sentence(tmp_path: Path) -> None:
    made = {"name": "fp32", "file": "model.onnx", "reason": "the reference"}
    failed = {"name": "int8-trt", "file": None, "reason": "the calibration found no range"}
    folders = folders_with(tmp_path, [made, failed], [])
    assert list(not_made(folders)) == ["int8-trt was not made: the calibration found no range."]


def folders_with(
    folder: Path, calibrated: list[dict[str, object]], trained: list[dict[str, object]]
) -> dict[str, Path]:
    write_json(folder / "quantize" / "quantize.json", calibrated)
    write_json(folder / "qad" / "qad.json", trained)
    return {name: folder / name for name in ("export", "quantize", "qad")}


def test_a_flavour_that_was_trained_for_int8_has_a_sentence(tmp_path: Path) -> None:
    """Against the best file of calibration with as many layers in float; what was only timed is no loss."""
    timed = {"float_layers": 0, "drop": None}
    drops = ((2, 0.04), (2, 0.031), (4, 0.01))
    before = {"name": "int8-trt", "steps": [timed, *({"float_layers": n, "drop": drop} for n, drop in drops)]}
    after = {"name": "int8-trt", "steps": [timed, {"float_layers": 2, "drop": 0.0042}], "replaces": True}
    folders = folders_with(tmp_path, [{"name": "fp32", "steps": []}, before], [after])
    assert list(trained_for_int8(folders)) == [
        "int8-trt was trained for INT8: by calibration alone it lost 0.0310 mAP50-95 with 2 layers in float, "
        "now 0.0042, so it replaces the calibrated file."
    ]


def test_a_teacher_whose_file_is_not_measured_has_a_sentence() -> None:
    assert list(teacher_left_out([{"role": "student"}, {"role": "teacher"}])) == []
    (sentence,) = teacher_left_out([{"role": "student"}])
    assert sentence.endswith("its classes are not the data's.")


def test_training_images_among_those_that_are_measured_are_told(tiny_data: Dataset) -> None:
    assert list(shared_images(tiny_data)) == []
    train, val = tiny_data.splits["train"], tiny_data.splits["val"]
    mixed = replace(val, samples=(*val.samples, *train.samples[:2]))
    (sentence,) = shared_images(replace(tiny_data, splits={"train": train, "val": mixed}))
    assert sentence.startswith("2 of the 6 images that accuracy is measured on are training images too")


@pytest.mark.parametrize(
    ("settings", "has_labels", "expected"),
    [
        ({}, True, None),
        ({"strategy": "soft_labels"}, True, None),
        ({"strategy": "soft_labels"}, False, "soft"),
        ({"strategy": "label_free", "unlabelled": "film.mp4"}, True, "soft"),
        ({"strategy": "label_free", "unlabelled": "film.mp4", "losses": {"pkd": "auto", "kd": "auto"}}, True, "kd"),
    ],
)
def test_shares_are_of_the_labels_gradient_only_where_labels_are_known(
    settings: dict[str, object], has_labels: bool, expected: str | None
) -> None:
    assert reference_of_run(DistillConfig.model_validate(settings), has_labels=has_labels) == expected
