"""Distillation: a small student learns from labels and from a frozen teacher's outputs for the same batch.

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
from compress.training.loop import Job, TrainResult, read_resume, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import model_from_state, new_model, open_splits
from compress.training.teacher import Teacher, build_losses, check_distillation, load_teacher
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

    The student takes the teacher's anchors. Before the first epoch both networks and every distillation loss are
    checked on one batch. Raises EdgestillError when the distillation would silently do nothing. Other arguments and
    errors as for `compress.train.train`.
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
    objective = Objective(student, detection_loss(student, config), losses, config.losses)
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
