"""Trainings small enough to look into: a network of scale p on images of 64 pixels that are made, not read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from compress.config import AugmentConfig, DistillConfig, OptimizerConfig
from compress.data.image_store import ImageStore
from compress.data.loader import Batch
from compress.data.train_dataset import epoch_order
from compress.models import Architecture, YOLOv5
from compress.training.joint import join
from compress.training.loop import Job, Trainer
from compress.training.objective import Objective, detection_loss
from compress.training.teacher import Teacher, build_losses

NAMES = ("bolt", "nut")
SIDE = 64
LABELS = np.array([[0, 0.3, 0.3, 0.25, 0.2], [1, 0.65, 0.6, 0.3, 0.4]], np.float32)
SGD = {"name": "sgd", "lr0": 0.01, "warmup_epochs": 0}


class Noise:
    """A data set of `count` noise images that all have the same labels; `mosaics` says which were to be mosaics."""

    def __init__(self, count: int) -> None:
        self.count = self.labelled = count
        self.imgsz = SIDE
        self.stores: tuple[ImageStore, ...] = ()
        self.mosaics: list[bool] = []

    def __len__(self) -> int:
        return self.count

    def order(self, epoch: int) -> NDArray[np.int64]:
        return epoch_order(0, epoch, self.count)

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        self.mosaics.append(mosaic)
        rng = np.random.default_rng([epoch, index])
        return rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), LABELS


def quiet(_line: str) -> None: ...


def config(*, optimizer: dict[str, Any] | None = None, **changes: Any) -> DistillConfig:
    base = {"epochs": 4, "batch": 4, "imgsz": SIDE, "workers": 0, "tensorboard": False, "losses": {"feat_mse": 0.1}}
    optimizer_config = OptimizerConfig.model_validate(SGD | (optimizer or {}))
    return DistillConfig.model_validate(base | {"optimizer": optimizer_config, "augment": AugmentConfig()} | changes)


def network(scale: str = "p", seed: int = 0) -> YOLOv5:
    torch.manual_seed(seed)
    made = YOLOv5(Architecture.of_scale(scale, NAMES))
    made.init_detect_bias()
    return made


def trainer(
    settings: DistillConfig, out: Path, *, images: int = 8, distils: bool = False, seed: int = 0, device: str = "cpu"
) -> Trainer:
    """A training of `images` images that is about to take its first batch, joint where the settings say so."""
    student, network_of_teacher = network(seed=seed), network("n", seed=1) if distils else None
    teacher = Teacher(network_of_teacher, device, precision=settings.precision) if network_of_teacher else None
    losses = build_losses(student, teacher, settings) if teacher else {}
    objective = Objective(student, detection_loss(student, settings), losses)
    if network_of_teacher and settings.rules.trains_teacher:
        teacher = None
        join(objective, network_of_teacher, settings)
    job = Job(settings, objective, cast(Any, Noise(images)), (), out, teacher, settings.teacher_rate)
    return Trainer(job, device, quiet)


def batch(number: int, size: int = 4) -> Batch:
    images = torch.randint(256, (size, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(number))
    rows = [[image, *row] for image in range(size) for row in LABELS.tolist()]
    return Batch(images.to(torch.uint8), torch.tensor(rows), tuple(range(size)))
