"""Checks of a whole recipe before its first stage: its teacher may train for hours until the student is begun."""

from __future__ import annotations

from compress.config import Recipe
from compress.data.class_names import class_conflict
from compress.data.dataset_yaml import load_data
from compress.models.checkpoint import load
from compress.training.class_map import map_classes, map_to_write, require_known
from compress.training.inheritance import inherits
from compress.training.onnx_teacher import SUFFIX
from compress.training.prepare import check_image_sizes, planned_teacher
from runtime.errors import UsageError


def check_recipe(recipe: Recipe) -> None:
    """Judge the networks of a recipe. Raises UsageError as `check_image_sizes` and `check_class_map` do, and when the
    student is to inherit from a teacher that it is no slice of; InputError when a checkpoint cannot be read.
    """
    check_image_sizes(recipe)
    check_class_map(recipe)
    if not recipe.student.weights:  # others are judged with the settings of the stage
        inherits(recipe.student, planned_teacher(recipe), lambda _: None)


def check_class_map(recipe: Recipe) -> None:
    """Raises UsageError when a teacher has other classes than the data, will not be fine-tuned, and they are not
    mapped; or when classes are mapped and no teacher has others. An ONNX file is judged when it is opened.
    """
    teacher, own, changes = recipe.teacher, load_data(recipe.data).names, recipe.distill.class_map
    is_kept = teacher.weights is not None and teacher.finetune == "never"
    files = [*([teacher.weights] if is_kept else []), *recipe.distill.teachers]
    several = [(file, load(file).architecture.names) for file in files if file and file.suffix.lower() != SUFFIX]
    others = [(f"teacher {file.name}", names) for file, names in several if names != own]
    are_all_known = len(several) == len(files)
    if changes and not others and are_all_known:
        raise UsageError(
            "distill.class_map has nothing to map: every teacher has the data's classes, or is fine-tuned to them",
            "Set teacher.finetune: never to use it as it is, or leave the map out",
        )
    for who, names in others:
        if changes is None:
            raise UsageError(class_conflict(who, names, "the data", own), map_to_write(names, own))
        map_classes(who, names, own, changes)
    if changes and are_all_known:
        require_known(changes, [*([] if is_kept else [own]), *(names for _, names in several)])
