"""Distill: a small student learns from labels and from the outputs of a frozen teacher for the same batch.

In: settings, a data set, the teachers' files, the student's scale. Out: `student.safetensors`, the files of the
training that led to it, `checks.json`, `teacher.json` (the accuracy of the teacher, as the student sees it, and of the
student), and `inheritance.json` where the student started from slices of a larger network. All of them hold the student
alone.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Recipe, Settings, StudentConfig
from compress.data import Dataset
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.losses.distill import check_losses
from compress.losses.preflight import Check
from compress.models import Architecture, YOLOv5, load_model
from compress.models.architecture import Anchors
from compress.models.inherit import why_not
from compress.processes import is_first_process
from compress.stages import Figures, Stage, weights_digest
from compress.training.checks import (
    check_distillation,
    check_teacher,
    compared,
    require_passed,
    student_accuracy,
    teacher_accuracy,
)
from compress.training.curves import METRICS
from compress.training.inheritance import inherit_from
from compress.training.loop import Job, TrainResult, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import adapt_anchors, model_from_state, new_model, open_splits
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE
from compress.training.teacher import (
    AnyTeacher,
    Source,
    build_losses,
    load_sources,
    make_teacher,
    student_anchors,
)
from runtime.errors import UsageError
from runtime.files import read_json, write_json

ACCURACY = "teacher.json"


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
    """Distil the teachers into a student of `student.scale` (else of the size of `student.weights`), written into
    `out`.

    The student takes the teachers' anchors, and starts from slices of the first one's weights where it can. Before the
    first epoch both networks and every distillation loss are checked on one batch, and the teacher's accuracy is
    measured; without losses the labels alone train the student. Raises EdgestillError when the distillation would
    silently do nothing. Other errors as for `compress.stages.teacher.train`.
    """
    resume = (out / STATE).is_file() if inputs.resume is None else inputs.resume
    job, state, _ = _prepare(config, inputs, out, log, resume=resume)
    result = run_job(job, device=config.device, resume=state, log=log)
    if is_first_process():
        shutil.copyfile(result.best, out / STUDENT)
        if job.teacher and (out / ACCURACY).is_file():
            _compare_with_teacher(job, job.teacher, result, log)
    return result.figures


def _compare_with_teacher(job: Job, teacher: AnyTeacher, result: TrainResult, log: Log) -> None:
    """Add the trained student's accuracy to teacher.json, measured as the teacher's was."""
    assert isinstance(job.config, DistillConfig)
    reached = result.metrics[METRICS[-1]]
    if not teacher.takes_any_size:
        reached = student_accuracy(load_model(result.best), teacher, job.val, job.config).map50_95
    document = read_json(job.out / ACCURACY) | {"student_map50_95": reached}
    write_json(job.out / ACCURACY, document)
    log(compared(reached, document["map50_95"]))


def check(config: Config, inputs: Inputs, log: Log) -> list[Check]:
    """Everything that `run` does before the first epoch; nothing is kept. Raises the errors of `run`."""
    with TemporaryDirectory() as nowhere:
        return _prepare(config, inputs, Path(nowhere), log, resume=False)[2]


def _prepare(
    config: Config, inputs: Inputs, out: Path, log: Log, *, resume: bool
) -> tuple[Job, dict[str, Any] | None, list[Check]]:
    """The training that is about to begin or to go on, the state that it goes on from, and what was checked."""
    flush_denormals(log)  # before anything makes torch start its threads
    settings, data, files = config.distill, inputs.data, (inputs.teacher, *config.distill.teachers)
    origin = origin_of(
        settings, data, weights=config.student.weights, teachers=files, scale=config.student.scale,
        device=config.device,
    )  # fmt: skip
    state = read_resume(out, settings, origin) if resume else None
    sources = load_sources(files, data.names, settings, config.device)
    splits = open_splits(data, settings, log)
    larger = None if state else inherited(config.student, sources, log)
    anchors = student_anchors(sources, settings)
    student = model_from_state(state, data.names) if state else new_student(config, data, anchors, larger, log)
    teacher = make_teacher(sources, student, settings, config.device, log)
    objective = Objective(student, detection_loss(student, settings), build_losses(student, teacher, settings))
    if larger and larger.model:
        taken = inherit_from(larger.model, objective, splits.train, settings, teacher, log, larger.classes.first)
        _publish(out / "inheritance.json", taken)
    job = Job(settings, objective, splits.train, splits.val, out, origin=origin)
    if not len(objective.losses):
        return job, state, []
    job = replace(job, teacher=teacher)
    starts_trained = larger is not None or config.student.weights is not None
    return job, state, [] if state else _checked(job, teacher, sources, log, starts_trained=starts_trained)


def _checked(
    job: Job, teacher: AnyTeacher, sources: Sequence[Source], log: Log, *, starts_trained: bool
) -> list[Check]:
    """Everything that is checked before the first epoch; checks.json and teacher.json are written."""
    settings, student = job.config, job.objective.model
    assert isinstance(settings, DistillConfig)
    checks = check_distillation(job.objective, teacher, job.train, settings, log)
    if is_first_process():
        found = teacher_accuracy(teacher, job.val, settings)
        start = student_accuracy(student, teacher, job.val, settings) if starts_trained else None
        more = check_teacher(sources, found, start, settings, student.arch.names)
        log(f"{more[-1].name}: {more[-1].detail}")
        require_passed(more[:-1], log)
        checks = [*checks, *more]
        write_json(job.out / ACCURACY, asdict(found))
        write_json(
            job.out / "checks.json", [{"name": one.name, "passed": one.ok, "detail": one.detail} for one in checks]
        )
    return checks


def inherited(config: StudentConfig, sources: Sequence[Source], log: Log) -> Source | None:
    """The teacher of whose weights the student starts as a slice: if that is asked for, or possible and the student has
    no weights of its own. Raises UsageError when it is asked for and no teacher has weights.
    """
    if config.init == "scratch" or config.weights or not config.scale:
        return None
    source = next((source for source in sources if source.model), None)
    if source is None or source.model is None:
        reason = "an ONNX file has no weights that it could inherit"
        if config.init == "inherit":
            raise UsageError(f"student.init is inherit, but {reason}", "Give the teacher's checkpoint, or init scratch")
    else:
        reason = _why_no_slice(config.scale, source.model.arch)
        if not reason or config.init == "inherit":
            return source
    log(f"the student starts from scratch: {reason}")
    return None


def _why_no_slice(scale: str, teacher: Architecture) -> str:
    return why_not(Architecture.of_scale(scale, teacher.names, teacher.anchors, teacher.layout), teacher)


def new_student(config: Config, data: Dataset, anchors: Anchors | None, larger: Source | None, log: Log) -> YOLOv5:
    """A fresh student with the given anchors, else with anchors for the data; a slice of `larger` has its layout."""
    settings, own = config.distill, config.student
    model = new_model(
        data.names,
        scale=own.scale,
        weights=own.weights,
        anchors=anchors,
        layout=larger.model.arch.layout if larger and larger.model else None,
        seed=settings.seed,
        log=log,
    )
    if anchors or not settings.autoanchor:
        return model
    return adapt_anchors(model, data.splits["train"].samples, settings, log)


def _publish(file: Path, document: Any) -> None:
    if is_first_process():
        write_json(file, document)


def _further_teachers(recipe: Recipe) -> str:
    return " ".join(map(weights_digest, recipe.distill.teachers)) or "none"


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    check=lambda config: check_losses(config.distill),
    digests={"student_weights": lambda recipe: weights_digest(recipe.student.weights), "teachers": _further_teachers},
)
