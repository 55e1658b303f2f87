from __future__ import annotations

from compress.training.progress import Progress, epoch_line, open_progress


def test_an_epoch_is_one_line_with_losses_accuracy_and_speed() -> None:
    record = {"epoch": 4.0, "train/box_loss": 0.05, "metrics/mAP_0.5": 0.9, "metrics/mAP_0.5:0.95": 0.6}
    assert epoch_line(record, 10, 2.0, 50) == "epoch 5/10  box 0.0500  mAP50 0.9000  mAP50-95 0.6000  25.0 images/s"


def test_an_epoch_without_validation_shows_no_accuracy() -> None:
    assert "mAP" not in epoch_line({"epoch": 0.0, "train/box_loss": 0.05}, 10, 2.0, 50)


def test_no_bar_where_there_is_no_terminal(capsys) -> None:
    with open_progress(3, shown=True) as progress:
        progress.epoch(1, 2)
        progress.batch({"box": 1.0})
    assert type(progress) is Progress
    assert capsys.readouterr().out == ""
