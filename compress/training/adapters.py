"""Fit the adapters of the feature losses before the first step.

In: an objective, its teacher, training images. Out: the same objective, whose adapters make of the student's features
what comes closest to the teacher's. The student learns from the first step on what its features lack, not what suits
random adapters.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from statistics import fmean

import torch

from compress.compute.device import to_device
from compress.compute.resize import reduced
from compress.config import DistillConfig
from compress.data.train_dataset import TrainItems
from compress.log import Log
from compress.losses.distill import Context, FeatureLoss, Outputs
from compress.training.objective import Objective
from compress.training.prepare import first_batches
from compress.training.teacher import AnyTeacher

Pairs = Sequence[tuple[Outputs, Outputs]]
"""Outputs of student and teacher for some batches."""


def fit_adapters(
    objective: Objective, teacher: AnyTeacher, train: TrainItems, config: DistillConfig, log: Log
) -> dict[str, tuple[float, float]]:
    """Fit the adapters of each feature loss, in place. No weight, statistic or gradient of the student changes.

    The student computes with the statistics of each batch, as in training. Returns each feature loss before and after,
    and logs one line of them; does nothing where no loss compares features.
    """
    losses = {name: loss for name, loss in objective.losses.items() if isinstance(loss, FeatureLoss)}
    if not losses:
        return {}
    to_device(objective, teacher.device)
    batches = first_batches(train, config, teacher.device)
    student = copy.deepcopy(objective.model).train()
    with torch.no_grad():
        pairs = [
            (Outputs(*student.forward_features(reduced(one.images, config.imgsz))), teacher(one.images))
            for one in batches
        ]
    contexts = [Context(one.targets, labelled=one.labelled) for one in batches]
    found = {}
    for name, loss in losses.items():
        before = _mean(loss, pairs, contexts)
        loss.fit(pairs)
        found[name] = before, _mean(loss, pairs, contexts)
    told = ", ".join(f"{name} {before:.3g} to {after:.3g}" for name, (before, after) in found.items())
    log(f"adapters fitted on {sum(len(one.images) for one in batches)} images: {told}")
    return found


@torch.no_grad()
def _mean(loss: FeatureLoss, pairs: Pairs, contexts: Sequence[Context]) -> float:
    """The loss, all levels together, as a mean over batches."""
    return fmean(float(loss(*pair, context).sum()) for pair, context in zip(pairs, contexts, strict=True))
