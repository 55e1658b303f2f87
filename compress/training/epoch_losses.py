"""The loss terms of one epoch: their means, and an error where they are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from compress.training.curves import Record
from runtime.errors import EdgestillError

FINITE_CHECK_EVERY = 50
"""Batches between two checks of the losses on a GPU, where each check waits for the device."""
IN_A_ROW = 5
"""Batches without a finite loss that end a training in which the gradient scaler skips them: one is an overflow of
float16, several are a training that has diverged."""


class EpochLosses:
    """Loss terms by name, kept on `device`. If reading them is not `cheap`, they are read only every few batches.

    One batch whose loss is not finite ends the training. With `skips`, where such batches move no weight, they are left
    out of the means and counted, and IN_A_ROW one after the other, or all of the epoch, end the training.
    """

    def __init__(
        self, names: Sequence[str], epoch: int, device: torch.device, *, cheap: bool, skips: bool = False
    ) -> None:
        self._names, self._epoch, self._cheap = names, epoch, cheap
        self._allowed = IN_A_ROW - 1 if skips else 0
        self._sum, self._finite = torch.zeros(len(names), device=device), torch.zeros((), device=device)
        self._unchecked: list[Tensor] = []
        self._count = self._in_a_row = self.skipped = 0

    def add(self, terms: Tensor) -> None:
        """Add the terms (len(names),) of one batch. Raises EdgestillError when a check finds too many not finite."""
        finite = terms.isfinite().all()
        self._sum += terms.where(finite, 0)
        self._finite += finite
        self._count += 1
        self._unchecked.append(terms)
        if self._cheap or len(self._unchecked) == FINITE_CHECK_EVERY:
            self._check()

    def _check(self) -> None:
        rows, self._unchecked = self._unchecked, []
        first = self._count - len(rows)
        for number, terms in enumerate(torch.stack(rows).tolist() if rows else (), first + 1):
            bad = [f"{name} = {term}" for name, term in zip(self._names, terms, strict=True) if not isfinite(term)]
            self.skipped += bool(bad)
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if self._in_a_row > self._allowed:
                raise self._error(f"{number}: {', '.join(bad)}")

    def _error(self, where: str) -> EdgestillError:
        row = f", {self._in_a_row} in a row" if self._in_a_row > 1 else ""
        return EdgestillError(
            f"the loss is not finite in epoch {self._epoch + 1}, batch {where}{row}",
            "The files still hold the epoch before: check the labels, or begin anew with a lower optimizer.lr0",
        )

    def _means(self) -> dict[str, float]:
        return dict(zip(self._names, (self._sum / self._finite).tolist(), strict=True))

    def means_if_cheap(self) -> dict[str, float] | None:
        """Means so far; None if reading them would make the host wait for the device."""
        return self._means() if self._cheap else None

    def close(self) -> Record:
        """The epoch's means as columns of results.csv. Raises EdgestillError when too many terms are not finite."""
        self._check()
        if self.skipped == self._count:
            raise self._error("1 to the last")
        return {f"train/{name}_loss": value for name, value in self._means().items()}
