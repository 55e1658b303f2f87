"""The gain of a distillation over the same student trained on labels alone, as a study measured it.

In: study.json, and how a run trained its student. Out: the study's paired differences for exactly such a student, or
the reason why it says nothing about the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.config import DistillConfig, Recipe, StudentConfig, TrainConfig, result_settings
from compress.data.unlabelled import unlabelled_digest
from compress.recipe import not_accepted
from runtime.errors import InputError
from runtime.files import read_json, sha256

STUDY = "study.json"
Document = Mapping[str, Any]
OWN = (
    "student.init",
    *(f"distill.{name}" for name in DistillConfig.model_fields if name not in TrainConfig.model_fields),
)
"""Settings in which a student that is trained on labels alone may differ from the distilled one."""
SHOWN = 3
"""Differences that a reason names."""


class _Choice(BaseModel):
    weight: float | None


class _Student(BaseModel):
    init: str


class _Distill(BaseModel):
    losses: dict[str, _Choice]
    label_weight: float


class _Training(BaseModel):
    student: _Student
    distill: _Distill


class _Difference(BaseModel):
    arm: str
    against: str
    mean: float
    low: float | None
    high: float | None
    pairs: int


class _Teacher(BaseModel):
    fingerprint: str


class _Study(BaseModel):
    """The part of a study's document that a gain is found by."""

    arms: list[str]
    split: str
    data: str
    teacher: _Teacher
    trainings: dict[str, _Training]
    differences: list[_Difference]


def read_study(file: Path) -> Document:
    """The document in study.json. Raises InputError when it is not there, or lacks what a gain is found by."""
    hint = "Run `edgestill study` again, or name another by report.study"
    document: Document = read_json(file, hint)
    try:
        known = _Study.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        told = "is missing" if first["type"] == "missing" else not_accepted(first)
        raise InputError(f"{file} is no study that edgestill wrote: {where} {told}", hint) from None
    if unknown := [arm for arm in known.arms if arm not in known.trainings]:
        raise InputError(f"{file} is no study that edgestill wrote: trainings.{unknown[0]} is missing", hint)
    return document


def training_of(student: StudentConfig, distill: DistillConfig) -> dict[str, Any]:
    """How a student is trained, without the seed, as JSON; files are their digests, wherever they lie."""
    weights = sha256(student.weights) if student.weights else None
    settings = {key: value for key, value in result_settings(distill).items() if key != "seed"}
    settings["unlabelled"] = unlabelled_digest(distill.unlabelled)
    settings["teachers"] = [sha256(file) for file in distill.teachers]
    return {"student": result_settings(student) | {"weights": weights}, "distill": settings}


def gain_of(study: Document, training: Document, *, teacher: str, data: str) -> dict[str, Any]:
    """The differences of the arm that is trained as `training` from each arm that learns from labels alone.

    Args:
        teacher: fingerprint of the run's teacher.
        data: digest of the run's training and validation images.

    Returns `arm`, `over` (the differences, in fractions of 1; first those from arms that start as the run's student
    does, else in the order of the arms) and `missing`: why there is none, as the end of a sentence.
    """
    arm = next((name for name in study["arms"] if study["trainings"][name] == training), None)
    if study["data"] != data:
        return _nothing("the study's images or labels are others")
    if study["teacher"]["fingerprint"] != teacher:
        return _nothing("the study's teacher is another")
    if arm is None:
        return _nothing(_nearest(study, training))
    others = sorted(_on_labels_alone(study, training), key=lambda other: not _starts_alike(study, other, training))
    over = [found for against in others if (found := _difference(study, arm, against))]
    missing = "" if over else "the study has no arm that trains this student on labels alone"
    return {"arm": arm, "over": over, "missing": missing}


def _nothing(missing: str) -> dict[str, Any]:
    return {"arm": None, "over": [], "missing": missing}


def _on_labels_alone(study: Document, training: Document) -> Iterator[str]:
    """Arms that learn from labels and use no loss, and train as `training` does in all that is no distillation."""
    for name in study["arms"]:
        other = study["trainings"][name]
        choices, label_weight = other["distill"]["losses"].values(), other["distill"]["label_weight"]
        is_alone = label_weight > 0 and all(choice["weight"] == 0 for choice in choices)
        if is_alone and not _differences(training, other, OWN):
            yield name


def _starts_alike(study: Document, arm: str, training: Document) -> bool:
    return bool(study["trainings"][arm]["student"]["init"] == training["student"]["init"])


def _nearest(study: Document, training: Document) -> str:
    """The arm with the fewest differences, and what these are."""
    found = {name: _differences(training, study["trainings"][name]) for name in study["arms"]}
    name = min(found, key=lambda name: len(found[name]))
    shown = [f"{key} is {there} there and {here} here" for key, here, there in found[name][:SHOWN]]
    return f"no arm of the study trains as this run does; nearest is {name}: {', '.join(shown)}"


def _differences(one: Document, other: Document, but: Sequence[str] = ()) -> list[tuple[str, Any, Any]]:
    """Key and both values of every setting that differs, groups within groups taken apart."""
    mine, theirs = _flat(one), _flat(other)
    keys = [key for key in {**mine, **theirs} if not f"{key}.".startswith(tuple(f"{name}." for name in but))]
    pairs = [(key, mine.get(key, "absent"), theirs.get(key, "absent")) for key in keys]
    return [(key, here, there) for key, here, there in pairs if here != there]


def _flat(values: Document, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _difference(study: Document, arm: str, against: str) -> dict[str, Any] | None:
    """The study's difference of two arms, the other way round where it has it so; None for an arm and itself."""
    for entry in study["differences"]:
        if (entry["arm"], entry["against"]) == (arm, against):
            return {"against": against, **{key: entry[key] for key in ("mean", "low", "high", "pairs")}}
        if (entry["arm"], entry["against"]) == (against, arm):
            mean, low, high = (None if entry[key] is None else -entry[key] for key in ("mean", "high", "low"))
            return {"against": against, "mean": mean, "low": low, "high": high, "pairs": entry["pairs"]}
    return None


def study_of(recipe: Recipe, run_folder: Path) -> Path | None:
    """The file of the study that `report.study` names, else that of `<name>-study` beside the run; None without one.

    Raises InputError when the named one is missing, or the file is no study.
    """
    named = recipe.report.study
    folder = named or run_folder.with_name(f"{recipe.name}-study")
    file = folder if folder.suffix == ".json" else folder / STUDY
    if named and not file.is_file():
        raise InputError(f"{file}: no such study", "Correct report.study, or run `edgestill study`")
    if not file.is_file():
        return None
    read_study(file)
    return file
