"""The loss terms of one epoch: their means, and an error if one is not finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.compute.numerics import require_finite
from compress.training.curves import Record

FINITE_CHECK_EVERY = 50
"""Batches between two checks of the losses on a GPU, where each check waits for the device."""


class EpochLosses:
    """Loss terms by name, kept on `device`. If reading them is not `cheap`, they are read only every few batches."""

    def __init__(self, names: Sequence[str], epoch: int, device: torch.device, *, cheap: bool) -> None:
        self._names, self._epoch, self._cheap = names, epoch, cheap
        self._sum = torch.zeros(len(names), device=device)
        self._unchecked: list[Tensor] = []
        self._count = 0

    def add(self, terms: Tensor) -> None:
        """Add the terms (len(names),) of one batch. Raises EdgestillError when one that is checked is not finite."""
        self._sum += terms
        self._count += 1
        self._unchecked.append(terms)
        if self._cheap or len(self._unchecked) == FINITE_CHECK_EVERY:
            self._check()

    def _check(self) -> None:
        rows, self._unchecked = self._unchecked, []
        if rows:
            require_finite(torch.stack(rows), self._names, epoch=self._epoch, first_batch=self._count - len(rows))

    def _means(self) -> dict[str, float]:
        return dict(zip(self._names, (self._sum / self._count).tolist(), strict=True))

    def means_if_cheap(self) -> dict[str, float] | None:
        """Means so far; None if reading them would make the host wait for the device."""
        return self._means() if self._cheap else None

    def close(self) -> Record:
        """The epoch's means as columns of results.csv. Raises EdgestillError when a term is not finite."""
        self._check()
        return {f"train/{name}_loss": value for name, value in self._means().items()}
