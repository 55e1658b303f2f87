"""Distillation losses: a student learns to copy the outputs of a frozen teacher.

In: the outputs of both networks for the same images. Out: a loss by its name in the table `LOSSES`: one number, or one
a level where each has a weight of its own. Every loss is a mean (neither batch nor image size changes its scale),
accumulates in float32, and is zero if student equals teacher. The caller multiplies by the batch size, as the detection
loss does, and by the weights.

To add a loss, write a class in a file of this folder (`HeadLoss` in head.py and `FeatureLoss` in features.py are the
bases), and add it to the table.
"""

from __future__ import annotations

from compress.config import DistillConfig
from compress.losses.distill.base import Context, DistillLoss, LossSettings, Outputs, Shape
from compress.losses.distill.features import CWD, FGD, MGD, PKD, FeatMSE, FeatSL2, FeatureLoss
from compress.losses.distill.head import KD, MSE, CrossEntropy, HeadLoss, ObjKD, Soft
from compress.recipe import suggestion
from runtime.errors import UsageError

__all__ = [
    "LOSSES",
    "Context",
    "DistillLoss",
    "FeatureLoss",
    "HeadLoss",
    "LossSettings",
    "Outputs",
    "Shape",
    "check_losses",
    "make_losses",
]

LOSSES: dict[str, type[DistillLoss]] = {
    loss.name: loss
    for loss in (
        Soft,
        ObjKD,
        FeatMSE,
        FeatSL2,
        CWD,
        PKD,
        FGD,
        MGD,
        KD,
        MSE,
        CrossEntropy,
    )
}
"""The distillation losses by the names that recipes use."""


def make_losses(student: Shape, teacher: Shape, config: DistillConfig) -> dict[str, DistillLoss]:
    """The losses of a recipe but those of weight 0, by name.

    Raises UsageError as `check_losses` does, or when a loss cannot compare the two networks.
    """
    check_losses(config)
    wanted = {name: choice for name, choice in config.losses.items() if choice.is_used}
    return {
        name: LOSSES[name](student, teacher, config, **choice.settings).weighed(choice)
        for name, choice in wanted.items()
    }


def check_losses(config: DistillConfig) -> None:
    """Raises UsageError for a loss or a setting that is not known, a wrong value, or only weights of 0."""
    for name, choice in config.losses.items():
        if name not in LOSSES:
            raise UsageError(f"distillation loss {name!r} is not known", suggestion(name, LOSSES))
        LOSSES[name].read_settings(choice.settings)
    if config.losses and not any(choice.is_used for choice in config.losses.values()):
        raise UsageError("no distillation loss has a weight above 0", "For labels alone write losses: {}")
