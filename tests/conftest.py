"""What the tests share: where the real data lies, and small made-up data where it does not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images, checkpoints and reference numbers; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("EDGESTILL_SHARED", REPOSITORY.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"real data not found in {folder.name}/; set EDGESTILL_SHARED to its folder")
    return folder


@pytest.fixture(scope="session")
def reference(shared: Path) -> Path:
    return shared / "yolov5" / "reference"


@pytest.fixture(scope="session")
def weights(shared: Path) -> Path:
    return shared / "yolov5" / "weights" / "yolov5n.pt"
