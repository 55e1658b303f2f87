from __future__ import annotations

from pathlib import Path

import pytest

from compress.config import TrainConfig
from compress.recipe import FINETUNED_DRAWS, TRAINED_DRAWS, epochs_for, load_recipe, recipe_text, with_change
from runtime.errors import EdgestillError, InputError, UsageError


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_the_template_is_a_valid_recipe_whose_paths_are_relative_to_it(tmp_path: Path) -> None:
    text = recipe_text(file="r.yaml", name="job", data="sets/data.yaml", weights="w: 1.pt", student="p", imgsz=320)
    recipe = load_recipe(written(tmp_path, text))
    assert recipe.data == tmp_path.resolve() / "sets/data.yaml"
    assert recipe.teacher.weights == tmp_path.resolve() / "w: 1.pt"
    assert recipe.teacher.imgsz == recipe.distill.imgsz == 320


@pytest.mark.parametrize(
    ("images", "trained", "finetuned"),
    [(1, 300, 300), (60, 300, 200), (100, 200, 120), (205, 100, 60), (400, 60, 60), (100_000, 60, 60)],
)
def test_few_images_get_many_epochs(images: int, trained: int, finetuned: int, tmp_path: Path) -> None:
    assert (epochs_for(images, TRAINED_DRAWS), epochs_for(images, FINETUNED_DRAWS)) == (trained, finetuned)
    for weights, teacher in (("w.pt", finetuned), (None, trained)):
        text = recipe_text(
            file="r.yaml", name="r", data="d.yaml", weights=weights, student="p", imgsz=320, images=images, split="val"
        )
        recipe = load_recipe(written(tmp_path, text))
        assert (recipe.teacher.epochs, recipe.distill.epochs, recipe.study.split) == (teacher, trained, "val")
        assert f"x {images} training images = {trained * images} draws" in text


def test_paths_of_arms_are_relative_to_the_recipe_too(tmp_path: Path) -> None:
    arms = "{a: {student: {weights: w.pt}, distill: {unlabelled: ../images}}, b: {distill: {epochs: 3}}}"
    text = f"data: d.yaml\ndistill: {{unlabelled: film.mp4}}\nstudy: {{arms: {arms}}}\n"
    recipe = load_recipe(written(tmp_path, text))
    folder = tmp_path.resolve()
    assert recipe.distill.unlabelled == folder / "film.mp4"
    assert recipe.study.arms["a"] == {
        "student": {"weights": str(folder / "w.pt")},
        "distill": {"unlabelled": str(folder.parent / "images")},
    }
    assert recipe.study.arms["b"] == {"distill": {"epochs": 3}}


def test_a_training_may_name_its_own_image_size(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "data: d.yaml\nimgsz: 320\nteacher: {imgsz: 640}\n"))
    assert (recipe.teacher.imgsz, recipe.distill.imgsz) == (640, 320)


def test_set_reaches_nested_keys_and_leaves_the_rest() -> None:
    raw = {"quantize": {"method": "minmax"}, "data": "d"}
    changed = with_change(raw, "quantize.calibration_images=64")
    assert changed == {"quantize": {"method": "minmax", "calibration_images": 64}, "data": "d"}
    assert "calibration_images" not in raw["quantize"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data: d\nquantise: {}\n", "Did you mean 'quantize'"),
        ("data: d\ndistill: {epoch: 3}\n", "Did you mean 'epochs'"),
        ("data: d\ndistill: {optimizer: {lr: 3}}\n", "unknown key 'distill.optimizer.lr'"),
        ("imgsz: 320\n", "'data' is missing"),
        ("data: d\nimgsz: 0\n", "imgsz: 0"),
        ("data: d\nimgsz: true\n", "imgsz: True is not accepted: expected a number"),
        ("data: d\nteacher: {epochs: many}\n", "teacher.epochs: 'many'"),
    ],
)
def test_a_wrong_key_or_value_is_one_line_with_the_near_name(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(written(tmp_path, text))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch fired']", "a: &a [1]\nb: *a", "- a list", "data: [", "\x00", ""],
)
def test_yaml_that_is_not_plain_data_is_refused(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        load_recipe(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert not Path("fired").exists()


def test_a_missing_recipe_names_the_command_that_writes_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="edgestill init"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize("change", ["epochs", "=3", "data.x=1", "distill.losses.soft=[", "teacher.epochs=0"])
def test_a_set_that_cannot_be_applied_is_one_line(tmp_path: Path, change: str) -> None:
    with pytest.raises(EdgestillError) as caught:
        load_recipe(written(tmp_path, "data: d\n"), [change])
    assert "\n" not in str(caught.value)


def test_a_value_beside_a_preset_wins_over_it() -> None:
    config = TrainConfig.model_validate({"preset": "yolov5-low", "optimizer": {"lr0": 0.5}})
    assert (config.optimizer.lr0, config.optimizer.name, config.optimizer.nominal_batch) == (0.5, "sgd", 64)
