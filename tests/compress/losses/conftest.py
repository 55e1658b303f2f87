"""Head maps, targets and figures of the YOLOv5 v7.0 reference run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

ANCHORS_PX = (((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)))
STRIDES = (8, 16, 32)


class TrainReference(NamedTuple):
    raw: list[Tensor]
    targets: Tensor
    arrays: dict[str, np.ndarray]
    figures: dict


@pytest.fixture(scope="session")
def anchors_grid() -> Tensor:
    return torch.tensor(ANCHORS_PX).float() / torch.tensor(STRIDES).view(3, 1, 1)


@pytest.fixture(scope="session")
def train_reference(reference: Path) -> TrainReference:
    with np.load(reference / "train_reference.npz") as file:
        arrays = dict(file)
    figures = json.loads((reference / "train_reference.json").read_text())
    raw = [torch.from_numpy(arrays[f"train_raw_P{level}"]) for level in (3, 4, 5)]
    return TrainReference(raw, torch.from_numpy(arrays["targets"]), arrays, figures)
