"""For all tests: one thread, denormal numbers kept, and the folder with real data, images and checkpoints."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# before torch is imported, here and in the commands that tests start: tiny networks gain nothing from a second thread,
# and if other work runs beside, two threads that wait for each other took a 40-second pipeline over 500 seconds
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command sets it, for tests that want two


@pytest.fixture(autouse=True)
def denormals_kept() -> Iterator[None]:
    """Training and validation have the processor flush denormal numbers; the next test, hypothesis too, wants them."""
    yield
    if "torch" in sys.modules:  # tests of the runtime alone never load it
        sys.modules["torch"].set_flush_denormal(False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images, checkpoints and reference numbers; tests that need it skip if it is absent."""
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


@pytest.fixture
def no_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO cannot be imported, as where it is not installed."""
    from runtime import backends

    monkeypatch.delitem(sys.modules, "runtime.backends.openvino", raising=False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delattr(backends, "openvino", raising=False)
