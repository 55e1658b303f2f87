"""A short distillation, alone or as one of several processes.

`python -m tests.compress.training.two_processes STRATEGY FOLDER`: each process writes FOLDER/<rank>.pt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.training.progress import Progress

from . import toys

EPOCHS = 3


def train(strategy: str, out: Path) -> dict[str, Any]:
    """Losses of the epochs, weights, averaged weights and pending gradients at the end.

    A step takes two batches and an epoch has three, so gradients are pending when the first and the last one end.
    The distillation loss has faded out in the last epoch. BatchNorm's statistics stay fixed: each process sees other
    images, so its statistics of a batch would be others.
    """
    losses = {"feat_mse": {"weight": 0.1, "until": 0.5}}
    settings = toys.config(strategy=strategy, optimizer={"nominal_batch": 8}, losses=losses)
    trainer = toys.trainer(settings, out, images=12, distils=True)
    for norm in (module for module in trainer.objective.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.eval()
        norm.train = lambda mode=True, norm=norm: norm  # type: ignore[method-assign, misc]
    terms = []
    for _ in range(EPOCHS):
        record = trainer.train_epoch(Progress())
        terms.append([value for key, value in record.items() if key.startswith("train/")])
        trainer.state.epoch += 1
    return {
        "processes": trainer.processes,
        "steps": trainer.ema.updates,
        "losses": torch.tensor(terms),
        "weights": {name: value.detach().clone() for name, value in trainer.objective.named_parameters()},
        "ema": {
            f"{number}.{name}": value
            for number, average in enumerate(trainer.averages)
            for name, value in average.module.state_dict().items()
        },
        "gradients": [parameter.grad for parameter in trainer.objective.parameters()],
    }


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    torch.save(train(sys.argv[1], folder), folder / f"{os.environ['RANK']}.pt")
