"""Values that change during a training, as pure functions of the iteration or the epoch.

Because nothing here has a state, a resumed training needs only its epoch to continue exactly.
The rules are YOLOv5 v7.0's, including that past the warm-up an epoch runs at the previous epoch's rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from compress.config import AugmentConfig, OptimizerConfig

BIASES, WEIGHTS, NORMS = range(3)
"""Order of the parameter groups (YOLOv5 v6.2 and later)."""

_CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


class Rates(NamedTuple):
    """The optimiser's settings in one iteration."""

    lr: tuple[float, float, float]
    """Learning rates of biases, weights and normalisation weights."""
    momentum: float
    accumulate: int
    """Batches whose gradients are summed before one step."""


def blend(iteration: float, end: float, first: float, last: float) -> float:
    """Linear from `first` at 0 to `last` at `end`; `last` from there on, and everywhere when `end` is 0."""
    if iteration >= end:
        return last
    return first + (last - first) * (iteration / end)


@dataclass(frozen=True)
class Schedule:
    """Rates of every iteration of a training of `epochs` epochs of `batches` batches of `batch_size` images.

    `batch_size` counts the images of all processes together.
    """

    config: OptimizerConfig
    epochs: int
    batches: int
    batch_size: int

    @property
    def warmup_iterations(self) -> int:
        """The number of the last iteration of the warm-up."""
        if not self.config.warmup_epochs:
            return 0
        return max(round(self.config.warmup_epochs * self.batches), self.config.warmup_min_iterations)

    @property
    def batches_per_step(self) -> float:
        """Batches whose images make up the nominal batch (64 in YOLOv5); may lie below one."""
        return self.config.nominal_batch / self.batch_size if self.config.nominal_batch else 1.0

    @property
    def accumulate(self) -> int:
        """Batches per step after the warm-up."""
        return max(round(self.batches_per_step), 1)

    @property
    def weight_decay(self) -> float:
        """Weight decay, scaled to the number of images of one step."""
        if not self.config.nominal_batch:
            return self.config.weight_decay
        return self.config.weight_decay * self.batch_size * self.accumulate / self.config.nominal_batch

    def factor(self, epoch: int) -> float:
        """Share of `lr0` at an epoch: falls from 1 to `lrf`."""
        lrf = self.config.lrf
        return _CURVES[self.config.schedule](epoch / self.epochs) * (1 - lrf) + lrf

    def at(self, iteration: int) -> Rates:
        """Rates of the iteration with this number, counted from 0 over the whole training."""
        if iteration <= self.warmup_iterations:
            return self._warming(iteration)
        epoch, last_warm_epoch = iteration // self.batches, self.warmup_iterations // self.batches
        lr = self.config.lr0 * self.factor(epoch if epoch == last_warm_epoch else epoch - 1)
        return Rates((lr, lr, lr), self.config.momentum, self.accumulate)

    def _warming(self, iteration: int) -> Rates:
        end, config = self.warmup_iterations, self.config
        target = config.lr0 * self.factor(iteration // self.batches)
        bias, other = blend(iteration, end, config.warmup_bias_lr, target), blend(iteration, end, 0.0, target)
        momentum = blend(iteration, end, config.warmup_momentum, config.momentum)
        accumulate = round(blend(iteration, end, 1.0, self.batches_per_step))
        return Rates((bias, other, other), momentum, max(accumulate, 1))


def mosaic_epochs(config: AugmentConfig, epochs: int) -> int:
    """Epochs, from the first, that run with mosaic and mixup; the last `close_mosaic` (at most a fifth) do without."""
    return epochs - min(config.close_mosaic, epochs // 5)


def fading_factor(epoch: int, epochs: int, until: float) -> float:
    """Factor of a distillation loss in an epoch: by a half cosine from 1 to 0 at the part `until` of the epochs.

    A loss with `until` 1 does not fade.
    """
    return 1.0 if until == 1 else _CURVES["cosine"](min(epoch / (until * epochs), 1.0))
