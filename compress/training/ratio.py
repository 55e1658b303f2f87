"""Weights of distillation losses from gradients: each loss's gradient is a chosen share of the label loss's.

A weight set by hand means nothing without the loss's reduction, the detector and the phase of the training: the same
0.2 gave one loss a third of the label loss's gradient and another 36 times of it. So the gradients of the label loss
and of each distillation loss are measured at the maps that the head reads, at some iterations, and the weights follow:

    target_k = share_k * |g_label| / |g_k|,  log w_k <- (1 - a) log w_k + a log clip(target_k, w_k / 4, 4 w_k)

The first measurement sets the weights. Source: the gradient-ratio weighting of RT-DETRv4.

g_label is that of the unweighted label loss: `distill.label_weight` says how much of it is trained, at 0 none, and
moves no other weight. Where no label is known, the reference is the first loss that compares heads. Its gains give it
the labels' scale, so its own weight becomes its share, for good, and the other losses' gradients follow its.
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

    The graph stays; no `.grad` changes. A loss that does not reach the maps has norm 0.
    """
    total = torch.stack([_squared_norm(loss, maps) for loss in losses])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total.sqrt()


def _squared_norm(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True) if loss.requires_grad else ()
    found = [gradient.float().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack([loss.new_zeros((), dtype=torch.float32), *found]).sum()


class LossWeights(nn.Module):
    """The weights of the distillation losses; they are buffers, so a resumed training goes on with the same ones.

    Args:
        fixed: of each loss, a weight that stays, or None.
        shares: of each loss without one, the wanted |gradient| as a share of the label loss's; scaled down where
            their sum is above LARGEST_SUM.
    """

    shares: Tensor
    """(k,) float32; 0 for a fixed weight."""
    weights: Tensor
    """(k,) float32."""
    measured: Tensor
    """(k,) float32: |gradient| of the weighted losses as shares of the label loss's, when last measured."""
    count: Tensor

    def __init__(self, fixed: Sequence[float | None], shares: Sequence[float]) -> None:
        super().__init__()
        wanted = [share if weight is None else 0.0 for weight, share in zip(fixed, shares, strict=True)]
        self.register_buffer("shares", torch.tensor(limited(wanted)), persistent=False)
        self.register_buffer("weights", torch.tensor([1.0 if weight is None else weight for weight in fixed]))
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
        measured = self.weights * norms / label_norm
        self.measured.copy_(torch.where(measured.isfinite(), measured, self.measured))
        self.count += (sound | (self.shares == 0)).all()
