"""BatchNorm statistics that survive a batch whose loss is not finite."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SoundStatistics:
    """The BatchNorm statistics of a model after the last batch with a finite loss.

    A gradient scaler skips the step of an overflow, but the forward pass has already put infinities into the running
    means and variances, where they would stay.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        found = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._buffers = [buffer for buffer in found if buffer is not None]
        self._sizes = [len(buffer) for buffer in self._buffers]
        self._kept = torch.cat(self._buffers)

    def keep(self) -> None:
        """Take the model's statistics, as they are after a state was loaded."""
        self._kept.copy_(torch.cat(self._buffers))

    def keep_if(self, sound: Tensor) -> None:
        """Take the model's statistics where `sound` () bool is true, else give it the kept ones. Waits for no GPU."""
        torch.where(sound, torch.cat(self._buffers), self._kept, out=self._kept)
        torch._foreach_copy_(self._buffers, self._kept.split(self._sizes))
