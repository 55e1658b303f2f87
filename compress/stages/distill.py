"""Distill: a small student learns from labels and from the outputs of a frozen teacher for the same batch.

In: settings, a data set, a teacher's checkpoint, the student's scale. Out: `student.safetensors`, the files of the
training that led to it, `checks.json`, and `inheritance.json` where the student started from slices of a larger
network. All of them hold the student alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Settings, StudentConfig
from compress.data import Dataset
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.losses.distill import check_losses
from compress.models import Architecture, YOLOv5
from compress.models.inherit import why_not
from compress.processes import is_first_process
from compress.stages import Figures, Stage, weights_digest
from compress.training.adapters import fit_adapters
from compress.training.inheritance import inherit_from
from compress.training.loop import Job, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import model_from_state, new_model, open_splits
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE
from compress.training.teacher import Teacher, build_losses, check_distillation, load_teacher
from runtime.files import write_json


class Config(Settings):
    distill: DistillConfig = DistillConfig()
    student: StudentConfig = StudentConfig()
    device: str = "auto"


class Inputs(NamedTuple):
    data: Dataset
    teacher: Path
    resume: bool | None = None
    """None goes on with what is begun in the folder."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Distil the teacher into a student of `student.scale` (else of the size of `student.weights`), written into `out`.

    The student takes the teacher's anchors, and starts from slices of its weights where it can. Before the first epoch
    the adapters of feature losses are fitted, and both networks and every distillation loss are checked on one batch;
    without losses the labels alone train it.
    Raises EdgestillError when the distillation would silently do nothing. Other errors as for
    `compress.stages.teacher.train`.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    settings, data = config.distill, inputs.data
    resume = (out / STATE).is_file() if inputs.resume is None else inputs.resume
    origin = origin_of(
        settings, data, weights=config.student.weights, teacher=inputs.teacher, scale=config.student.scale,
        device=config.device,
    )  # fmt: skip
    state = read_resume(out, settings, origin) if resume else None
    teacher = load_teacher(inputs.teacher, data.names)
    splits = open_splits(data, settings, log)
    is_slice = not state and inherits(config.student, teacher.arch, log)
    student = (
        model_from_state(state, data.names) if state else new_student(config, teacher.arch, is_slice=is_slice, log=log)
    )
    objective = Objective(student, detection_loss(student, settings), build_losses(student, teacher, settings))
    if is_slice:
        _publish(out / "inheritance.json", inherit_from(teacher, objective, splits.train, settings, config.device, log))
    frozen = Teacher(teacher, config.device, half=settings.amp) if len(objective.losses) else None
    if not state and frozen:
        fit_adapters(objective, frozen, splits.train, settings, log)
        checks = check_distillation(objective, frozen, splits.train, settings, log)
        _publish(out / "checks.json", [{"name": name, "passed": ok, "detail": detail} for name, ok, detail in checks])
    job = Job(settings, objective, splits.train, splits.val, out, teacher=frozen, origin=origin)
    result = run_job(job, device=config.device, resume=state, log=log)
    if is_first_process():
        shutil.copyfile(result.best, out / STUDENT)
    return result.figures


def inherits(config: StudentConfig, teacher: Architecture, log: Log) -> bool:
    """Whether the student starts from slices of the teacher: asked for, or possible where it has no own weights."""
    if config.init == "scratch" or config.weights or not config.scale:
        return False
    student = Architecture.of_scale(config.scale, teacher.names, teacher.anchors, teacher.layout)
    reason = why_not(student, teacher)
    if reason and config.init == "auto":
        log(f"the student starts from scratch: {reason}")
        return False
    return True


def new_student(config: Config, teacher: Architecture, *, is_slice: bool, log: Log) -> YOLOv5:
    """A fresh student; one that becomes a slice of the teacher has its layout."""
    student = config.student
    return new_model(
        teacher.names,
        scale=student.scale,
        weights=student.weights,
        anchors=teacher.anchors,
        layout=teacher.layout if is_slice else None,
        seed=config.distill.seed,
        log=log,
    )


def _publish(file: Path, document: Any) -> None:
    if is_first_process():
        write_json(file, document)


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    check=lambda config: check_losses(config.distill),
    digests={"student_weights": lambda recipe: weights_digest(recipe.student.weights)},
)
