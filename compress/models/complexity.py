"""What a network costs: parameters, and multiply-accumulates of an image."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.models.architecture import Architecture
from compress.models.graph_in_file import skeleton


class Complexity(NamedTuple):
    """Cost of one image."""

    parameters: int
    """As trained: BatchNorm's factors and shifts count, its statistics do not."""
    fused_parameters: int
    """With BatchNorm folded into the convolutions."""
    macs: int
    """Multiply-accumulates of the convolutions; GFLOPs are twice that."""


def complexity(architecture: Architecture, size_hw: tuple[int, int] = (640, 640)) -> Complexity:
    """Counted on tensors without memory, so it takes milliseconds for any scale."""
    network = skeleton(architecture)
    fused = network.fuse()
    macs = 0

    def count(conv: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal macs
        assert isinstance(conv, nn.Conv2d)
        macs += output[0].numel() * conv.weight[0].numel()

    for module in fused.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with torch.inference_mode():
        fused(torch.empty(1, 3, *size_hw, device="meta"))
    return Complexity(_parameters(network), _parameters(fused), macs)


def _parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
