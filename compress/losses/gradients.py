"""Gradients at the neck: how large each loss's is, and which shares of the label loss's the losses may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LARGEST_SUM = 1.5
"""The largest sum of all shares."""


def limited(shares: Sequence[float]) -> list[float]:
    """The shares, scaled down where their sum is above LARGEST_SUM."""
    factor = min(1.0, LARGEST_SUM / max(sum(shares), LARGEST_SUM))
    return [share * factor for share in shares]


def squared_norms(loss: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """(len(maps),) float32: the squared L2 norm of the gradient of `loss` () at each map; 0 where it does not reach it.

    The graph stays; no `.grad` changes.
    """
    if not loss.requires_grad:
        return loss.new_zeros(len(maps), dtype=torch.float32)
    gradients = torch.autograd.grad(loss, maps, retain_graph=True, allow_unused=True)
    nothing = loss.new_zeros((), dtype=torch.float32)
    return torch.stack([nothing if gradient is None else gradient.float().square().sum() for gradient in gradients])


def neck_gradients(terms: Mapping[str, Tensor], features: Sequence[Tensor]) -> dict[str, float]:
    """L2 norm of each scalar term's gradient at the features that the head reads. Keeps the graph."""
    return {name: float(squared_norms(term, features).sum().sqrt()) for name, term in terms.items()}
