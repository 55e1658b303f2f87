"""The host shim, which runs our CUDA kernels on the CPU."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Tests are no package under --import-mode=importlib; `host`, `oracle`, `mutations` ... are this folder's helpers.
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "shim"), str(HERE)]
from poison import poisoned  # noqa: E402, F401


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


def pytest_terminal_summary(terminalreporter: Any) -> None:
    import figures

    if line := figures.line():
        terminalreporter.write_line(f"kernels: {line}")
