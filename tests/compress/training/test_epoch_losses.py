from __future__ import annotations

import pytest
import torch

from compress.training.epoch_losses import FINITE_CHECK_EVERY, IN_A_ROW, EpochLosses
from runtime.errors import EdgestillError

NAMES = ("box", "obj")
BAD = torch.tensor([1.0, float("nan")])


def losses(*, cheap: bool, skips: bool = False) -> EpochLosses:
    return EpochLosses(NAMES, 4, torch.device("cpu"), cheap=cheap, skips=skips)


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


def _add_bad(made: EpochLosses, count: int) -> None:
    for _ in range(count):
        made.add(BAD)


@pytest.mark.parametrize("cheap", [True, False])
def test_skipped_batches_are_counted_and_not_in_the_means(cheap: bool) -> None:
    made = losses(cheap=cheap, skips=True)
    rows = [torch.tensor([1.0, 2.0]), *[BAD] * (IN_A_ROW - 1), torch.tensor([3.0, 6.0]), BAD]
    for row in rows:
        made.add(row)
    assert made.close() == {"train/box_loss": 2.0, "train/obj_loss": 4.0}
    assert made.skipped == IN_A_ROW


@pytest.mark.parametrize("cheap", [True, False])
def test_several_bad_losses_in_a_row_stop_even_a_training_that_skips_them(cheap: bool) -> None:
    made = losses(cheap=cheap, skips=True)
    made.add(torch.ones(2))
    with pytest.raises(EdgestillError, match="epoch 5, batch 6: obj = nan, 5 in a row"):
        _add_bad(made, FINITE_CHECK_EVERY)


def test_a_row_of_bad_losses_may_lie_across_two_checks() -> None:
    made = losses(cheap=False, skips=True)
    for number in range(2 * FINITE_CHECK_EVERY - 1):
        made.add(BAD if 0 <= number - FINITE_CHECK_EVERY + 2 < IN_A_ROW else torch.ones(2))
    with pytest.raises(EdgestillError, match=f"batch {FINITE_CHECK_EVERY + IN_A_ROW - 2}: obj"):
        made.add(torch.ones(2))


def test_an_epoch_without_a_finite_loss_stops_however_short_it_is() -> None:
    made = losses(cheap=True, skips=True)
    made.add(BAD)
    with pytest.raises(EdgestillError, match="epoch 5, batch 1 to the last"):
        made.close()
