"""Distill: a small student learns from labels and from the outputs of a teacher for the same batch, as a strategy says.

In: settings, a data set, the teachers' files, the student's scale, unlabelled images or a video. Out:
`student.safetensors`, the files of the training that led to it, `checks.json`, `teacher.json` (the accuracy of the
teacher, as the student sees it, and of the student), `inheritance.json` where the student started from slices of a
larger network, and `unlabelled/` with the list of unlabelled images, and with the frames where they come from a video.
All of them hold the student alone; a teacher that trains too is in `teacher.safetensors`, as it was in the student's
best epoch, and in the training's files whose names begin with `teacher_`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig, Recipe, Settings, StudentConfig
from compress.data import Dataset, Sample
from compress.data.unlabelled import open_unlabelled, unlabelled_digest
from compress.inputs import STUDENT, TEACHER, dataset_of
from compress.log import Log
from compress.losses.distill import check_losses
from compress.losses.preflight import Check
from compress.models import YOLOv5, load_model
from compress.processes import is_first_process
from compress.stages import Figures, Stage, weights_digest
from compress.training.adapters import fit_adapters
from compress.training.checks import (
    check_anchors,
    check_distillation,
    check_teacher,
    compared,
    require_passed,
    student_accuracy,
    teacher_accuracy,
)
from compress.training.curves import METRICS
from compress.training.inheritance import HeadTeacher, check_start, inherit_from, new_student, source_of
from compress.training.joint import join
from compress.training.loop import Job, TrainResult, of_teacher, run_job
from compress.training.prepare import adapt_anchors, model_from_state, open_distillation
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE
from compress.training.teacher import (
    AnyTeacher,
    Source,
    distillation,
    load_sources,
    make_teacher,
    student_anchors,
    trainable,
)
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


class Prepared(NamedTuple):
    """A training that is about to begin or to go on."""

    job: Job
    state: dict[str, Any] | None
    """The state that it goes on from."""
    checks: list[Check]
    figures: Figures
    """Facts of the data beside those of the training."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Distil the teachers into a student of `student.scale` (else of the size of `student.weights`), written into
    `out`.

    The student takes the teachers' anchors, and starts from slices of its own weights or the first teacher's where it
    can. Before the first epoch the adapters of feature losses are fitted, both networks and every distillation loss are
    checked on one batch, and the teacher's accuracy is measured; without losses the labels alone train the student.
    Raises EdgestillError when the distillation would silently do nothing, UsageError when the strategy lacks something.
    Other errors as for `compress.stages.teacher.train`.
    """
    resume = (out / STATE).is_file() if inputs.resume is None else inputs.resume
    job, state, _, figures = _prepare(config, inputs, out, log, resume=resume)
    result = run_job(job, device=config.device, resume=state, log=log)
    if is_first_process():
        shutil.copyfile(result.best, out / STUDENT)
        if job.objective.teacher:
            shutil.copyfile(result.best.with_name(of_teacher(result.best.name)), out / TEACHER)
        if not job.objective.losses:
            (out / ACCURACY).unlink(missing_ok=True)  # an earlier training's in this folder
        if (out / ACCURACY).is_file():
            _compare_with_teacher(config, job, result, log)
    return dict(result.figures) | dict(figures)


def all_checks(config: Config, inputs: Inputs, log: Log) -> list[Check]:
    """Everything that `run` does before the first epoch; nothing is kept. Raises the errors of `run`."""
    with TemporaryDirectory() as nowhere:
        return _prepare(config, inputs, Path(nowhere), log, resume=False).checks


def _prepare(config: Config, inputs: Inputs, out: Path, log: Log, *, resume: bool) -> Prepared:
    flush_denormals(log)  # before anything makes torch start its threads
    settings, start, data = config.distill, config.student, inputs.data
    check_losses(settings)
    files = (inputs.teacher, *settings.teachers)
    unlabelled = open_unlabelled(settings, out, log)
    origin = origin_of(
        settings, data, start=start, teachers=files, device=config.device, unlabelled=settings.unlabelled,
        unlabelled_images=unlabelled,
    )  # fmt: skip
    state = read_resume(out, settings, origin) if resume else None
    sources = load_sources(files, data.names, settings, config.device)
    splits = open_distillation(data, unlabelled, settings, log)
    own = next((source for source in sources if source.model), None)
    larger = None if state else source_of(start, own.model if own else None, log)
    model = model_from_state(state, data.names) if state else _new_model(config, data, sources, larger, log)
    teacher = make_teacher(sources, model, settings, config.device, log)
    joint = trainable(sources, teacher) if settings.rules.trains_teacher else None
    objective = distillation(model, teacher, settings, has_labels=splits.train.labelled > 0)
    learns = len(objective.losses) > 0
    job = Job(
        settings, objective, splits.train, splits.val, out, teacher=teacher if learns and not joint else None,
        teacher_rate=settings.teacher_rate, origin=origin,
    )  # fmt: skip
    if larger:
        by = HeadTeacher(teacher, own.classes.first) if own and larger is own.model else None
        inherit_from(larger, objective, splits.train, settings, config.device, out, log, by)
    if joint:
        join(objective, joint, settings)
    starts_trained = larger is not None or start.weights is not None
    labelled = data.splits["train"].samples if settings.label_weight else ()
    checks = (
        _checked(settings, job, teacher, sources, labelled, log, starts_trained=starts_trained)
        if learns and not state else []
    )  # fmt: skip
    return Prepared(job, state, checks, {"unlabelled_images": len(unlabelled.samples)} if unlabelled else {})


def _new_model(config: Config, data: Dataset, sources: Sequence[Source], larger: YOLOv5 | None, log: Log) -> YOLOv5:
    """A fresh student with the teachers' anchors; where these give boxes, with anchors for the labels."""
    settings, anchors = config.distill, student_anchors(sources, config.distill)
    model = new_student(config.student, data.names, source=larger, anchors=anchors, seed=settings.seed, log=log)
    if larger is None and not any(source.model for source in sources) and config.student.init != "scratch":
        log("the student starts from its own weights or from scratch: an ONNX file has none that it could inherit")
    samples = data.splits["train"].samples
    adapts = anchors is None and settings.autoanchor and data.splits["train"].boxes > 0
    return adapt_anchors(model, samples, settings, log) if adapts else model


def _checked(
    settings: DistillConfig,
    job: Job,
    teacher: AnyTeacher,
    sources: Sequence[Source],
    labelled: Sequence[Sample],
    log: Log,
    *,
    starts_trained: bool,
) -> list[Check]:
    """Everything that is checked before the first epoch, after the adapters are fitted. Writes the results.

    `labelled` are the images whose labels are learned from.
    """
    student = job.objective.model
    fit_adapters(job.objective, teacher, job.train, settings, log)
    checks = check_distillation(job.objective, teacher, job.train, settings, log)
    if is_first_process():
        found = teacher_accuracy(teacher, job.val, settings)
        start = None
        if starts_trained:
            start = student_accuracy(student, job.val, settings, teacher.device, rect=found.rect)
        more = [
            *check_anchors(student.arch.anchors, labelled, settings),
            *check_teacher(sources, found, start, settings, student.arch.names),
        ]
        log(f"{more[-1].name}: {more[-1].detail}")
        require_passed(more[:-1], log)
        checks = [*checks, *more]
        write_json(job.out / ACCURACY, asdict(found))
        listed = [{"name": one.name, "passed": one.ok, "detail": one.detail, "warns": one.warns} for one in checks]
        write_json(job.out / "checks.json", listed)
    return checks


def _compare_with_teacher(config: Config, job: Job, result: TrainResult, log: Log) -> None:
    """Add the trained student's accuracy to teacher.json, measured as the teacher's was; a teacher that trained too is
    measured again.
    """
    teacher, reached = read_json(job.out / ACCURACY), result.metrics[METRICS[-1]]
    if job.objective.teacher:
        trained = load_model(result.best.with_name(of_teacher(result.best.name)))
        found = student_accuracy(trained, job.val, config.distill, config.device, rect=teacher["rect"])
        teacher |= asdict(found)
    if not teacher["rect"]:
        best = load_model(result.best)
        reached = student_accuracy(best, job.val, config.distill, config.device, rect=False).map50_95
    write_json(job.out / ACCURACY, teacher | {"student_map50_95": reached})
    log(compared(reached, teacher["map50_95"]))


def check(config: Config) -> None:
    """Raises UsageError when a loss or the student's start cannot be as it is set."""
    check_losses(config.distill)
    check_start(config.student)


def _further_teachers(recipe: Recipe) -> str:
    return " ".join(map(weights_digest, recipe.distill.teachers)) or "none"


STAGE = Stage(
    "distill",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders), folders["teacher"] / TEACHER),
    run=run,
    after=("data", "teacher"),
    check=check,
    digests={
        "student_weights": lambda recipe: weights_digest(recipe.student.weights),
        "teachers": _further_teachers,
        "unlabelled": lambda recipe: unlabelled_digest(recipe.distill.unlabelled),
    },
)
