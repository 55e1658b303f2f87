"""Small made-up data sets that a test may break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from compress.config import AugmentConfig
from compress.data import load_data
from compress.data.dataset import Sample
from compress.data.index import index_dataset
from compress.data.loader import Batch
from compress.data.train_dataset import MixedDataset, TrainDataset

PLAIN = AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0, translate=0, scale=0, fliplr=0, mosaic=0)
YAML = "path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n"


def write_image(path: Path, width: int = 64, height: int = 48, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8))
    return path


def write_labels(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def folder_hash(folder: Path) -> str:
    """Names, bytes and modification times of everything below a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        digest.update(f"{file.relative_to(folder)} {file.stat().st_mtime_ns}".encode())
        digest.update(file.read_bytes() if file.is_file() else b"")
    return digest.hexdigest()


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four training and two validation images with one box each; returns the data.yaml."""
    root = tmp_path / "set"
    for split, count in (("train", 4), ("val", 2)):
        for i in range(count):
            write_image(root / f"images/{split}/{i}.png", seed=i + 10 * (split == "val"))
            write_labels(root / f"labels/{split}/{i}.txt", f"{i % 2} 0.5 0.5 0.4 0.3\n")
    (root / "data.yaml").write_text(YAML)
    return root / "data.yaml"


@pytest.fixture
def write_yaml(dataset: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        dataset.write_text(text)
        return dataset

    return write


@pytest.fixture
def samples(tmp_path: Path) -> tuple[Sample, ...]:
    """Eleven images of three shapes."""
    shapes = ((64, 48), (48, 64), (80, 80))
    for i in range(11):
        write_image(tmp_path / f"images/{i:02d}.png", *shapes[i % 3], seed=i)
        write_labels(tmp_path / f"labels/{i:02d}.txt", "0 0.5 0.5 0.5 0.4\n1 0.3 0.3 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("train: images\nval: images\nnames: [a, b]\n")
    return index_dataset(load_data(tmp_path / "data.yaml"), ("train",)).splits["train"].samples


def assert_equal(left: list[Batch], right: list[Batch]) -> None:
    assert [batch.indices for batch in left] == [batch.indices for batch in right]
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


def mixed(samples: tuple[Sample, ...], labelled: int, config: AugmentConfig = PLAIN) -> MixedDataset:
    """The first samples with their labels, the others without."""
    other = [replace(sample, labels=np.zeros((0, 5), np.float32)) for sample in samples[labelled:]]
    return MixedDataset(TrainDataset(samples[:labelled], 64, config), TrainDataset(other, 64, config, has_labels=False))
