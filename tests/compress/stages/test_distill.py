from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from compress.config import DistillConfig, Recipe, StudentConfig, TrainConfig
from compress.data import Dataset, index_dataset, load_data
from compress.data.index import JUDGES
from compress.data.loader import epoch_tasks, train_batches
from compress.log import Log
from compress.losses import distill as losses
from compress.losses.distill import features
from compress.losses.distill.features import Level
from compress.models import YOLOv5
from compress.models.checkpoint import load, load_model
from compress.stages.distill import STAGE, Config, Inputs, run
from compress.stages.teacher import train
from compress.training.checks import Accuracy
from compress.training.loop import Job, Trainer
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import new_model, open_splits
from compress.training.ratio import LossWeights
from compress.training.state import load_state
from compress.training.teacher import Teacher, build_losses
from runtime.errors import EdgestillError, InputError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes: object) -> DistillConfig:
    base = {
        "epochs": 2, "batch": 4, "imgsz": 64, "val_interval": 2, "workers": 0, "tensorboard": False,
        "losses": {"soft": 1.0, "feat_mse": "auto"},
    }  # fmt: skip
    return DistillConfig.model_validate(base | changes)


def quiet(_line: str) -> None: ...


def distill(
    settings: DistillConfig, data: Dataset, teacher: Path, out: Path, log: Log = quiet, resume: bool = False
) -> None:
    """The stage, for a student of scale p on the CPU."""
    whole = Config(distill=settings, student=StudentConfig(scale="p"), device="cpu")
    run(whole, Inputs(data, teacher, resume), out, log)


@pytest.fixture(scope="module")
def teacher_file(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher")
    settings = TrainConfig(epochs=3, batch=4, imgsz=64, val_interval=3, workers=0, tensorboard=False, seed=7)
    return train(settings, data=tiny_data, out=out, start=StudentConfig(scale="n"), device="cpu", log=quiet).best


@pytest.fixture
def trainer(tiny_data: Dataset, teacher_file: Path, tmp_path: Path) -> tuple[Trainer, Teacher]:
    """A distillation that is about to train its first batch."""
    settings, teacher = config(), Teacher(load_model(teacher_file), "cpu")
    student = new_model(tiny_data.names, scale="p", weights=None, anchors=teacher.arch.anchors, log=quiet)
    objective = Objective(student, detection_loss(student, settings), build_losses(student, teacher, settings))
    splits = open_splits(tiny_data, settings, quiet)
    return Trainer(Job(settings, objective, splits.train, splits.val, tmp_path, teacher), "cpu", quiet), teacher


def test_a_step_moves_student_and_adapters_and_no_bit_of_the_teacher(trainer: tuple[Trainer, Teacher]) -> None:
    loop, teacher = trainer
    before = {key: value.clone() for key, value in teacher.model.state_dict().items()}
    student = {name: value.detach().clone() for name, value in loop.objective.named_parameters()}
    loop.wrapped.train()
    for number, batch in enumerate(train_batches(loop.job.train, epoch_tasks(loop.job.train, 0, batch=4))):
        loop.train_batch(batch, number)
    assert all(torch.equal(value, before[key]) for key, value in teacher.model.state_dict().items())
    assert not any(module.training for module in teacher.model.modules())
    optimised = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
    assert not optimised & {id(p) for p in teacher.model.parameters()}
    still = [name for name, value in loop.objective.named_parameters() if torch.equal(value, student[name])]
    assert still == []


def test_the_teachers_answer_for_an_image_does_not_depend_on_its_neighbours(trainer: tuple[Trainer, Teacher]) -> None:
    _, teacher = trainer
    images = torch.rand(3, 3, 64, 64)
    together, alone = teacher(images), teacher(images[1:2])
    for many, one in zip(together.raw, alone.raw, strict=True):
        torch.testing.assert_close(many[1:2], one, rtol=1e-4, atol=1e-5)


def test_the_total_is_the_sum_of_its_terms_times_the_batch_size(trainer: tuple[Trainer, Teacher]) -> None:
    loop, teacher = trainer
    images = torch.rand(3, 3, 64, 64)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.3]])
    total, terms = loop.objective(images, targets, teacher(images), [0.25, 0.25])
    assert loop.objective.terms == ("box", "obj", "cls", "soft", "feat_mse")
    assert total.item() == pytest.approx(3 * terms.sum().item(), rel=1e-5)
    whole = loop.objective(images, targets, teacher(images)).terms
    torch.testing.assert_close(terms[3:], 0.25 * whole[3:], rtol=1e-3, atol=0)


def test_files_hold_the_student_alone_and_the_table_its_terms(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    distill(config(), tiny_data, teacher_file, tmp_path, lines.append)
    best = tmp_path / "best.safetensors"
    plain = new_model(tiny_data.names, scale="p", weights=None, log=quiet)
    assert (tmp_path / "student.safetensors").read_bytes() == best.read_bytes()
    assert load(best).state_dict.keys() == plain.state_dict().keys()
    assert load_model(best).arch.anchors == load_model(teacher_file).arch.anchors
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert all(float(row[f"train/{name}_loss"]) > 0 for row in rows for name in ("soft", "feat_mse"))
    assert [line for line in lines if line.startswith("teacher: ") and "ms an image" in line]
    assert [line for line in lines if "checks passed" in line and "soft" in line]


def test_a_stopped_and_resumed_distillation_equals_a_straight_one(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "FIT_STEPS", 2)
    settings, lines = config(losses={"soft": "auto", "feat_mse": "auto", "mgd": "auto"}), []

    def stop(line: str) -> None:
        if line.startswith("epoch 1/2"):
            raise KeyboardInterrupt

    distill(settings, tiny_data, teacher_file, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        distill(settings, tiny_data, teacher_file, tmp_path / "cut", stop)
    distill(settings, tiny_data, teacher_file, tmp_path / "cut", lines.append, resume=True)
    assert not [line for line in lines if line.startswith("adapters")]
    straight, cut = (load_state(tmp_path / name / "state.pt") for name in ("straight", "cut"))
    assert_same_weights(straight, cut)


def assert_same_weights(one: dict[str, Any], other: dict[str, Any]) -> None:
    for a, b in zip([one["objective"], *one["ema"]], [other["objective"], *other["ema"]], strict=True):
        assert all(torch.equal(value, b[key]) for key, value in a.items())


def test_a_teacher_of_other_classes_is_refused(weights: Path, tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has 80 classes .*, the data has 2") as caught:
        distill(config(), tiny_data, weights, tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_loss_is_refused_with_the_known_ones(tiny_data: Dataset, teacher_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'sofd' is not known.*soft"):
        distill(config(losses={"sofd": 1.0}), tiny_data, teacher_file, tmp_path)


@pytest.mark.parametrize("stage", ["teacher", "distill"])
def test_a_batch_that_leaves_one_image_of_one_cell_is_refused_before_the_network_sees_any(
    stage: str, tiny_data: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    settings, start = config(imgsz=32, batch=9), StudentConfig(scale="p", weights=teacher_file)  # 10 images
    stages = {
        "teacher": lambda: train(settings, data=tiny_data, out=tmp_path, start=start, device="cpu", log=quiet),
        "distill": lambda: distill(settings, tiny_data, teacher_file, tmp_path),
    }
    with pytest.raises(UsageError, match="1 image of one cell of 32 pixels"):
        stages[stage]()
    assert not list(tmp_path.iterdir())


class Dead(losses.FeatureLoss):
    name = "dead"

    def level(self, level: Level) -> torch.Tensor:
        return 0 * level.student.float().mean()


def test_a_loss_that_does_nothing_is_found_before_the_first_epoch(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(losses.LOSSES, Dead.name, Dead)
    with pytest.raises(EdgestillError, match=r"would not work: dead is finite and not zero") as caught:
        distill(config(losses={"dead": 1.0}), tiny_data, teacher_file, tmp_path)
    assert "\n" not in str(caught.value)
    assert [file.name for file in tmp_path.iterdir()] == ["inheritance.json"]


class Watched(torch.nn.Module):
    """A loss that notes which gradient it was told to expect, and which one came."""

    components = 3

    def __init__(self) -> None:
        super().__init__()
        self.expected: torch.Tensor | None = None
        self.came: list[torch.Tensor] = []

    def forward(self, student: losses.Outputs, teacher: losses.Outputs, context: losses.Context) -> torch.Tensor:
        self.expected = context.upstream
        value = student.features[0].mean() * torch.ones(self.components)
        value.register_hook(self.came.append)
        return value


@pytest.mark.parametrize("scale", [1.0, 65536.0, 24576.7])
def test_the_gradient_that_a_loss_is_told_to_expect_is_the_one_that_comes(
    trainer: tuple[Trainer, Teacher], scale: float
) -> None:
    """To the bit: one ulp between them would cost the kernels another pass over every gradient."""
    loop, teacher = trainer
    objective, watched = loop.objective, Watched()
    objective.losses = torch.nn.ModuleDict({"feat_mse": watched})
    objective.weights = LossWeights([2.3], [1.0], [3])
    batch = next(train_batches(loop.job.train, epoch_tasks(loop.job.train, 0, batch=3)))
    images, upstream = batch.images.float() / 255, torch.tensor(scale)
    objective(images, batch.targets, teacher(images), [0.37], upstream).total.backward(upstream)
    assert torch.equal(watched.came[0], watched.expected)


# ---- strategies -----------------------------------------------------------------------------------------------------


@pytest.fixture
def without_labels(tiny_data: Dataset, tmp_path: Path) -> Dataset:
    """The tiny data with no label in its train split."""
    root = tmp_path / "data"
    shutil.copytree(tiny_data.root, root)
    shutil.rmtree(root / "labels/train")
    return index_dataset(load_data(root / "data.yaml"), labelled=JUDGES)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").read_text().splitlines()))


def test_a_student_learns_from_unlabelled_images_alone(
    without_labels: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    images, lines, out = without_labels.root / "images/train", [], tmp_path / "out"
    settings = config(strategy="label_free", unlabelled=images, losses={"soft": "auto", "pkd": "auto"})
    distill(settings, without_labels, teacher_file, out, lines.append)
    for row in rows(out):
        assert [float(row[f"train/{part}_loss"]) for part in ("box", "obj", "cls")] == [0, 0, 0]
        assert float(row["train/soft_loss"]) > 0
        assert float(row["share/soft"]) == pytest.approx(1, rel=1e-3)
    assert any(f"unlabelled: 10 images of {images}" in line for line in lines)
    assert not any(line.startswith("train: ") for line in lines)
    assert (out / "student.safetensors").is_file()


def test_a_stopped_training_on_both_kinds_of_images_goes_on_and_refuses_other_images(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    def stop(line: str) -> None:
        if line.startswith("epoch 1/2"):
            raise KeyboardInterrupt

    images = tmp_path / "camera"
    shutil.copytree(tiny_data.root / "images/val", images)
    settings = config(unlabelled=images)
    distill(settings, tiny_data, teacher_file, tmp_path / "straight")
    with pytest.raises(KeyboardInterrupt):
        distill(settings, tiny_data, teacher_file, tmp_path / "cut", stop)
    moved = images.rename(tmp_path / "moved")
    settings = config(unlabelled=moved)
    distill(settings, tiny_data, teacher_file, tmp_path / "cut", resume=True)
    assert_same_weights(*(load_state(tmp_path / name / "state.pt") for name in ("straight", "cut")))
    next(moved.iterdir()).unlink()
    with pytest.raises(UsageError, match="trained with unlabelled images = sha256 "):
        distill(settings, tiny_data, teacher_file, tmp_path / "cut", resume=True)


def test_a_video_of_the_camera_teaches(tiny_data: Dataset, teacher_file: Path, tmp_path: Path) -> None:
    film = tmp_path / "camera.avi"
    writer = cv2.VideoWriter(str(film), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(6):
        writer.write(np.random.default_rng(number).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    settings = config(strategy="label_free", unlabelled=film, frame_stride=2, losses={"soft": "auto"})
    distill(settings, tiny_data, teacher_file, tmp_path / "out")
    assert len(list((tmp_path / "out/unlabelled").rglob("*.jpg"))) == 3
    assert len(rows(tmp_path / "out")) == 2


def test_teacher_and_student_of_a_joint_training_are_both_saved(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    lines: list[str] = []
    distill(config(strategy="joint", losses={"soft": "auto"}), tiny_data, teacher_file, tmp_path, lines.append)
    began, now = load(teacher_file), load(tmp_path / "teacher.safetensors")
    assert now.architecture == began.architecture
    for key in (f"model.24.m.{level}.bias" for level in range(3)):
        assert not torch.equal(now.state_dict[key], began.state_dict[key])
    assert load(tmp_path / "student.safetensors").architecture.scale == "p"
    assert all(float(row["train/teacher_loss"]) > 0 for row in rows(tmp_path))
    assert any(line.startswith("teacher, which trains too: ") for line in lines)


def test_a_student_is_compared_with_the_teacher_that_trained_along(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[dict[str, torch.Tensor]] = []

    def accuracy(model: YOLOv5, *_: Any, rect: bool) -> Accuracy:
        measured.append(model.state_dict())
        return Accuracy(0.25, 0.5, 4, rect)

    monkeypatch.setattr("compress.stages.distill.student_accuracy", accuracy)
    distill(config(strategy="joint", losses={"soft": "auto"}), tiny_data, teacher_file, tmp_path)
    told = json.loads((tmp_path / "teacher.json").read_text())
    assert (told["map50_95"], told["map50"]) == (0.25, 0.5)
    trained = load(tmp_path / "teacher.safetensors").state_dict
    same = [torch.equal(value, measured[-1][key]) for key, value in trained.items() if key.endswith(".bias")]
    assert same
    assert all(same)


def test_labels_that_are_trained_on_must_be_there(without_labels: Dataset, teacher_file: Path, tmp_path: Path) -> None:
    for changes in ({}, {"unlabelled": without_labels.root / "images/val"}, {"strategy": "joint", "label_weight": 0}):
        settings = config(**changes | {"losses": {"soft": "auto"}})
        with pytest.raises(InputError, match="train: no image has a label"):
            distill(settings, without_labels, teacher_file, tmp_path / "out")


def test_soft_labels_need_none(without_labels: Dataset, teacher_file: Path, tmp_path: Path) -> None:
    settings = config(strategy="soft_labels", losses={"soft": "auto"})
    distill(settings, without_labels, teacher_file, tmp_path / "out")
    assert rows(tmp_path / "out")[-1]["train/box_loss"] == "0"


def test_a_strategy_is_checked_before_anything_is_written(
    tiny_data: Dataset, teacher_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="none are given"):
        distill(config(strategy="label_free"), tiny_data, teacher_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_content_of_the_unlabelled_images_is_in_the_fingerprint_and_their_path_is_not(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    def task(images: Path | None) -> tuple[Any, Any]:
        made = STAGE.task(Recipe(data=tiny_data.path, distill={"unlabelled": images}), tmp_path)  # type: ignore[arg-type]
        return made.config, made.digests["unlabelled"]

    images = tmp_path / "camera"
    shutil.copytree(tiny_data.root / "images/val", images)
    first = task(images)
    assert task(images.rename(tmp_path / "moved")) == first
    assert task(None)[1] == "none"
    next((tmp_path / "moved").iterdir()).unlink()
    assert task(tmp_path / "moved")[1] != first[1]
