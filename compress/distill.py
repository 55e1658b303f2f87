"""Distillation: a small student learns from labels and from what a frozen teacher sees in the same batch.

In: settings, a data set, a teacher's checkpoint, the student's scale. Out: the folder of a training; its files hold the
student alone.
"""

from __future__ import annotations

from pathlib import Path

from compress.compute.device import is_first_process
from compress.compute.numerics import flush_denormals
from compress.config import DistillConfig
from compress.data.dataset_yaml import DataConfig
from compress.log import Log
from compress.training.loop import Job, TrainResult, fit, read_resume
from compress.training.objective import DistillObjective, detection_loss
from compress.training.prepare import model_of_state, new_model, open_splits
from compress.training.teacher import Teacher, build_losses, examine, load_teacher
from runtime.files import write_json

__all__ = ["TrainResult", "distill"]


def distill(
    config: DistillConfig,
    *,
    data: DataConfig,
    out: Path,
    teacher: Path,
    weights: Path | None = None,
    scale: str | None = None,
    device: str = "auto",
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Distil `teacher` into a student of `scale` (else of the size of `weights`) for the classes of `data`.

    The student takes the teacher's anchors. Before the first epoch the pair and every distillation loss are examined
    on one batch; what would make the distillation silently useless is an error of one line. Other arguments and errors
    as for `compress.train.train`.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    state = read_resume(out, config) if resume else None
    master = load_teacher(teacher, data.names)
    splits = open_splits(data, config, log)
    student = (
        model_of_state(state, data.names)
        if state
        else new_model(data.names, scale=scale, weights=weights, anchors=master.arch.anchors, seed=config.seed, log=log)
    )
    losses = build_losses(student, master, config)
    objective = DistillObjective(student, detection_loss(student, config), losses, config.weights)
    guide = Teacher(master, device, half=config.amp)
    if not state:
        checks = examine(objective, guide, splits.train, config, log)
        if is_first_process():
            write_json(
                out / "checks.json",
                [{"name": name, "passed": ok, "detail": detail} for name, ok, detail in checks],
            )
    job = Job(config, objective, splits.train, splits.val, out, guide=guide, decay_to=config.decay_to)
    return fit(job, device=device, resume=state, log=log)
