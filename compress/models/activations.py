"""The activations that a network may have, by the names of their torch classes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Activation = Callable[[], nn.Module]

LEAKY_SLOPE = 0.1

ACTIVATIONS: dict[str, Activation] = {
    "SiLU": lambda: nn.SiLU(inplace=True),
    "LeakyReLU": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "Hardswish": lambda: nn.Hardswish(inplace=True),
    "ReLU": lambda: nn.ReLU(inplace=True),
}
