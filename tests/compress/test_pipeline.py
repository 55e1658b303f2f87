from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compress.config import Recipe
from compress.data import Dataset
from compress.inputs import measured_teacher
from compress.models import Architecture, YOLOv5, save_model
from compress.models.checkpoint import load
from compress.pipeline import ORDER, run_recipe, stage
from compress.store import fingerprint
from runtime.errors import InputError, UsageError
from runtime.files import read_json


@pytest.mark.parametrize("name", ORDER)
def test_a_word_in_the_order_names_a_stage_that_reads_earlier_ones_and_settings_of_the_recipe(name: str) -> None:
    found = stage(name)
    assert found.name == name
    assert set(found.after) <= set(ORDER[: ORDER.index(name)])
    assert found.settings.model_fields.keys() <= Recipe.model_fields.keys()


def test_an_unknown_stage_names_the_near_one(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'quantize'"):
        run_recipe(Recipe(data=tmp_path), tmp_path, until="quantise", log=print)


def mark(tiny_data: Dataset, run_folder: Path, **teacher: object) -> str:
    """The teacher stage's fingerprint."""
    recipe = Recipe.model_validate({"data": tiny_data.path, "teacher": teacher})
    return fingerprint(stage("teacher").task(recipe, run_folder))


def test_a_setting_on_which_no_number_depends_trains_nothing_again(tiny_data: Dataset, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    before = mark(tiny_data, tmp_path)
    assert mark(tiny_data, tmp_path, workers=8, tensorboard=False) == before
    assert mark(tiny_data, tmp_path, epochs=8) != before


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="2 processes"):
        run_recipe(Recipe(data=tmp_path), tmp_path, log=print)


@pytest.mark.parametrize("losses", [{"cwdd": 1}, {"cwd": {"weight": 1, "taw": 2}}])
def test_a_mistake_in_a_distillation_loss_is_found_before_the_first_stage_runs(
    tiny_data: Dataset, tmp_path: Path, losses: dict[str, object]
) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "distill": {"losses": losses}})
    with pytest.raises(UsageError, match=r"Did you mean '(cwd|tau)'"):
        run_recipe(recipe, tmp_path, log=print)
    assert not list(tmp_path.iterdir())


def test_a_class_map_without_a_teacher_of_other_classes_is_found_before_the_first_stage_runs(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "distill": {"class_map": {"car": "red"}}})
    with pytest.raises(UsageError, match=r"class_map has nothing to map.*finetune: never"):
        run_recipe(recipe, tmp_path / "run", log=print)
    assert not (tmp_path / "run").exists()


def test_a_missing_checkpoint_of_the_student_is_found_before_the_first_stage_runs(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "student": {"weights": tmp_path / "none.pt"}})
    with pytest.raises(InputError, match=r"none\.pt"):
        run_recipe(recipe, tmp_path / "run", log=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_recipes_teacher_of_other_classes_teaches_by_the_map_and_is_not_measured_beside_the_student(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    save_model(YOLOv5(Architecture.of_scale("n", ("crimson", "green", "blue"))), tmp_path / "t.safetensors", {})
    distill = {"epochs": 1, "batch": 5, "workers": 0, "tensorboard": False, "class_map": {"crimson": "red"}}
    teacher = {"weights": tmp_path / "t.safetensors", "finetune": "never"}
    recipe = Recipe.model_validate(
        {"data": tiny_data.path, "imgsz": 64, "device": "cpu", "teacher": teacher, "distill": distill}
    )
    run_recipe(recipe, tmp_path / "run", until="distill", log=lambda _: None)
    folders = {name: tmp_path / "run" / name for name in ORDER}
    assert load(folders["teacher"] / "teacher.safetensors").architecture.names == ("crimson", "green", "blue")
    assert load(folders["distill"] / "student.safetensors").architecture.names == tiny_data.names
    assert read_json(folders["distill"] / "inheritance.json")["classes"] == ["red", "green"]
    assert measured_teacher(recipe, folders) is None
    known = tmp_path / "known"
    known.mkdir()
    shutil.copyfile(folders["distill"] / "student.safetensors", known / "teacher.safetensors")
    assert measured_teacher(recipe, folders | {"teacher": known}) == known / "teacher.safetensors"
