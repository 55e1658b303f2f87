"""The teacher's maps in units of their own scale, so that no loss depends on how large a network's features are.

A level's features have channels of very unlike size, and levels differ too: a squared difference would mostly count the
largest of them, and a softmax over pixels would take its temperature from them. The statistics are those of the batch,
over all processes, as each process must train towards the same maps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.compute.reduce import summed_over_processes

EPS = 1e-5
"""Added to a variance, as in BatchNorm: a constant channel becomes 0."""


class Statistics(NamedTuple):
    """Mean and mean square of each channel, (C,) float64, over batch and pixels of all processes."""

    mean: Tensor
    square: Tensor


def statistics(maps: Tensor) -> Statistics:
    """The statistics of maps (B, C, H, W) in any float dtype. It reads the maps twice and copies none."""
    wide, dims = torch.promote_types(maps.dtype, torch.float32), (0, 2, 3)
    total = maps.sum(dims, dtype=wide).double()
    square = torch.linalg.vector_norm(maps, dim=dims, dtype=wide).double().square()
    count = total.new_full((1,), maps.numel() / maps.shape[1])
    sums = summed_over_processes(torch.cat((count, total, square)))
    return Statistics(*(sums[1:] / sums[:1].clamp_min(1)).chunk(2))


def by_channel(maps: Tensor) -> Tensor:
    """The maps (B, C, H, W) less each channel's mean, over its standard deviation; in their dtype and layout."""
    mean, square = statistics(maps)
    return _normalised(maps, mean, (square - mean.square()).clamp_min(0))


def by_level(maps: Tensor) -> Tensor:
    """The maps (B, C, H, W) over the root of their mean square, all channels together; in their dtype and layout.

    Zero stays zero, and channels keep their sizes beside each other: attention is made of these.
    """
    square = statistics(maps).square
    return _normalised(maps, torch.zeros_like(square), square.mean().expand_as(square))


def _normalised(maps: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """(maps - mean) / sqrt(variance + EPS) in one pass."""
    wide = torch.promote_types(maps.dtype, torch.float32)
    return F.batch_norm(maps, mean.to(wide), variance.to(wide), eps=EPS)
