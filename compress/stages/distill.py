"""Distill: a small student learns from labels and from the outputs of a frozen teacher for the same batch.

In: settings, a data set, a teacher's checkpoint, the student's scale. Out: `student.safetensors`, the files of the
training that led to it, and `checks.json`. All of them hold the student alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from compress.compute.device import is_first_process
from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Settings, StudentConfig
from compress.data import Dataset
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.stages import Figures, Stage, weights_digest
from compress.training.loop import Job, TrainResult, read_resume, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import model_from_state, new_model, open_splits
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
    """Write the student into `out`. Raises the errors of `distill`."""
    result = distill(
        config.distill,
        data=inputs.data,
        out=out,
        teacher=inputs.teacher,
        weights=config.student.weights,
        scale=config.student.scale,
        device=config.device,
        resume=(out / STATE).is_file() if inputs.resume is None else inputs.resume,
        log=log,
    )
    if is_first_process():
        shutil.copyfile(result.best, out / STUDENT)
    return result.figures


def distill(
    config: DistillConfig,
    *,
    data: Dataset,
    out: Path,
    teacher: Path,
    weights: Path | None = None,
    scale: str | None = None,
    device: str = "auto",
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Distil `teacher` into a student of `scale` (else of the size of `weights`) for the classes of `data`.

    The student takes the teacher's anchors. Before the first epoch both networks and every distillation loss are
    checked on one batch. Raises EdgestillError when the distillation would silently do nothing. Other arguments and
    errors as for `compress.stages.teacher.train`.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    state = read_resume(out, config) if resume else None
    teacher_model = load_teacher(teacher, data.names)
    splits = open_splits(data, config, log)
    if state:
        student = model_from_state(state, data.names)
    else:
        anchors = teacher_model.arch.anchors
        student = new_model(data.names, scale=scale, weights=weights, anchors=anchors, seed=config.seed, log=log)
    losses = build_losses(student, teacher_model, config)
    objective = Objective(student, detection_loss(student, config), losses, config.weights)
    frozen = Teacher(teacher_model, device, half=config.amp)
    if not state:
        checks = check_distillation(objective, frozen, splits.train, config, log)
        if is_first_process():
            write_json(
                out / "checks.json",
                [{"name": name, "passed": ok, "detail": detail} for name, ok, detail in checks],
            )
    job = Job(config, objective, splits.train, splits.val, out, teacher=frozen, decay_to=config.decay_to)
    return run_job(job, device=device, resume=state, log=log)


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    digests={"student_weights": lambda recipe: weights_digest(recipe.student.weights)},
)
