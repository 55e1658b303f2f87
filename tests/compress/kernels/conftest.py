"""The host shim, which runs our CUDA kernels on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from shim.poison import poisoned  # noqa: F401


@pytest.fixture(scope="session")
def shim() -> Any:
    """The module shim/host.py."""
    from shim import host

    if host.compiler() is None:
        pytest.skip("no C++ compiler to run kernels on the CPU; install g++ or set CXX")
    return host


@pytest.fixture
def shim_device(shim: Any) -> Callable[..., Any]:
    """Makes a `ShimDevice`: `shim_device(seed=1, facts=A100)`."""
    from shim.device import ShimDevice

    return ShimDevice


def pytest_terminal_summary(terminalreporter: Any) -> None:
    from shim import figures

    if line := figures.line():
        terminalreporter.write_line(f"kernels: {line}")
