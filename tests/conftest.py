"""For all tests: one thread, denormal numbers kept, the folder with real data, and how processes share the work."""

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

WORKER_BYTES = 2 * 10**9
"""The most that a process of tests takes, with the commands that it starts."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Processes of `pytest -n auto`: one for each core that may be used, if the memory is there."""
    import psutil

    from runtime.machine import usable_cores

    return max(1, min(usable_cores(), psutil.virtual_memory().available // WORKER_BYTES))


def pytest_configure(config: pytest.Config) -> None:
    """Each of several processes keeps to its share of the CPUs: libraries start a thread for every CPU that they see,
    and threads of two processes on one CPU wait for each other.
    """
    worker = getattr(config, "workerinput", None)
    if worker and hasattr(os, "sched_setaffinity"):
        cpus, number = sorted(os.sched_getaffinity(0)), int(worker["workerid"].removeprefix("gw"))
        os.sched_setaffinity(0, cpus[number :: worker["workercount"]] or [cpus[number % len(cpus)]])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Several processes begin with the files that hold slow tests: at the end one would keep a process busy alone."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def commands_without_coverage() -> None:
    """`coverage run` measures the processes that run tests; the commands that these start would only become slower."""
    os.environ.pop("COVERAGE_PROCESS_CONFIG", None)


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
