"""Distill: a small student learns from labels and from the outputs of a teacher for the same batch, as a strategy says.

In: settings, a data set, a teacher's checkpoint, the student's scale, unlabelled images or a video. Out:
`student.safetensors`, the files of the training that led to it, `checks.json`, `inheritance.json` where the student
started from slices of a larger network, and `unlabelled/` with the list of unlabelled images, and with the frames where
they come from a video. All of them hold the student alone; a teacher that trains too is in `teacher.safetensors`, as it
was in the student's best epoch, and in the training's files whose names begin with `teacher_`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Settings, StudentConfig
from compress.data import Dataset
from compress.data.unlabelled import open_unlabelled, unlabelled_digest
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.losses.distill import check_losses
from compress.processes import is_first_process
from compress.stages import Figures, Stage, weights_digest
from compress.training.adapters import fit_adapters
from compress.training.inheritance import check_start, inherit_from, new_student, source_of
from compress.training.joint import join
from compress.training.loop import Job, of_teacher, run_job
from compress.training.prepare import model_from_state, open_distillation
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE
from compress.training.teacher import Teacher, check_distillation, distillation, load_teacher
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

    The student takes the teacher's anchors, and starts from slices of its own weights or the teacher's where it can.
    Before the first epoch the adapters of feature losses are fitted, and both networks and every distillation loss are
    checked on one batch; without losses the labels alone train it. Raises EdgestillError when the distillation would
    silently do nothing, UsageError when the strategy lacks something. Other errors as for
    `compress.stages.teacher.train`.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    settings, student, data = config.distill, config.student, inputs.data
    check_losses(settings)
    resume = (out / STATE).is_file() if inputs.resume is None else inputs.resume
    unlabelled = open_unlabelled(settings, out, log)
    origin = origin_of(
        settings, data, start=student, teacher=inputs.teacher, device=config.device, unlabelled=settings.unlabelled,
        unlabelled_images=unlabelled,
    )  # fmt: skip
    state = read_resume(out, settings, origin) if resume else None
    teacher = load_teacher(inputs.teacher, data.names)
    splits = open_distillation(data, unlabelled, settings, log)
    source = None if state else source_of(student, teacher, log)
    if state:
        model = model_from_state(state, data.names)
    else:
        model = new_student(
            student,
            data.names,
            source=source,
            anchors=teacher.arch.anchors,
            seed=settings.seed,
            log=log,
        )
    objective = distillation(model, teacher, settings, has_labels=splits.train.labelled > 0)
    if source:
        inherit_from(source, objective, splits.train, settings, config.device, out, log)
    frozen = Teacher(teacher, config.device, half=settings.amp) if len(objective.losses) else None
    if not state and frozen:
        fit_adapters(objective, frozen, splits.train, settings, log)
        checks = check_distillation(objective, frozen, splits.train, settings, log)
        _publish(out / "checks.json", [{"name": name, "passed": ok, "detail": detail} for name, ok, detail in checks])
    if settings.rules.trains_teacher:
        frozen = None
        join(objective, teacher, settings, config.device, log)
    job = Job(
        settings, objective, splits.train, splits.val, out, teacher=frozen, teacher_rate=settings.teacher_rate,
        origin=origin,
    )  # fmt: skip
    result = run_job(job, device=config.device, resume=state, log=log)
    if is_first_process():
        shutil.copyfile(result.best, out / STUDENT)
        if objective.teacher:
            shutil.copyfile(result.best.with_name(of_teacher(result.best.name)), out / TEACHER)
    return dict(result.figures) | ({"unlabelled_images": len(unlabelled.samples)} if unlabelled else {})


def check(config: Config) -> None:
    """Raises UsageError when a loss or the student's start cannot be as it is set."""
    check_losses(config.distill)
    check_start(config.student)


def _publish(file: Path, document: Any) -> None:
    if is_first_process():
        write_json(file, document)


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    check=check,
    digests={
        "student_weights": lambda recipe: weights_digest(recipe.student.weights),
        "unlabelled": lambda recipe: unlabelled_digest(recipe.distill.unlabelled),
    },
)
