"""Distillation losses: a student learns to copy the outputs of a frozen teacher.

In: the outputs of both networks for the same images. Out: a loss by its name in the table `LOSSES`: one number, or one
a level where each has a weight of its own. Every loss is a mean (neither batch nor image size changes its scale),
accumulates in float32, and is zero if student equals teacher. The caller multiplies by the batch size, as the detection
loss does, and by the weights.

To add a loss, write a class in a file of this folder (`HeadLoss` in head.py and `FeatureLoss` in features.py are the
bases), and add it to the table.
"""

from __future__ import annotations

from collections.abc import Mapping

from compress.config import DistillConfig
from compress.losses.distill.base import Context, DistillLoss, LossSettings, Outputs, Shape, detached
from compress.losses.distill.features import CWD, FGD, MGD, PKD, FeatMSE, FeatSL2, FeatureLoss
from compress.losses.distill.head import KD, MSE, CrossEntropy, HeadLoss, Soft
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
    "detached",
    "make_losses",
    "reference_of",
    "require_labels_for",
]

LOSSES: dict[str, type[DistillLoss]] = {
    loss.name: loss
    for loss in (
        Soft,
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
KINDS = {"any": DistillLoss, "head": HeadLoss, "features": FeatureLoss}
"""The losses that a strategy may take, by the base that they have."""


def make_losses(student: Shape, teacher: Shape, config: DistillConfig) -> dict[str, DistillLoss]:
    """The losses of a recipe but those of weight 0, by name.

    Raises UsageError as `check_losses` does, or when a loss cannot compare the two networks.
    """
    check_losses(config)
    choices = {name: config.losses[name] for name in config.used_losses}
    return {
        name: LOSSES[name](student, teacher, config, **choice.settings).weighed(choice)
        for name, choice in choices.items()
    }


def check_losses(config: DistillConfig) -> None:
    """Raises UsageError for a loss or a setting that is not known, a wrong value, or only weights of 0, and where the
    losses do not serve the strategy.
    """
    for name, choice in config.losses.items():
        if name not in LOSSES:
            raise UsageError(f"distillation loss {name!r} is not known", suggestion(name, LOSSES))
        LOSSES[name].read_settings(choice.settings)
    if config.losses and not config.used_losses:
        raise UsageError("no distillation loss has a weight above 0", "For labels alone write losses: {}")
    _check_strategy(config)


def reference_of(losses: Mapping[str, DistillLoss | type[DistillLoss]]) -> str:
    """Name of the loss whose gradient the weights of the others follow where no label is known: the first that compares
    heads, else the first. `losses` has one at least; their classes do too.
    """
    return next((name for name, loss in losses.items() if loss.compares_heads), next(iter(losses)))


def require_labels_for(loss: str) -> None:
    """Raises UsageError for a loss that reads labels; to be called where some images have none."""
    if LOSSES[loss].reads_labels:
        raise UsageError(f"loss {loss} needs the labels, which some images lack", "Leave it out")


def _check_strategy(config: DistillConfig) -> None:
    """Raises UsageError where a strategy lacks what it needs, or something would teach nothing."""
    rules, used = config.rules, {name: LOSSES[name] for name in config.used_losses}
    name, other_than_labels = f"strategy {config.strategy}", f"Name one in losses, for example {rules.losses[0]}: auto"
    if rules.needs_unlabelled and not config.unlabelled:
        raise UsageError(f"{name} learns from unlabelled images, none are given", "Add --unlabelled FOLDER or VIDEO")
    if config.strategy != DistillConfig().strategy and not used:
        raise UsageError(f"{name} has no loss by which the student learns from the teacher", other_than_labels)
    if rules.trains_teacher and (config.teachers or config.teacher_flip or config.image_side != config.imgsz):
        raise UsageError(
            f"{name} trains one checkpoint, on the student's images",
            "Leave out teachers, teacher_flip and teacher_imgsz, or take strategy offline",
        )
    for loss, kind in used.items():
        if not issubclass(kind, KINDS[rules.takes]):
            known = [other for other, of in LOSSES.items() if issubclass(of, KINDS[rules.takes])]
            raise UsageError(f"{name} takes no loss such as {loss}", f"It takes {', '.join(known)}")
        if config.unlabelled:
            require_labels_for(loss)
    if config.unlabelled and not used:
        raise UsageError("unlabelled images teach nothing without a distillation loss", other_than_labels)
    if not config.label_weight:
        _require_head_loss_to_the_end(config, used, other_than_labels)


def _require_head_loss_to_the_end(
    config: DistillConfig, used: Mapping[str, type[DistillLoss]], other_than_labels: str
) -> None:
    """Raises UsageError where no label is trained on and nothing else trains the head, or only until it has faded out:
    weight decay alone would move the weights from then on.
    """
    ends = {name: config.losses[name].until or kind.until for name, kind in used.items() if kind.compares_heads}
    if not ends:
        hint = "Raise label_weight" if config.rules.takes == "features" else other_than_labels
        raise UsageError("label_weight is 0 and no loss compares heads, so nothing trains the head", hint)
    name, end = max(ends.items(), key=lambda one: one[1])
    if end < 1:
        raise UsageError(
            f"label_weight is 0 and loss {name} fades out at {end:g} of the epochs, so nothing trains the head then",
            "Leave out its until, or raise label_weight",
        )
