"""The images that judge a study, and the accuracy of a network on them, measured once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.config import Recipe
from compress.data import Dataset, load_data
from compress.evaluate import evaluate
from compress.models import YOLOv5, load, load_model
from compress.models.checkpoint import network_of
from compress.training.checks import teacher_accuracy
from compress.training.teacher import make_teacher, source_from
from runtime.files import read_json, write_json


def split_index(study: Path, split: str) -> Path:
    """Where the index of the judging split lies."""
    return study / f"{split}.json"


def judges_of(recipe: Recipe, study: Path) -> Dataset:
    """The split that judges, as the study indexed it."""
    return Dataset.load(split_index(study, recipe.study.split), load_data(recipe.data).root)


def accuracy_of(weights: Path, recipe: Recipe, judges: Dataset) -> dict[str, float]:
    """`map50_95` and `map50`, fractions of 1, of a network at the recipe's image size."""
    return network_accuracy(load_model(weights), recipe, judges)


def network_accuracy(model: YOLOv5, recipe: Recipe, judges: Dataset) -> dict[str, float]:
    """`accuracy_of` a network in memory."""
    samples = judges.splits[recipe.study.split].samples
    found = evaluate(model, samples, imgsz=recipe.distill.imgsz, device=recipe.device, coco=False).yolo
    return {"map50_95": found.map50_95, "map50": found.map50}


def teacher_accuracy_of(weights: Path, recipe: Recipe, judges: Dataset) -> dict[str, float]:
    """`accuracy_of` the teacher, its classes mapped as the recipe says where they are not the data's."""
    given = load(weights)
    arch = given.architecture
    if arch.names == judges.names:
        return network_accuracy(network_of(given), recipe, judges)
    changes = recipe.distill.class_map or {}
    config = recipe.distill.model_copy(update={"class_map": changes, "teacher_flip": False, "teacher_imgsz": None})
    source = source_from(weights, given, judges.names, config)
    mapped = make_teacher([source], YOLOv5(replace(arch, names=judges.names)), config, recipe.device, print)
    found = teacher_accuracy(mapped, judges.splits[recipe.study.split].samples, config)
    return {"map50_95": found.map50_95, "map50": found.map50}


def measured_by(training: str, judges: Dataset) -> dict[str, str]:
    """That which a run's result depends on: the fingerprint of its training, and the images that judge."""
    return {"training": training, "judges": judges.sha256}


def measured_once(file: Path, of: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """The figures in `file` if they are `of` the same, else those that `measure` finds, which are kept there."""
    known = kept_figures(file, of)
    if known is None:
        known = dict(measure())
        write_json(file, {"of": dict(of), "found": known})
    return known


def kept_figures(file: Path, of: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The figures in `file` if it is there and they are `of` the same."""
    kept = read_json(file) if file.is_file() else {}
    return kept["found"] if kept.get("of") == of else None
