"""A small made-up dataset that a test may break."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

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
