from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from compress.compute import threads
from compress.config import AugmentConfig, OptimizerConfig, StudentConfig, TrainConfig
from compress.data import Dataset
from compress.models.checkpoint import load, load_model
from compress.stages.teacher import train
from compress.training import loop
from compress.training.state import load_state
from runtime.errors import EdgestillError, InputError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

P = StudentConfig(scale="p")
SGD = OptimizerConfig(name="sgd", lr0=0.01, nominal_batch=64, warmup_epochs=1, momentum=0.9)
"""Sums gradients over many small batches: some are always pending when an epoch ends."""


def config(**changes: object) -> TrainConfig:
    base = {"epochs": 4, "batch": 4, "imgsz": 64, "val_interval": 2, "workers": 0, "tensorboard": False}
    return TrainConfig.model_validate(base | changes)


def quiet(_line: str) -> None: ...


class Stop(BaseException):
    """Raised in place of a kill: nothing in the product catches it."""


def stop_at(start: str):
    def log(line: str) -> None:
        if line.startswith(start):
            raise Stop

    return log


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    return load(path).state_dict


def assert_same_files(a: Path, b: Path) -> None:
    for name in ("last.safetensors", "best.safetensors"):
        mine, other = tensors_of(a / name), tensors_of(b / name)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[key], other[key]) for key in mine)
    assert (a / "results.csv").read_text() == (b / "results.csv").read_text()


@pytest.mark.parametrize("optimizer", [OptimizerConfig(), SGD], ids=["adamw", "sgd with pending gradients"])
def test_a_stopped_and_resumed_training_equals_a_straight_one(
    optimizer: OptimizerConfig, tiny_data: Dataset, tmp_path: Path
) -> None:
    settings = config(optimizer=optimizer)
    train(settings, data=tiny_data, out=tmp_path / "straight", start=P, device="cpu", log=quiet)
    with pytest.raises(Stop):
        train(settings, data=tiny_data, out=tmp_path / "cut", start=P, device="cpu", log=stop_at("epoch 2/4"))
    assert load_state(tmp_path / "cut" / "state.pt")["train_state"]["epoch"] == 2
    train(settings, data=tiny_data, out=tmp_path / "cut", device="cpu", resume=True, log=quiet)
    assert_same_files(tmp_path / "straight", tmp_path / "cut")


def test_a_resumed_training_goes_on_with_the_threads_that_it_had(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    measured = iter([2, 2, 1])  # for the straight training, the stopped one, and the next that asks
    monkeypatch.setattr(threads, "choose", lambda rounds, current: next(measured))
    monkeypatch.setattr(threads, "SHARE", 1e-9)  # no second time
    train(config(), data=tiny_data, out=tmp_path / "straight", start=P, device="cpu", log=quiet)
    with pytest.raises(Stop):
        train(config(), data=tiny_data, out=tmp_path / "cut", start=P, device="cpu", log=stop_at("epoch 2/4"))
    train(config(), data=tiny_data, out=tmp_path / "cut", device="cpu", resume=True, log=quiet)
    assert_same_files(tmp_path / "straight", tmp_path / "cut")
    train(config(), data=tiny_data, out=tmp_path / "other", start=P, device="cpu", log=quiet)
    with pytest.raises(AssertionError):  # with 1 thread the last bits differ
        assert_same_files(tmp_path / "straight", tmp_path / "other")


CHILD = """
import sys
from pathlib import Path
from compress.config import StudentConfig, TrainConfig
from compress.data import index_dataset, load_data
from compress.stages.teacher import train
config = TrainConfig.model_validate_json(sys.argv[1])
data, start = index_dataset(load_data(Path(sys.argv[2]))), StudentConfig(scale="p")
train(config, data=data, out=Path(sys.argv[3]), start=start, device="cpu")
"""


def test_a_killed_process_leaves_files_that_resume_to_the_straight_result(tiny_data: Dataset, tmp_path: Path) -> None:
    settings, out = config(epochs=6, val_interval=1), tmp_path / "killed"
    arguments = [sys.executable, "-c", CHILD, settings.model_dump_json(), str(tiny_data.path), str(out)]
    # one thread, as in this process: sums in another order have other last bits
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    while not (out / "state.pt").exists():
        assert child.poll() is None, "the training ended before it could be killed"
        time.sleep(0.01)
    child.kill()
    child.wait()
    load_model(out / "last.safetensors")
    train(settings, data=tiny_data, out=out, device="cpu", resume=True, log=quiet)
    train(settings, data=tiny_data, out=tmp_path / "straight", start=P, device="cpu", log=quiet)
    assert_same_files(tmp_path / "straight", out)


def test_a_training_leaves_weights_a_table_and_a_picture(tiny_data: Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    settings = config(epochs=2, tensorboard=True)
    result = train(settings, data=tiny_data, out=tmp_path, start=P, device="cpu", log=lines.append)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best.safetensors", "last.safetensors", "state.pt", "results.csv", "curves.png", "tensorboard",
    }  # fmt: skip
    assert load_model(result.best).arch.names == tiny_data.names
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert rows[-1]["metrics/mAP_0.5"] != ""
    assert [line for line in lines if line.startswith("epoch 2/2") and "mAP50" in line]


def test_losses_fall(tiny_data: Dataset, tmp_path: Path) -> None:
    calm = AugmentConfig(mosaic=0, translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0)
    quick = OptimizerConfig(lr0=0.01, warmup_epochs=0)
    settings = config(epochs=15, val_interval=15, augment=calm, optimizer=quick, autoanchor=False)
    train(settings, data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    first, last = (sum(float(row[f"train/{t}_loss"]) for t in ("box", "obj", "cls")) for row in (rows[0], rows[-1]))
    assert last < 0.9 * first


def test_a_loss_that_is_not_finite_stops_in_one_line_and_spares_the_files(tiny_data: Dataset, tmp_path: Path) -> None:
    wild = OptimizerConfig(name="sgd", lr0=1e20, warmup_epochs=0, clip_norm=1e30)
    with pytest.raises(EdgestillError, match=r"not finite in epoch \d, batch \d+: .*(nan|inf)") as caught:
        train(config(optimizer=wild), data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob(".*"))


def test_resuming_with_other_settings_names_the_setting(tiny_data: Dataset, tmp_path: Path) -> None:
    train(config(epochs=1), data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    with pytest.raises(UsageError, match="trained with epochs = 1, not 2"):
        train(config(epochs=2), data=tiny_data, out=tmp_path, device="cpu", resume=True, log=quiet)


def test_a_resumed_training_may_change_what_no_number_depends_on(tiny_data: Dataset, tmp_path: Path) -> None:
    done = train(config(epochs=1), data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    other = config(epochs=1, workers=2, checkpoint_interval=3)
    assert train(other, data=tiny_data, out=tmp_path, device="cpu", resume=True, log=quiet) == done


def test_resuming_nothing_says_so(tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        train(config(), data=tiny_data, out=tmp_path, device="cpu", resume=True, log=quiet)


def test_resuming_a_finished_training_returns_its_result(tiny_data: Dataset, tmp_path: Path) -> None:
    done = train(config(epochs=1), data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    again = train(config(epochs=1), data=tiny_data, out=tmp_path, device="cpu", resume=True, log=quiet)
    assert again == done


def test_neither_scale_nor_weights_is_a_usage_error(tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a scale nor weights"):
        train(config(), data=tiny_data, out=tmp_path, device="cpu", log=quiet)


def test_another_number_of_classes_starts_only_the_head_afresh(
    weights: Path, tiny_data: Dataset, tmp_path: Path
) -> None:
    still = OptimizerConfig(name="sgd", lr0=1e-9, warmup_epochs=0)
    settings = config(epochs=1, optimizer=still, autoanchor=False)
    result = train(
        settings,
        data=tiny_data,
        out=tmp_path,
        start=StudentConfig(scale=None, weights=weights),
        device="cpu",
        log=quiet,
    )
    before, after = tensors_of(weights), tensors_of(result.last)
    assert after["model.24.m.0.weight"].shape[0] == 3 * (5 + len(tiny_data.names))
    torch.testing.assert_close(after["model.0.conv.weight"], before["model.0.conv.weight"], rtol=1e-4, atol=1e-5)


def test_frozen_layers_keep_their_weights(tiny_data: Dataset, tmp_path: Path) -> None:
    result = train(config(epochs=1, freeze=10), data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    state = load_state(tmp_path / "state.pt")
    fresh = tensors_of(result.last)
    moved = {key.removeprefix("model.") for key in state["objective"] if key.startswith("model.")}
    assert moved >= fresh.keys()
    same = [torch.equal(state["objective"][f"model.{key}"], fresh[key]) for key in fresh if key.endswith("conv.weight")]
    assert any(same)
    assert not all(same)


def test_training_stops_early_without_a_better_fitness(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitness = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    real = loop.evaluate

    class Worse:
        def __init__(self, found: loop.ValResult) -> None:
            self.yolo, self.loss, self.fitness = found.yolo, found.loss, next(fitness)

    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: Worse(real(*a, **k)))
    settings = config(epochs=9, val_interval=1, patience=2)
    result = train(settings, data=tiny_data, out=tmp_path, start=P, device="cpu", log=quiet)
    assert result.epochs == 3
    assert result.metrics["epoch"] == 0
