"""The base of every distillation loss, the outputs that it compares, and its settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from compress.config import DistillConfig, LossChoice, Settings
from compress.recipe import parse
from runtime.errors import UsageError


class Outputs(NamedTuple):
    """One forward pass of a network."""

    raw: list[Tensor]
    """Per level (B, na, H, W, 5 + nc) logits tx, ty, tw, th, objectness, classes. NaN is a logit that a teacher does
    not give."""
    features: list[Tensor]
    """Per level (B, C, H, W): what the head's convolutions read."""


class Shape(NamedTuple):
    """The facts of a network that a comparison with another needs."""

    channels: tuple[int, ...]
    """Per level, of `Outputs.features`."""
    nc: int
    na: int
    anchors: Tensor
    """(nl, na, 2) in grid units."""
    strides: tuple[int, ...]
    """Pixels per cell."""
    unknown: tuple[int, ...] = ()
    """Classes that a teacher cannot tell."""
    tells_all: bool = True
    """Whether a teacher gives every logit; else some are NaN."""


class Context(NamedTuple):
    """Everything that a loss may use beside the outputs of one batch."""

    targets: Tensor | None = None
    """(n, 6) image, class, x, y, w, h as fractions: the labels."""
    upstream: Tensor | None = None
    """(components,) float32, the gradient of the final loss by each number of this one, if it is known beforehand; it
    changes no result."""
    labelled: int | None = None
    """The number of images, the first of the batch, whose labels are known; None if those of all are."""


NO_CONTEXT = Context()


class LossSettings(Settings):
    """Base of a loss's own settings: what a recipe may say beside the weight, `cwd: {weight: 0.2, tau: 2}`."""


class DistillLoss(nn.Module):
    """Base of every distillation loss: a subclass has a name, its settings, and `compare`.

    Args:
        student, teacher: the shapes of the two networks.
        config: the distillation's settings.
        settings: those of the loss itself, fields of its `Settings`.

    Raises UsageError when this loss cannot compare the two networks, or for a setting that it does not have.
    """

    name: str
    """The loss's name in recipes."""
    compares_heads = False
    """Whether cells, anchors and classes must mean the same in both networks."""
    reads_labels = False
    """Whether it reads the labels, so that an image without them would count as background."""
    replays = True
    """Whether a CUDA graph can repeat it: all that changes from batch to batch is in tensors on the device."""
    weight: float | None = None
    """A fixed weight; None lets it follow the gradients, so that they have `share`."""
    share = 1.0
    """Norm of the loss's gradient at the neck as a share of the label loss's."""
    until = 1.0
    """Part of the epochs after which the loss has faded out; 1 keeps it to the end."""
    components = 1
    """Numbers that the loss consists of, each with a weight of its own: 1, or one a level."""

    class Settings(LossSettings):
        """Nothing to set. A loss with settings has its own class of this name, with defaults."""

    settings: LossSettings

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__()
        self.settings = self.read_settings(settings)
        if tuple(map(int, student.strides)) != tuple(map(int, teacher.strides)):
            raise UsageError(
                f"the student's strides are {student.strides}, the teacher's {teacher.strides}",
                "Distil between networks with the same levels, for example two scales of YOLOv5 P5",
            )
        self.config = config or DistillConfig()

    def weighed(self, choice: LossChoice) -> DistillLoss:
        """The loss itself, with the weight, share and end that a recipe gives; its own defaults stand for the rest."""
        self.weight, self.share, self.until = choice.weight, choice.share or self.share, choice.until or self.until
        return self

    @classmethod
    def read_settings(cls, given: dict[str, Any]) -> LossSettings:
        """The loss's settings, defaults for what is not given.

        Raises UsageError for an unknown name or a value that the setting does not take.
        """
        settings: LossSettings = parse(cls.Settings, given, f"loss {cls.name}")
        return settings

    def forward(self, student: Outputs, teacher: Outputs, context: Context = NO_CONTEXT) -> Tensor:
        """The loss of one batch, (components,) float32. No gradient reaches the teacher.

        Raises UsageError when the maps belong to different images or image sizes.
        """
        return self.compare(student, detached(teacher), context).view(self.components)

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        """The loss of outputs in equal channels, exactly 0 for equal ones; the teacher has no gradient.

        (components,) float32, or () if there is only one.
        """
        raise NotImplementedError


def detached(outputs: Outputs) -> Outputs:
    """The same outputs without a gradient."""
    return Outputs([t.detach() for t in outputs.raw], [t.detach() for t in outputs.features])


def check_same_images(student: list[Tensor], teacher: list[Tensor], sizes: slice, what: str) -> None:
    """Raises UsageError unless the maps of each level have the same batch size, and the same shape in `sizes`."""
    for s, t in zip(student, teacher, strict=True):
        if (s.shape[0], s.shape[sizes]) != (t.shape[0], t.shape[sizes]):
            raise UsageError(
                f"a {what} map of the student is {tuple(s.shape)}, of the teacher {tuple(t.shape)}",
                "Give both networks the same images at the same size",
            )
