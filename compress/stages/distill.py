"""Distill: a small student learns from labels and from the outputs of a frozen teacher for the same batch.

In: settings, a data set, a teacher's checkpoint, the student's scale. Out: `student.safetensors`, the files of the
training that led to it, `checks.json`, and `inheritance.json` where the student started from slices of a larger
network. All of them hold the student alone.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from compress.compute.device import is_first_process
from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Settings, StudentConfig
from compress.data import Dataset
from compress.data.train_dataset import TrainDataset
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.models import YOLOv5
from compress.models.inherit import why_not
from compress.stages import Figures, Stage, weights_digest
from compress.training.inheritance import inherit_from
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
        student=config.student,
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
    student: StudentConfig,
    device: str = "auto",
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Distil `teacher` into a student of the scale (else of the size of the weights) for the classes of `data`.

    The student takes the teacher's anchors, and by default starts from slices of its weights. Before the first epoch
    both networks and every distillation loss are checked on one batch; without losses the labels alone train it.
    Raises EdgestillError when the distillation would silently do nothing. Other arguments and errors as for
    `compress.stages.teacher.train`.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    state = read_resume(out, config) if resume else None
    teacher_model = load_teacher(teacher, data.names)
    splits = open_splits(data, config, log)
    model = model_from_state(state, data.names) if state else _new_student(student, teacher_model, config, log)
    objective = Objective(model, detection_loss(model, config), build_losses(model, teacher_model, config))
    if not state:
        _inherit(student, model, teacher_model, objective, splits.train, config, device, out, log)
    frozen = Teacher(teacher_model, device, half=config.amp) if len(objective.losses) else None
    if frozen and not state:
        checks = check_distillation(objective, frozen, splits.train, config, log)
        _publish(out / "checks.json", [{"name": name, "passed": ok, "detail": detail} for name, ok, detail in checks])
    job = Job(config, objective, splits.train, splits.val, out, teacher=frozen)
    return run_job(job, device=device, resume=state, log=log)


def _new_student(student: StudentConfig, teacher: YOLOv5, config: DistillConfig, log: Log) -> YOLOv5:
    """A fresh student, or one that starts from weights of its own size."""
    return new_model(
        teacher.arch.names,
        scale=student.scale,
        weights=student.weights,
        anchors=teacher.arch.anchors,
        layout=None if student.init == "scratch" else teacher.arch.layout,
        seed=config.seed,
        log=log,
    )


def _inherit(
    student: StudentConfig,
    model: YOLOv5,
    teacher: YOLOv5,
    objective: Objective,
    train: TrainDataset,
    config: DistillConfig,
    device: str,
    out: Path,
    log: Log,
) -> None:
    """Start the student from slices of the teacher, where that is asked for or possible."""
    if student.init == "scratch" or (student.init == "auto" and student.weights):
        return
    if student.init == "auto" and (reason := why_not(model.arch, teacher.arch)):
        log(f"the student starts from scratch: {reason}")
        return
    found = inherit_from(teacher, model, objective.detection, train, batch=config.batch, device=device, log=log)
    _publish(out / "inheritance.json", found)


def _publish(file: Path, document: Any) -> None:
    if is_first_process():
        write_json(file, document)


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    digests={"student_weights": lambda recipe: weights_digest(recipe.student.weights)},
)
