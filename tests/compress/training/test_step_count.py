from __future__ import annotations

import pytest
from torch.utils._foreach_utils import _foreach_supported_types

from compress.compute.operations import BACKWARD, Work
from compress.training import profile
from compress.training.step_count import count_step, count_table, new_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    """A step of 80 classes at 640 pixels and batch 32, in no memory."""
    trainer = new_trainer("p", "p", 80, 640, 32, ["cwd"], tmp_path_factory.mktemp("count"))
    return count_step(trainer, fused=True).work


def test_every_phase_of_a_step_is_counted(work: dict[str, Work]) -> None:
    forward = {name for name in work if not name.endswith(BACKWARD)}
    losses = {"detection", "weights", "cwd"}
    assert forward == {"input", "teacher", "student", *losses, "clip", "optimiser", "EMA"}
    assert all(work[name + BACKWARD].operations for name in ("student", *losses))
    assert "teacher" + BACKWARD not in work


def test_the_detection_loss_and_its_gradients_take_150_operations_of_a_step_at_most(work: dict[str, Work]) -> None:
    assert work["detection"].operations + work["detection" + BACKWARD].operations <= 150


def test_bytes_are_those_of_the_full_size(work: dict[str, Work]) -> None:
    images = 32 * 3 * 640 * 640
    assert work["input"].bytes >= images * (1 + 4 + 4 + 4)  # to float32, divided in place


def test_many_tensors_are_one_operation_for_optimiser_and_clip(work: dict[str, Work]) -> None:
    assert work["optimiser"].operations < 10
    assert work["clip"].operations < 12
    assert not any("Fake" in kind.__name__ for kind in _foreach_supported_types)


def test_the_table_has_a_line_a_phase_and_their_sum() -> None:
    table = count_table({"student": Work(2, 10**9), "student" + BACKWARD: Work(3, 2 * 10**9), "clip": Work(1, 0)})
    rows = [line.split() for line in table.splitlines()[1:]]
    assert rows == [
        ["student", "2", "1.000", "3", "2.000", "5", "3.000"],
        ["clip", "1", "0.000", "0", "0.000", "1", "0.000"],
        ["all", "3", "1.000", "3", "2.000", "6", "3.000"],
    ]


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    profile.main(["--count", "--teacher", "p", "--student", "p", "--classes", "2", "--imgsz", "64", "--batch", "2"])
    assert "detection" in capsys.readouterr().out


def test_times_need_data_and_count_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        profile.main([])
    assert stopped.value.code == 2
    assert "--data is required" in capsys.readouterr().err
