from __future__ import annotations

import pytest
import torch

from compress.training.epoch_losses import FINITE_CHECK_EVERY, EpochLosses
from runtime.errors import EdgestillError

NAMES = ("box", "obj")
BAD = torch.tensor([1.0, float("nan")])


def losses(*, cheap: bool) -> EpochLosses:
    return EpochLosses(NAMES, 4, torch.device("cpu"), cheap=cheap)


def test_an_epoch_ends_with_the_means_of_its_batches() -> None:
    made = losses(cheap=True)
    for row in ([1.0, 2.0], [3.0, 6.0]):
        made.add(torch.tensor(row))
    assert made.means_if_cheap() == {"box": 2.0, "obj": 4.0}
    assert made.close() == {"train/box_loss": 2.0, "train/obj_loss": 4.0}


def test_a_bad_loss_stops_at_once_where_reading_is_cheap() -> None:
    made = losses(cheap=True)
    made.add(torch.ones(2))
    with pytest.raises(EdgestillError, match="not finite in epoch 5, batch 2: obj = nan"):
        made.add(BAD)


def test_elsewhere_a_bad_loss_stops_at_the_next_look_and_is_named_exactly() -> None:
    made = losses(cheap=False)
    for number in range(FINITE_CHECK_EVERY - 1):
        made.add(BAD if number == 7 else torch.ones(2))
    assert made.means_if_cheap() is None
    with pytest.raises(EdgestillError, match="epoch 5, batch 8: obj = nan"):
        made.add(torch.ones(2))


def test_no_bad_loss_outlives_its_epoch() -> None:
    made = losses(cheap=False)
    made.add(torch.ones(2))
    made.add(BAD)
    with pytest.raises(EdgestillError, match="epoch 5, batch 2"):
        made.close()
