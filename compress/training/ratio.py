"""Weights of distillation losses from gradients: each loss's gradient is a chosen share of the label loss's.

A weight set by hand means nothing without the loss's reduction, the detector and the phase of the training: the same
0.2 gave one loss a third of the label loss's gradient and another 36 times of it. So the gradients of the label loss
and of each distillation loss are measured at the maps that the head reads, at some iterations, and the weights follow:

    target_k = share_k * |g_label| / |g_k|,  log w_k <- (1 - a) log w_k + a log clip(target_k, w_k / 4, 4 w_k)

The first measurement sets the weights. Source: the gradient-ratio weighting of RT-DETRv4.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

FIRST = (0, 1, 2, 4, 8, 16, 32)
EVERY = 50
"""Iterations with a measurement: all of FIRST, then each multiple. One costs a fifth of a step."""
SETTLING = 8
"""Measurements with a step of FAST; later ones move by SLOW."""
FAST, SLOW = 0.5, 0.2
LARGEST_STEP = 4.0
LARGEST_SUM = 1.5
"""The largest sum of all shares."""


def is_due(iteration: int) -> bool:
    """Whether gradients are measured in this iteration."""
    return iteration in FIRST or iteration % EVERY == 0


def limited(shares: Sequence[float]) -> list[float]:
    """The shares, scaled down where their sum is above LARGEST_SUM."""
    factor = min(1.0, LARGEST_SUM / max(sum(shares), LARGEST_SUM))
    return [share * factor for share in shares]


def gradient_norms(losses: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """(len(losses),) float32: the L2 norm of each loss's gradient at `maps`, over all of them and all processes.

    The graph stays; no `.grad` changes. A loss that does not reach a map has no gradient there.
    """
    squares = [_squared_norm(torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)) for loss in losses]
    total = torch.stack(squares)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def _squared_norm(gradients: Sequence[Tensor | None]) -> Tensor:
    found = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(found).sum()


class GradientRatio(nn.Module):
    """The weights of some losses; they are buffers, so a resumed training goes on with the same ones.

    Args:
        shares: of each loss, the wanted |gradient| as a share of the label loss's; scaled down where their sum is
            above LARGEST_SUM.
    """

    shares: Tensor
    weights: Tensor
    measured: Tensor
    count: Tensor

    def __init__(self, shares: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("shares", torch.tensor(limited(shares)), persistent=False)
        self.register_buffer("weights", torch.ones(len(shares)))
        self.register_buffer("measured", torch.zeros(len(shares)))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, label_norm: Tensor, norms: Tensor) -> None:
        """Follow a measurement: `label_norm` () and `norms` (k,), unweighted. One that is not finite changes nothing.

        Makes no wait for a GPU.
        """
        target = self.shares * label_norm / norms
        sound = target.isfinite() & (target > 0)
        slow = torch.where(self.count < SETTLING, FAST, SLOW)
        near = target.clamp(self.weights / LARGEST_STEP, self.weights * LARGEST_STEP)
        followed = ((1 - slow) * self.weights.log() + slow * near.log()).exp()
        moved = torch.where(self.count == 0, target, followed)
        self.weights.copy_(torch.where(sound, moved, self.weights))
        self.measured.copy_(torch.where(sound, self.weights * norms / label_norm, self.measured))
        self.count += sound.all()
