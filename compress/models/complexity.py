"""The cost of a network: parameters, and multiply-accumulates of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.models.architecture import Architecture
from compress.models.network import network_on_meta_device


class Complexity(NamedTuple):
    """Cost of one image."""

    parameters: int
    """As trained: BatchNorm's factors and shifts count, its statistics do not."""
    fused_parameters: int
    """With BatchNorm folded into the convolutions."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products; GFLOPs are twice that."""


def complexity(architecture: Architecture, size_hw: tuple[int, int] = (640, 640)) -> Complexity:
    """The cost of a network for an image of `size_hw`, counted without allocating memory: milliseconds at any scale."""
    network = network_on_meta_device(architecture)
    fused = network.fuse()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        fused(torch.empty(1, 3, *size_hw, device="meta"))
    return Complexity(_parameters(network), _parameters(fused), counter.get_total_flops() // 2)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
