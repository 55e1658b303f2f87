from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.config import DistillConfig, Recipe, StudentConfig
from compress.gain import gain_of, read_study, study_of, training_of
from compress.study.figures import Run, summary
from runtime.errors import InputError
from runtime.files import write_json

SAME = {"teacher": "t" * 64, "data": "d" * 64}


def training(init: str = "auto", *, scale: str = "p", **distill: Any) -> dict[str, Any]:
    student = StudentConfig.model_validate({"init": init, "scale": scale})
    return training_of(student, DistillConfig.model_validate({"epochs": 3, "imgsz": 64, **distill}))


TRAININGS = {
    "scratch": training("scratch", losses={}),
    "inherit": training(losses={}),
    "soft": training(),
    "longer": training(losses={}, epochs=9),
}


def study(trainings: dict[str, Any] = TRAININGS, without: tuple[str, ...] = ()) -> dict[str, Any]:
    reached = {"scratch": 0.50, "inherit": 0.53, "soft": 0.55, "longer": 0.60}
    runs = [
        Run(arm, seed, reached[arm] + 0.01 * seed, 0.8, 0.1)
        for arm in trainings if arm not in without for seed in (0, 1)
    ]  # fmt: skip
    about = {"data": SAME["data"], "teacher": {"fingerprint": SAME["teacher"], "map50_95": 0.6, "map50": 0.8}}
    arms = {arm: {} for arm in trainings}
    return summary(arms, runs, seeds=2, failed={}, split="test", trainings=trainings, **about)


def test_the_gain_is_over_every_arm_of_the_same_student_on_labels_alone() -> None:
    found = gain_of(study(), training(), **SAME)
    assert (found["arm"], found["missing"]) == ("soft", "")
    assert [(entry["against"], entry["pairs"]) for entry in found["over"]] == [("inherit", 2), ("scratch", 2)]
    assert [entry["mean"] for entry in found["over"]] == [pytest.approx(0.02), pytest.approx(0.05)]


def test_the_arm_that_starts_as_the_student_does_comes_first() -> None:
    from_scratch = study({**TRAININGS, "longer": training("scratch")})
    found = gain_of(from_scratch, training("scratch"), **SAME)
    assert [entry["against"] for entry in found["over"]] == ["scratch", "inherit"]


@pytest.mark.parametrize("other", [{"strategy": "joint"}, {"strategy": "soft_labels", "losses": {"kd": "auto"}}])
def test_any_way_to_distil_is_compared_with_labels_alone(other: dict[str, Any]) -> None:
    wanted = training(**other)
    found = gain_of(study({**TRAININGS, "soft": wanted}), wanted, **SAME)
    assert [entry["against"] for entry in found["over"]] == ["inherit", "scratch"]


def test_other_unlabelled_images_are_another_training(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(name.encode())
    one, other = (training(strategy="label_free", unlabelled=tmp_path / name) for name in ("one", "other"))
    assert one != other
    assert one == training(strategy="label_free", unlabelled=tmp_path / "one")


def test_further_teachers_are_another_training_wherever_they_lie(tmp_path: Path) -> None:
    for name, content in (("one.pt", "same"), ("copy.pt", "same"), ("other.pt", "else")):
        (tmp_path / name).write_text(content)
    alone, one, copy, other = (
        training(teachers=[tmp_path / name for name in names]) for names in ([], ["one.pt"], ["copy.pt"], ["other.pt"])
    )
    assert one == copy
    assert one not in (alone, other)
    found = gain_of(study({**TRAININGS, "longer": one}), one, **SAME)
    assert (found["arm"], len(found["over"])) == ("longer", 2)


def test_an_arm_that_stands_before_its_baseline_is_compared_the_other_way_round() -> None:
    turned = study({name: TRAININGS[name] for name in ("soft", "scratch")})
    (entry,) = gain_of(turned, training(), **SAME)["over"]
    assert entry["mean"] == pytest.approx(0.05)
    assert entry["low"] <= entry["mean"] <= entry["high"]


@pytest.mark.parametrize(
    ("wanted", "same", "reason"),
    [
        (training(), {"data": "e" * 64}, "images or labels are others"),
        (training(), {"teacher": "u" * 64}, "teacher is another"),
        (training(epochs=5), {}, "nearest is soft: distill.epochs is 3 there and 5 here"),
        (training(scale="n"), {}, "nearest is soft: student.scale is p there and n here"),
        (training(losses={"soft": "auto", "pkd": "auto"}), {}, "nearest is soft: distill.losses.pkd.weight is absent"),
    ],
)
def test_a_study_of_anything_else_says_what_is_else(wanted: dict[str, Any], same: dict[str, str], reason: str) -> None:
    found = gain_of(study(), wanted, **SAME | same)
    assert found["over"] == []
    assert reason in found["missing"]


@pytest.mark.parametrize("of", [study({"soft": TRAININGS["soft"]}), study(without=("scratch", "inherit"))])
def test_without_a_baseline_there_is_no_gain(of: dict[str, Any]) -> None:
    found = gain_of(of, training(), **SAME)
    assert (found["over"], found["missing"]) == ([], "the study has no arm that trains this student on labels alone")


def test_the_seed_and_the_place_of_the_weights_are_no_difference(tmp_path: Path) -> None:
    weights = [tmp_path / name for name in ("one.pt", "other.pt", "third.pt")]
    for file, content in zip(weights, ("same", "same", "else"), strict=True):
        file.write_text(content)
    one, other, third = (training_of(StudentConfig(weights=file), DistillConfig(seed=3)) for file in weights)
    assert one == other != third
    assert training(seed=1) == training(seed=2)


def test_a_study_is_looked_for_beside_the_run_unless_the_recipe_names_one(tmp_path: Path) -> None:
    def recipe(**report: Any) -> Recipe:
        return Recipe.model_validate({"name": "belt", "data": "data.yaml", "report": report})

    run = tmp_path / "runs" / "belt"
    assert study_of(recipe(), run) is None
    for folder in (tmp_path / "runs" / "belt-study", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
        write_json(folder / "study.json", study())
    assert study_of(recipe(), run) == tmp_path / "runs" / "belt-study" / "study.json"
    for named in (tmp_path / "elsewhere", tmp_path / "elsewhere" / "study.json"):
        assert study_of(recipe(study=named), run) == tmp_path / "elsewhere" / "study.json"
    with pytest.raises(InputError, match="no such study"):
        study_of(recipe(study=tmp_path / "none"), run)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"trainings": None}, "trainings None is not accepted"),
        ({"trainings": {}}, r"trainings\.scratch is missing"),
        ({"trainings": {**TRAININGS, "soft": {"student": {}}}}, r"trainings\.soft\.student\.init is missing"),
        ({"teacher": {}}, r"teacher\.fingerprint is missing"),
        ({"differences": [{"arm": "a", "against": "b", "mean": "much"}]}, r"differences\.0\.mean 'much' is not"),
    ],
)
def test_a_file_that_is_no_study_is_refused_before_the_run(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    file = tmp_path / "belt-study" / "study.json"
    write_json(file, study() | change)
    recipe = Recipe.model_validate({"name": "belt", "data": "data.yaml"})
    with pytest.raises(InputError, match=rf"study\.json is no study that edgestill wrote: {says}"):
        study_of(recipe, tmp_path / "belt")


@pytest.mark.parametrize("text", ["[]", "[1]", "3", '{"arms": ["soft"], "seeds": 5, "differences": []}', "no JSON"])
def test_any_other_json_is_no_study(tmp_path: Path, text: str) -> None:
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(InputError, match=r"study\.json is no.* Run `edgestill study` again"):
        read_study(tmp_path / "study.json")
