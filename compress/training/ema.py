"""Exponential moving average of a model's weights and statistics: what is validated, saved and shipped."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Ema(Generic[Module]):
    """A frozen copy of a model that follows it; the model must keep its parameters and buffers.

    After update number n (from 1) with `d = decay * (1 - exp(-n / ramp))`, every floating tensor of the state becomes
    `d * ema + (1 - d) * model`. Integer buffers (BatchNorm's counter) keep the value that they had at the start.
    """

    def __init__(self, model: Module, decay: float, ramp: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self._own, self._followed = _floating(self.module), _floating(model)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the model by one optimiser step."""
        self.updates += 1
        keep = self.decay * (1 - math.exp(-self.updates / self.ramp))
        torch._foreach_mul_(self._own, keep)
        torch._foreach_add_(self._own, self._followed, alpha=1 - keep)


def _floating(model: nn.Module) -> list[torch.Tensor]:
    """The very parameters and buffers, whose values may be loaded or moved; none is replaced during a training."""
    return [value for value in model.state_dict(keep_vars=True).values() if value.dtype.is_floating_point]
