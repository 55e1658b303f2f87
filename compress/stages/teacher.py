"""Teacher: a checkpoint that knows the data's classes is used as it is; any other is trained on the data.

In: settings, a data set, a checkpoint or a scale. Out: `teacher.safetensors`, and the files of a training if one was
needed: `best.safetensors`, `last.safetensors`, `state.pt`, `results.csv`, `curves.png`, `tensorboard/`.
`edgestill train` is the training alone, of a teacher or of a student without one; `inheritance.json` is there if it
started from slices of a larger network.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import NamedTuple

from compress.compute.numerics import flush_denormals
from compress.config import NO_START, Settings, StudentConfig, TeacherConfig, TrainConfig
from compress.data import Dataset
from compress.inputs import TEACHER, dataset_of
from compress.log import Log
from compress.models import checkpoint
from compress.stages import Figures, Stage, weights_digest
from compress.training.inheritance import inherit_from, new_student, source_of
from compress.training.loop import Job, TrainResult, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import adapt_anchors, model_from_state, open_splits
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE


class Config(Settings):
    teacher: TeacherConfig = TeacherConfig()
    device: str = "auto"


class AloneConfig(Settings):
    """Settings of `edgestill train`: a training, and how its network starts."""

    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = NO_START


class Inputs(NamedTuple):
    data: Dataset


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write the teacher into `out`; a training that is begun there goes on.

    Raises the errors of `train`.
    """
    flush_denormals()
    teacher, weights = config.teacher, config.teacher.weights
    if weights and _usable_as_it_is(teacher, weights, inputs.data):
        log(f"teacher: {weights.name} is used as it is")
        given = checkpoint.load(weights)
        meta = {"origin": weights.name} | ({"imgsz": given.imgsz} if given.imgsz else {})
        checkpoint.save_model(checkpoint.network_of(given), out / TEACHER, meta)
        return {"trained": "no"}
    result = train(
        teacher,
        data=inputs.data,
        out=out,
        start=StudentConfig(weights=weights, scale=None if weights else teacher.scale),
        device=config.device,
        resume=(out / STATE).is_file(),
        log=log,
    )
    shutil.copyfile(result.best, out / TEACHER)
    return result.figures


def _usable_as_it_is(config: TeacherConfig, weights: Path, data: Dataset) -> bool:
    if config.finetune != "auto":
        return config.finetune == "never"
    return checkpoint.load(weights).architecture.names == data.names


def train(
    config: TrainConfig,
    *,
    data: Dataset,
    out: Path,
    start: StudentConfig = NO_START,
    device: str = "auto",
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Train a model for the classes of `data`, of the size and from the weights that `start` names.

    Weights of its own size are copied if name and shape agree, so a checkpoint of other classes starts everything but
    the head; of a larger network it takes slices, as a student does of its teacher. `resume` continues from
    `out/state.pt`, bit for bit on a CPU; finished trainings just return. Raises InputError when a file cannot be used,
    UsageError when requests contradict each other or what is resumed, EdgestillError when a loss is not finite.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    origin = origin_of(config, data, start=start, device=device)
    state = read_resume(out, config, origin) if resume else None
    splits = open_splits(data, config, log)
    source = None if state else source_of(start, None, log)
    if state:
        model = model_from_state(state, data.names)
    else:
        model = new_student(start, data.names, source=source, seed=config.seed, log=log)
        if config.autoanchor:
            model = adapt_anchors(model, data.splits["train"].samples, config, log)
    objective = Objective(model, detection_loss(model, config))
    job = Job(config, objective, splits.train, splits.val, out, origin=origin)
    if source:
        inherit_from(source, objective, splits.train, config, device, out, log)
    return run_job(job, device=device, resume=state, log=log)


STAGE = Stage(
    "teacher",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(dataset_of(recipe, folders)),
    run=run,
    after=("data",),
    digests={"teacher_weights": lambda recipe: weights_digest(recipe.teacher.weights)},
)
