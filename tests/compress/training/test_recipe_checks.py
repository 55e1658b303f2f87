"""A recipe whose networks do not suit each other is refused before its teacher trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compress.config import Recipe
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, save_model
from compress.training.recipe_checks import check_class_maps, check_recipe
from runtime.errors import UsageError


def saved(file: Path, names: tuple[str, ...]) -> Path:
    torch.manual_seed(3)
    file.parent.mkdir(exist_ok=True)
    save_model(YOLOv5(Architecture.of_scale("p", names)), file)
    return file


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return saved(tmp_path / "cat.safetensors", ("cat",))


@pytest.mark.parametrize(
    ("finetune", "class_map", "says"),
    [
        ("never", None, r"cat\.safetensors has 1 classes .*the data has 2.*class_map: \{cat: null\}"),
        ("never", {"cat": "blue"}, "the data has no class 'blue'"),
        ("never", {"cat": None}, "leaves no class of teacher cat.safetensors"),
        ("never", {"cat": "red", "dog": "red"}, "no teacher has a class 'dog'"),
        ("auto", {"cat": "red"}, "nothing to map.*teacher.finetune: never"),
        ("never", {"cat": "red"}, None),
        ("auto", None, None),
    ],
)
def test_a_recipe_maps_the_classes_of_a_teacher_that_is_not_fine_tuned(
    finetune: str, class_map: dict[str, str | None] | None, says: str | None, checkpoint: Path, tiny_data: Dataset
) -> None:
    teacher = {"weights": checkpoint, "finetune": finetune}
    recipe = Recipe.model_validate({"data": tiny_data.path, "teacher": teacher, "distill": {"class_map": class_map}})
    _judge(recipe, says)


@pytest.mark.parametrize(
    ("class_map", "says"),
    [
        (None, r"teacher cat\.safetensors has 1 classes .*the data has 2"),
        ({"cat": None}, r"leaves no class of teacher cat\.safetensors"),
        ({"cat": "red", "dog": "red"}, "no teacher has a class 'dog'"),
        ({"cat": "red", "green": None}, None),  # the first teacher is fine-tuned to red and green
        ({"cat": "red"}, None),
    ],
)
def test_classes_of_further_teachers_are_judged_although_the_first_is_fine_tuned(
    class_map: dict[str, str | None] | None, says: str | None, checkpoint: Path, tiny_data: Dataset, tmp_path: Path
) -> None:
    of_the_data = saved(tmp_path / "other" / checkpoint.name, tiny_data.names)
    distill = {"teachers": [checkpoint, of_the_data], "class_map": class_map}
    _judge(Recipe.model_validate({"data": tiny_data.path, "distill": distill}), says)


def test_an_onnx_file_may_have_any_classes(tiny_data: Dataset, tmp_path: Path) -> None:
    distill = {"teachers": [tmp_path / "other.ONNX"], "class_map": {"dog": "red"}}
    _judge(Recipe.model_validate({"data": tiny_data.path, "distill": distill}), None)


@pytest.mark.parametrize(
    ("qad", "says"),
    [
        ({"with_teacher": True}, r"cat\.safetensors has 1 classes .*: qad\.class_map: \{cat: null\}"),
        ({"with_teacher": True, "class_map": {"cat": "red"}}, None),
        ({"with_teacher": True, "when": "never"}, None),
        ({"class_map": {"cat": "red"}}, r"qad\.class_map has nothing to map"),
        ({"class_map": {"cat": "red"}, "teachers": ["that one"]}, None),
        ({"teachers": ["that one"]}, r"qad\.class_map: \{cat: null\}"),
    ],
)
def test_classes_that_nothing_maps_in_a_training_for_int8_are_refused_with_the_recipe(
    qad: dict[str, object], says: str | None, checkpoint: Path, tiny_data: Dataset
) -> None:
    raw = {"data": tiny_data.path, "teacher": {"weights": checkpoint, "finetune": "never"},
           "distill": {"class_map": {"cat": "red"}}}  # fmt: skip
    qad = qad | ({"teachers": [checkpoint]} if "teachers" in qad else {})
    _judge(Recipe.model_validate(raw | {"qad": qad}), says)


def _judge(recipe: Recipe, says: str | None) -> None:
    if says is None:
        check_class_maps(recipe)
        return
    with pytest.raises(UsageError, match=says) as caught:
        check_class_maps(recipe)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("student", "says"),
    [
        ({"init": "inherit", "scale": "s"}, r"the student is wider \(0\.5\) than the larger network \(0\.25\)"),
        ({"init": "inherit", "scale": "n"}, None),
        ({"scale": "s"}, None),
        ({"init": "scratch", "scale": "s"}, None),
    ],
)
def test_a_student_that_is_no_slice_of_its_teacher_to_be_is_refused_if_it_must_be_one(
    student: dict[str, Any], says: str | None, tiny_data: Dataset
) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "imgsz": 64, "student": student})
    if says is None:
        check_recipe(recipe)
        return
    with pytest.raises(UsageError, match=says):
        check_recipe(recipe)
