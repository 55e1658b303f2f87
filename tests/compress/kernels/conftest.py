"""The host shim, which runs our CUDA kernels on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

# Tests are no package under --import-mode=importlib; `host`, `oracle`, `mutations` ... are this folder's helpers.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "shim"), str(HERE)]


@pytest.fixture(scope="session")
def shim() -> Any:
    """The module shim/host.py."""
    import host

    if host.compiler() is None:
        pytest.skip("no C++ compiler to run kernels on the CPU; install g++ or set CXX")
    return host


@pytest.fixture
def shim_device(shim: Any) -> Callable[..., Any]:
    """Makes a `ShimDevice`: `shim_device(seed=1, facts=A100)`."""
    from device import ShimDevice

    return ShimDevice


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import figures

    if line := figures.line():
        terminalreporter.write_line(f"kernels: {line}")
