"""A data set so small that a training on it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from compress.data import Dataset, index_dataset, load_data


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny networks gain nothing from a second thread, and much of it is lost if other tests run beside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """10 training and 4 validation images of 64x48 pixels with one or two squares, red or green."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for index in range(count):
            _draw_example(root, split, index, rng)
    text = "path: .\ntrain: images/train\nval: images/val\nnames: [red, green]\n"
    (root / "data.yaml").write_text(text)
    return index_dataset(load_data(root / "data.yaml"))


def _draw_example(root: Path, split: str, index: int, rng: np.random.Generator) -> None:
    image = rng.integers(90, 130, (48, 64, 3), dtype=np.uint8)
    rows = []
    for class_id in rng.integers(0, 2, rng.integers(1, 3)):
        side, (x, y) = int(rng.integers(10, 20)), rng.integers(0, (44, 28))
        image[y : y + side, x : x + side] = (0, 0, 255) if class_id == 0 else (0, 255, 0)
        rows.append(f"{class_id} {(x + side / 2) / 64} {(y + side / 2) / 48} {side / 64} {side / 48}")
    for kind in ("images", "labels"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(root / "images" / split / f"{index}.png"), image)
    (root / "labels" / split / f"{index}.txt").write_text("\n".join(rows))
