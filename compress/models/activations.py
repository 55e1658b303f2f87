"""The activations that a network may have, by the names of their torch classes.

They overwrite their input where that costs nothing. The backward pass of SiLU and Hardswish reads the input, so
autograd would copy it first; that of ReLU and LeakyReLU reads the output.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

Activation = Callable[[], nn.Module]

LEAKY_SLOPE = 0.1


class SiLU(nn.SiLU):
    """torch's; in place where no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not x.requires_grad)


class Hardswish(nn.Hardswish):
    """torch's; in place where no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        return F.hardswish(x, inplace=not x.requires_grad)


ACTIVATIONS: dict[str, Activation] = {
    "SiLU": SiLU,
    "LeakyReLU": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "Hardswish": Hardswish,
    "ReLU": lambda: nn.ReLU(inplace=True),
}
