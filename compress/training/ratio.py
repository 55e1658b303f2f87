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
from torch import Tensor, nn

from compress.losses.gradients import limited

FIRST = (0, 1, 2, 4, 8, 16, 32)
EVERY = 50
"""Iterations with a measurement: all of FIRST, then each multiple. One costs a fifth of a step."""
SETTLING = 8
"""Measurements with a step of FAST; later ones move by SLOW."""
FAST, SLOW = 0.5, 0.2
LARGEST_STEP = 4.0


def is_due(iteration: int) -> bool:
    """Whether gradients are measured in this iteration."""
    return iteration in FIRST or iteration % EVERY == 0


class LossWeights(nn.Module):
    """The weights of the distillation losses; they are buffers, so a resumed training goes on with the same ones.

    A loss has one weight, or one a level: features vary more on some levels than on others, so each is held to its own
    map. The K numbers in the tensors below are those of all losses, one after the other.

    Args:
        fixed: of each loss, a weight that stays, or None.
        shares: of each loss without one, the wanted |gradient| as a share of the label loss's; scaled down where
            their sum is above LARGEST_SUM.
        components: the number of weights of each loss; without it each has one.
    """

    shares: Tensor
    """(K,) float32; 0 for a fixed weight."""
    weights: Tensor
    """(K,) float32."""
    measured: Tensor
    """(losses,) float32: |gradient| of the weighted losses as shares of the label loss's, when last measured."""
    count: Tensor
    """(K,) int64: the measurements that each weight followed."""

    def __init__(self, fixed: Sequence[float | None], shares: Sequence[float], components: Sequence[int] = ()) -> None:
        super().__init__()
        self.components = tuple(components) or (1,) * len(shares)
        wanted = limited([share if weight is None else 0.0 for weight, share in zip(fixed, shares, strict=True)])
        start = [1.0 if weight is None else weight for weight in fixed]
        self.register_buffer("shares", self._for_each_component(wanted), persistent=False)
        self.register_buffer("weights", self._for_each_component(start))
        self.register_buffer("measured", torch.zeros(len(shares)))
        self.register_buffer("count", torch.zeros(sum(self.components), dtype=torch.int64))

    def _for_each_component(self, values: Sequence[float]) -> Tensor:
        return torch.tensor([value for value, n in zip(values, self.components, strict=True) for _ in range(n)])

    def of_losses(self) -> tuple[Tensor, ...]:
        """The weights (components,) of each loss, as they are now."""
        return self.weights.split(self.components)

    @torch.no_grad()
    def follow(self, label: Tensor, own: Tensor) -> None:
        """Follow a measurement: squared norms of unweighted gradients at the levels' maps, of the label loss (levels,)
        and of the losses (losses, levels).

        A loss with one weight is held to all maps together, one with a weight a level to each map.
        """
        squares = zip(own, self.components, strict=True)
        norms = torch.cat([row.sqrt() if n > 1 else row.sum().sqrt().view(1) for row, n in squares])
        whole = label.sum().sqrt().view(1)
        self.update(torch.cat([label.sqrt() if n > 1 else whole for n in self.components]), norms)

    @torch.no_grad()
    def update(self, label_norms: Tensor, norms: Tensor) -> None:
        """Follow a measurement, norms of unweighted gradients: the label loss's, (K,) or one for all, and the losses'
        own, (K,).

        One that is not finite moves no weight. Makes no wait for a GPU.
        """
        label_norms = label_norms.expand_as(norms)
        target = self.shares * label_norms / norms
        sound = target.isfinite() & (target > 0)
        slow = torch.where(self.count < SETTLING, FAST, SLOW)
        near = target.clamp(self.weights / LARGEST_STEP, self.weights * LARGEST_STEP)
        followed = ((1 - slow) * self.weights.log() + slow * near.log()).exp()
        moved = torch.where(self.count == 0, target, followed)
        self.weights.copy_(torch.where(sound, moved, self.weights))
        self.count += sound
        measured = self._of_loss(self.weights * norms) / self._of_loss(label_norms)
        self.measured.copy_(torch.where(measured.isfinite(), measured, self.measured))

    def _of_loss(self, norms: Tensor) -> Tensor:
        """(losses,): the norm over all maps, from norms (K,)."""
        return torch.stack([own.square().sum() for own in norms.split(self.components)]).sqrt()
