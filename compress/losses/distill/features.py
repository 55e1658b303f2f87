"""Distillation losses of the features: the maps that the head's convolutions read.

On an NVIDIA GPU the comparison runs as a fused kernel (`compress/kernels`). The caller may say beforehand what gradient
it will send back (`Context.upstream`): a kernel then writes its gradient multiplied by it, which keeps float16
gradients from vanishing.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import cycle
from typing import Annotated, Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compress.compute.boxes import touched_cells
from compress.compute.ridge import Moments, ridge
from compress.config import DistillConfig, Float, NonNegative, Positive
from compress.kernels.adapter_mse import adapter_mse
from compress.kernels.cwd import cwd
from compress.kernels.fgd import fgd
from compress.kernels.pkd import pkd
from compress.kernels.weighted_mse import weighted_mse
from compress.losses.distill.base import (
    NO_CONTEXT,
    Context,
    DistillLoss,
    LossSettings,
    Outputs,
    Shape,
    check_same_images,
    detached,
)
from compress.losses.distill.standardise import by_channel, by_level

ADAPTER_RIDGE = 0.1
"""Penalty of the adapters' regression, as a share of the mean diagonal of the second moments."""
FIT_STEPS, FIT_RATE = 100, 3e-3
"""Steps of Adam, and their learning rate, of a loss whose adapters are more than one linear map."""


class AdapterConv(nn.Conv2d):
    """Convolution that keeps a map's size and computes in its input's dtype, whatever the dtype of its weights."""

    def __init__(self, channels_in: int, channels_out: int, side: int = 1, *, bias: bool = True) -> None:
        super().__init__(channels_in, channels_out, side, padding=side // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.conv2d(x, self.weight.to(x.dtype), bias, padding=self.padding)


class Level(NamedTuple):
    """One level of both networks, as a feature loss compares them."""

    student: Tensor
    """(B, C, H, W)."""
    teacher: Tensor
    """(B, C, H, W) without a gradient."""
    raw: Tensor
    """(B, na, H, W, 5 + nc): the teacher's logits."""
    targets: Tensor | None
    """(n, 6), see `Context`."""
    upstream: Tensor | None
    """() float32, see `Context`."""
    adapter: tuple[Tensor, Tensor] | None = None
    """The matrix (C_teacher, C_student) and the bias (C_teacher) that the comparison itself applies to the student's
    map."""


def levels_of(student: Outputs, teacher: Outputs, context: Context) -> list[Level]:
    """The levels, finest first."""
    upstream = [None] * len(student.features) if context.upstream is None else context.upstream.unbind()
    both = zip(student.features, teacher.features, teacher.raw, upstream, strict=True)
    return [Level(s, t, raw, context.targets, expected) for s, t, raw, expected in both]


class FeatureLoss(DistillLoss):
    """A loss of the features, with one component a level. A subclass has `level`.

    The teacher's maps are standardised where the formula depends on their scale, and a 1x1 convolution a level, the
    adapter, gives the student's maps the teacher's channels in these units. `fit` finds the adapters before the first
    step: while they are random, a loss mostly teaches the student to suit them.
    """

    share = 0.3
    until = 0.7
    depends_on_offset = True
    """Whether the loss changes when a constant is added to a channel; where not, an adapter has no bias to learn."""

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student, teacher, config, **settings)
        pairs = zip(student.channels, teacher.channels, strict=True)
        self.adapters = nn.ModuleList(AdapterConv(*pair, bias=self.depends_on_offset) for pair in pairs)
        self.components = len(teacher.channels)

    def forward(self, student: Outputs, teacher: Outputs, context: Context = NO_CONTEXT) -> Tensor:
        """See `DistillLoss.forward`; (levels,)."""
        check_same_images(student.features, teacher.features, slice(2, None), "feature")
        teacher = detached(teacher)
        standard = teacher._replace(features=[self.standardise(maps) for maps in teacher.features])
        found = []
        for index, level in enumerate(levels_of(student, standard, context)):
            found.append(self.level(self.adapt(index, level)))
        return torch.stack(found)

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return torch.stack([self.level(level) for level in levels_of(student, teacher, context)])

    def standardise(self, maps: Tensor) -> Tensor:
        """The teacher's maps (B, C, H, W) of one level in the units in which they are compared."""
        return by_channel(maps)

    def adapt(self, index: int, level: Level) -> Level:
        """Level `index` with the student's map, which is as the network gives it, in the teacher's channels."""
        return level._replace(student=self.adapters[index](level.student))

    def level(self, level: Level) -> Tensor:
        """The loss () float32 of one level with equal channels, exactly 0 for equal maps."""
        raise NotImplementedError

    # -- the start of the adapters --------------------------------------------------------------------

    def adapter_input(self, index: int, maps: Tensor) -> Tensor:
        """The map that the adapter of level `index` reads, from the student's map (B, C, H, W)."""
        return maps

    def fit(self, pairs: Sequence[tuple[Outputs, Outputs]]) -> None:
        """Fit the adapters to the outputs of student and teacher for a few batches, in place.

        They are the ridge regression of the teacher's standardised maps on the maps that they read. Where the loss has
        more parameters, all of them then take FIT_STEPS steps of Adam on this loss alone. Equal starts give equal bits.
        """
        for index, adapter in enumerate(cast("list[AdapterConv]", list(self.adapters))):
            self._fit_adapter(index, adapter, pairs)
        if len(list(self.parameters())) > len(list(self.adapters.parameters())):
            self._take_steps(pairs)

    @torch.no_grad()
    def _fit_adapter(self, index: int, adapter: AdapterConv, pairs: Sequence[tuple[Outputs, Outputs]]) -> None:
        moments = [
            Moments.of(_rows(self.adapter_input(index, s.features[index])), _rows(self.standardise(t.features[index])))
            for s, t in pairs
        ]
        matrix, offset = ridge(reduce(Moments.plus, moments), ADAPTER_RIDGE)
        adapter.weight.copy_(matrix[..., None, None])
        if adapter.bias is not None:
            adapter.bias.copy_(offset)

    def _take_steps(self, pairs: Sequence[tuple[Outputs, Outputs]]) -> None:
        optimizer = torch.optim.Adam(self.parameters(), lr=FIT_RATE)
        for _, (student, teacher) in zip(range(FIT_STEPS), cycle(pairs), strict=False):
            optimizer.zero_grad()
            self(student, teacher).sum().backward()
            optimizer.step()
        optimizer.zero_grad()


def _rows(maps: Tensor) -> Tensor:
    """(B, C, H, W) -> (B * H * W, C)."""
    return maps.permute(0, 2, 3, 1).flatten(0, 2)


class FeatMSE(FeatureLoss):
    """Mean squared difference of features: sum over levels of mean (A(s) - t)^2, A the 1x1 convolution.

    t is standardised by channel: the unit of a squared difference is the square of the channel's. So the loss is the
    part of the teacher's variance that the student does not explain. Adapter and comparison are one kernel: the adapted
    map is not written to memory if channels allow it.
    """

    name = "feat_mse"

    def adapt(self, index: int, level: Level) -> Level:
        """The level with the adapter beside it: adapting and comparing are one kernel."""
        adapter = cast(AdapterConv, self.adapters[index])
        parameters = adapter.weight.flatten(1), cast(Tensor, adapter.bias)
        return level._replace(student=self.adapter_input(index, level.student), adapter=parameters)

    def weights(self, level: Level) -> list[Tensor]:
        """The weights (B, H, W) of the pixels; none, where all count alike."""
        return []

    def level(self, level: Level) -> Tensor:
        maps, weights = ([level.student], [level.teacher]), self.weights(level)
        if level.adapter is None:
            return weighted_mse(*maps, weights, scale=level.upstream)
        matrix, bias = level.adapter
        return adapter_mse(*maps, [matrix], [bias], weights, scale=level.upstream)


class FeatSL2(FeatMSE):
    """Squared difference of features, weighted by how sure the teacher is of an object at each pixel.

        sum over levels of sum w (P(s) - t)^2 / (C * sum w + 1e-9)

    where the inner sums run over the whole batch, w is `teacher_score`, P is 1x1 convolution - ReLU - 1x1 convolution,
    and t is standardised by channel as in `FeatMSE`. Source: Ultralytics 2026, as its documentation states the formula.
    """

    name = "feat_sl2"

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student._replace(channels=teacher.channels), teacher, config, **settings)
        self.first = nn.ModuleList(map(AdapterConv, student.channels, teacher.channels))

    def adapter_input(self, index: int, maps: Tensor) -> Tensor:
        return cast(Tensor, self.first[index](maps)).relu_()

    def weights(self, level: Level) -> list[Tensor]:
        return [teacher_score(level.raw)]


class MGD(FeatureLoss):
    """Masked generative distillation: the student must give back the teacher's whole map from a part of its own.

        sum over levels of mean (G(M A(s)) - t)^2

    A is the 1x1 convolution; M (B, 1, H, W) is 0 at a random `mask` of the pixels and 1 elsewhere; G is 3x3 convolution
    - ReLU - 3x3 convolution; t is standardised by channel as in `FeatMSE`. The authors sum over pixels and channels;
    here it is a mean. M depends on the seed and on how often the loss was computed, which the state of a training has,
    so a resumed one draws the same. Source: Yang et al., ECCV 2022.
    """

    name = "mgd"
    replays = False

    class Settings(LossSettings):
        mask: Annotated[Float, Field(ge=0, lt=1)] = 0.65
        """Part of the pixels that is left out."""

    settings: Settings

    def __init__(self, student: Shape, teacher: Shape, config: DistillConfig | None = None, **settings: Any) -> None:
        super().__init__(student, teacher, config, **settings)
        self.generators = nn.ModuleList(
            nn.Sequential(AdapterConv(c, c, 3), nn.ReLU(inplace=True), AdapterConv(c, c, 3)) for c in teacher.channels
        )
        self.drawn = 0

    def adapt(self, index: int, level: Level) -> Level:
        kept = self._mask(level.student) * self.adapters[index](level.student)
        return level._replace(student=self.generators[index](kept))

    def level(self, level: Level) -> Tensor:
        return weighted_mse([level.student], [level.teacher], scale=level.upstream)

    def _mask(self, maps: Tensor) -> Tensor:
        """(B, 1, H, W) of 0 and 1 in the maps' dtype."""
        self.drawn += 1
        seed = np.random.SeedSequence([self.config.seed, self.drawn]).generate_state(1).item()
        generator = torch.Generator(maps.device if maps.is_cuda else "cpu").manual_seed(seed)
        noise = torch.rand(len(maps), 1, *maps.shape[2:], generator=generator, device=maps.device)
        return (noise >= self.settings.mask).to(maps.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.drawn)

    def set_extra_state(self, state: Tensor) -> None:
        self.drawn = int(state)


class CWD(FeatureLoss):
    """Channel-wise distillation: compares where each channel is active, as a distribution over the pixels of an image.

        sum over levels of tau^2 / (B C) * sum over images and channels KL(softmax(t / tau) || softmax(A(s) / tau))

    t is standardised by channel: a softmax does not see an offset, but takes its temperature from the scale. Source:
    Shu et al., ICCV 2021.
    """

    name = "cwd"
    depends_on_offset = False

    class Settings(LossSettings):
        tau: Positive = 1.0
        """Temperature: above 1 it weighs the weaker pixels more."""

    settings: Settings

    def level(self, level: Level) -> Tensor:
        return cwd([level.student], [level.teacher], self.settings.tau, scale=level.upstream)


class PKD(FeatureLoss):
    """Pearson distance of each channel over the batch: 1 - r, averaged over channels, summed over levels.

    It standardises every channel itself, so the teacher's maps stay as they are. Source: Cao et al., NeurIPS 2022.
    """

    name = "pkd"
    depends_on_offset = False

    def standardise(self, maps: Tensor) -> Tensor:
        return maps

    def level(self, level: Level) -> Tensor:
        return pkd([level.student], [level.teacher], scale=level.upstream)


class FGD(FeatureLoss):
    """Focal distillation: differences weighted by the teacher's attention, inside and outside the labelled boxes apart.

    `compress.kernels.fgd.fgd` has the formula. A pixel inside boxes weighs alpha / area of the smallest of them,
    any other beta / number of such pixels in its image; without targets every pixel is background. The authors' global
    term is left out.

    The teacher's maps are standardised by level: attention is made of |t|, so zero must stay zero and the channels must
    keep their sizes beside each other, but its temperature and the squared differences depend on the scale. Source:
    Yang et al., CVPR 2022.
    """

    name = "fgd"
    reads_labels = True

    class Settings(LossSettings):
        alpha: NonNegative = 1.0
        """Weight of the pixels inside boxes."""
        beta: NonNegative = 0.5
        """Weight of the other pixels."""
        gamma: NonNegative = 1.0
        """Weight of the distances of the attentions."""
        temperature: Positive = 0.5
        """Temperature of the attentions."""

    settings: Settings

    def standardise(self, maps: Tensor) -> Tensor:
        return by_level(maps)

    def level(self, level: Level) -> Tensor:
        mask = self.mask(level.teacher, level.targets)
        gamma, temperature = self.settings.gamma, self.settings.temperature
        return fgd([level.student], [level.teacher], [mask], gamma, temperature, scale=level.upstream)

    def mask(self, feature: Tensor, targets: Tensor | None) -> Tensor:
        """(B, H, W) float32: the weight of each pixel of a (B, C, H, W) map."""
        inside = box_density(feature, targets)
        outside = inside == 0
        pixels = outside.sum((1, 2), keepdim=True).clamp_min(1)
        return self.settings.alpha * inside + self.settings.beta * outside / pixels


UNTOLD = -1e4
"""Stands for a logit that the teacher does not give: its probability is 0, and float16 holds it."""


def teacher_score(raw: Tensor) -> Tensor:
    """(B, H, W) float32: the best sigmoid(objectness) * sigmoid(class) over anchors and classes of each cell.

    Args:
        raw: (B, na, H, W, 5 + nc) logits.
    """
    raw = raw.nan_to_num(UNTOLD)
    best_class = raw[..., 5:].amax(-1).float().sigmoid()  # the sigmoid rises, so the greatest logit comes first
    return (raw[..., 4].float().sigmoid() * best_class).amax(1)


def box_density(feature: Tensor, targets: Tensor | None) -> Tensor:
    """(B, H, W) float32: 1 / pixels of the smallest box over each pixel of a (B, C, H, W) map, 0 where there is none.

    A box covers the pixels that it touches. `targets` (n, 6) are image, class, x, y, w, h as fractions.
    """
    batch, _, height, width = feature.shape
    density = feature.new_zeros((batch, height, width), dtype=torch.float32)
    if targets is None:
        return density
    image, centre, size = targets[:, 0].long(), targets[:, 2:4].float(), targets[:, 4:6].float()
    rows = touched_cells(centre[:, 1], size[:, 1], height).float()
    columns = touched_cells(centre[:, 0], size[:, 0], width).float()
    area = (rows.sum(1) * columns.sum(1)).clamp_min(1)
    boxes = rows[:, :, None] * columns[:, None] / area[:, None, None]
    return density.scatter_reduce(0, image[:, None, None].expand_as(boxes), boxes, "amax")
