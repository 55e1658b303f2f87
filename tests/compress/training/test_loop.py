from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from compress.config import PRESETS, LossConfig, OptimizerConfig, TrainConfig
from compress.data.loader import Batch
from compress.models.checkpoint import load_model
from compress.training.loop import Job, Trainer
from compress.training.objective import Objective, detection_loss


def sums(model: torch.nn.Module, keys: Any) -> dict[str, list[float]]:
    """[sum, L2 norm] in float64, as the reference has them."""
    state = model.state_dict()
    return {key: [state[key].double().sum().item(), state[key].double().norm().item()] for key in keys}


@pytest.fixture
def trainer(weights: Path, tmp_path: Path) -> Trainer:
    """YOLOv5's optimiser without warm-up or accumulation, on the official yolov5n."""
    optimizer = PRESETS["yolov5-low"]["optimizer"] | {"warmup_epochs": 0, "nominal_batch": 0}
    config = TrainConfig(
        epochs=10, batch=2, imgsz=640, optimizer=OptimizerConfig(**optimizer), loss=LossConfig(), tensorboard=False
    )
    model = load_model(weights).train().requires_grad_(True)
    six_images = cast(Any, [None] * 6)  # only their number is asked for
    job = Job(config, Objective(model, detection_loss(model, config)), six_images, (), tmp_path)
    return Trainer(job, "cpu", print)


def test_three_sgd_steps_with_ema_follow_the_reference(trainer: Trainer, reference: Path) -> None:
    arrays = np.load(reference / "train_reference.npz")
    expected = json.loads((reference / "train_reference.json").read_text())["sgd_3_steps"]
    batch = Batch(torch.from_numpy(arrays["imgs_u8"]), torch.from_numpy(arrays["targets"]).float(), (0, 1))
    model = trainer.objective.model
    groups = [[len(g["params"]), g["weight_decay"], sum(p.numel() for p in g["params"])] for g in
              trainer.optimizer.param_groups]  # fmt: skip
    assert groups == [[count, decay, numel] for count, decay, _, _, _, numel in
                      expected["groups_count_wd_lr_mom_nesterov_numel"]]  # fmt: skip
    model.train()
    for number, step in enumerate(expected["steps"]):
        terms = trainer.train_batch(batch, number)
        assert terms.tolist() == pytest.approx(step["items"], rel=2e-5)
        for found, wanted in ((model, step["params"]), (trainer.ema.module, step["ema"])):
            for key, pair in sums(found, wanted).items():
                assert pair == pytest.approx(wanted[key], rel=1e-5, abs=1e-4), key
