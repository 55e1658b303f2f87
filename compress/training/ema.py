"""Exponential moving average of a model's weights and statistics: what is validated, saved and shipped."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Ema(Generic[Module]):
    """A frozen copy of a model that follows it.

    After update number n (from 1) with `d = decay * (1 - exp(-n / ramp))`, every floating tensor of the state becomes
    `d * ema + (1 - d) * model`. Integer buffers (BatchNorm's counter) keep the value that they had at the start.
    """

    def __init__(self, model: Module, decay: float, ramp: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.ramp, self.updates = decay, ramp, 0
        self._targets = _floating(self.module)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Follow `model` by one optimiser step."""
        self.updates += 1
        keep = self.decay * (1 - math.exp(-self.updates / self.ramp))
        # read the state of `model` again: accelerate and load_state_dict may have replaced its tensors
        torch._foreach_mul_(self._targets, keep)
        torch._foreach_add_(self._targets, _floating(model), alpha=1 - keep)


def _floating(model: nn.Module) -> list[torch.Tensor]:
    return [value for value in model.state_dict().values() if value.dtype.is_floating_point]
