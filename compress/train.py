"""Plain training: a teacher, or a student without one.

In: settings, a data set, a checkpoint or a scale. Out: a run's folder with `best.safetensors`, `last.safetensors`,
`state.pt`, `results.csv`, `curves.png`, `tensorboard/`.
"""

from __future__ import annotations

from pathlib import Path

from compress.compute.numerics import flush_denormals
from compress.config import TrainConfig
from compress.data.dataset_yaml import DataConfig
from compress.log import Log
from compress.models import YOLOv5
from compress.training.loop import Job, TrainResult, read_resume, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import adapt_anchors, model_from_state, new_model, open_splits

__all__ = ["TrainResult", "train"]


def train(
    config: TrainConfig,
    *,
    data: DataConfig,
    out: Path,
    weights: Path | None = None,
    scale: str | None = None,
    device: str = "auto",
    resume: bool = False,
    log: Log = print,
) -> TrainResult:
    """Train a model of `scale` (else of the checkpoint's size) for the classes of `data`.

    `weights` are copied where name and shape agree, so a checkpoint of other classes starts everything but the head.
    `resume` continues from `out/state.pt`, bit for bit on a CPU; finished trainings just return. Raises
    InputError when a file cannot be used, UsageError when requests contradict each other, EdgestillError when a loss
    is not finite.
    """
    flush_denormals(log)  # before anything makes torch start its threads
    state = read_resume(out, config) if resume else None
    splits = open_splits(data, config, log)
    model: YOLOv5
    if state:
        model = model_from_state(state, data.names)
    else:
        model = new_model(data.names, scale=scale, weights=weights, seed=config.seed, log=log)
        if config.autoanchor:
            model = adapt_anchors(model, splits.train.samples, config, log)
    objective = Objective(model, detection_loss(model, config))
    return run_job(Job(config, objective, splits.train, splits.val, out), device=device, resume=state, log=log)
