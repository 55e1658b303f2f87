"""Ridge regression in float64, from moments that batches add up to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """What a regression needs of its samples: X'X (C + 1, C + 1) and X'Y (C + 1, K) float64, X with a last column of
    ones.
    """

    xx: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Moments:
        """The moments of samples x (n, C) and their targets y (n, K), in any float dtype."""
        x = x.double()
        x = torch.cat((x, x.new_ones(len(x), 1)), 1)
        return cls(x.T @ x, x.T @ y.double())

    def plus(self, other: Moments) -> Moments:
        """The moments of the samples of both."""
        return Moments(self.xx + other.xx, self.xy + other.xy)


def ridge(moments: Moments, penalty: float) -> tuple[Tensor, Tensor]:
    """The matrix (K, C) and the offset (K) that minimise the squared error of W x + b, plus the penalty on W.

    `penalty` is a share of the mean diagonal of X'X; the offset has none.
    """
    xx, xy = moments
    added = torch.full((len(xx),), penalty * float(xx.diagonal().mean()), dtype=xx.dtype, device=xx.device)
    added[-1] = 0
    solution = torch.linalg.solve(xx + added.diag(), xy)
    return solution[:-1].T, solution[-1]
