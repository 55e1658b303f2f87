"""Checks of a whole recipe before its first stage: its teacher may train for hours until the student is begun."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compress.config import DistillConfig, Recipe
from compress.data.class_names import class_conflict
from compress.data.dataset_yaml import load_data
from compress.models.checkpoint import load
from compress.training.class_map import map_classes, map_to_write, require_known
from compress.training.inheritance import inherits
from compress.training.onnx_teacher import is_onnx
from compress.training.prepare import check_image_sizes, planned_teacher
from runtime.errors import UsageError


def check_recipe(recipe: Recipe) -> None:
    """Judge the networks of a recipe. Raises UsageError as `check_image_sizes` and `check_class_maps` do, and when the
    student is to inherit from a teacher that it is no slice of; InputError when a checkpoint cannot be read.
    """
    check_image_sizes(recipe)
    check_class_maps(recipe)
    if not recipe.student.weights:  # others are judged with the settings of the stage
        inherits(recipe.student, planned_teacher(recipe), lambda _: None)


def check_class_maps(recipe: Recipe) -> None:
    """Raises UsageError when a teacher of a recipe's distillations has other classes than the data and they are not
    mapped, or when classes are mapped and no teacher has others; InputError when a teacher's file cannot be read.

    A first teacher that may be fine-tuned gets the data's classes. ONNX files are judged when they are opened.
    """
    own = load_data(recipe.data).names
    teacher = recipe.teacher.weights if recipe.teacher.finetune == "never" else None
    _check_class_map("distill", recipe.distill, [teacher], own)
    if recipe.qad.when != "never":
        _check_class_map("qad", recipe.qad, [None, *([teacher] if recipe.qad.with_teacher else [])], own)


def _check_class_map(stage: str, config: DistillConfig, first: Sequence[Path | None], own: Sequence[str]) -> None:
    """For the teachers `first`, of which None has the data's classes, and the further ones of the settings."""
    files = [*first, *config.teachers]
    known = [(file, load(file).architecture.names if file else own) for file in files if not (file and is_onnx(file))]
    others = [(f"teacher {file.name}", names) for file, names in known if file and names != own]
    for who, names in others:
        if config.class_map is None:
            hint = map_to_write(names, own, f"{stage}.class_map")
            raise UsageError(class_conflict(who, names, "the data", own), hint)
        map_classes(who, names, own, config.class_map)
    if not config.class_map or len(known) < len(files):
        return
    if not others:
        raise UsageError(
            f"{stage}.class_map has nothing to map: every teacher has the data's classes, or is fine-tuned to them",
            "Set teacher.finetune: never to use it as it is, or leave the map out",
        )
    require_known(config.class_map, [names for _, names in known])
