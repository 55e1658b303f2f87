"""Fixtures of the tests on a GPU, and the largest errors that they found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from shim.poison import poisoned  # noqa: F401

LARGEST: dict[tuple[str, str], tuple[float, float]] = {}
"""(loss, dtype) -> largest relative error of the loss and of a gradient."""


@pytest.fixture
def note() -> Callable[[str, torch.dtype, tuple[float, float]], None]:
    """Keeps the largest errors for the end of the log."""

    def keep(name: str, dtype: torch.dtype, errors: tuple[float, float]) -> None:
        known = LARGEST.get((name, str(dtype)), (0.0, 0.0))
        LARGEST[name, str(dtype)] = (max(known[0], errors[0]), max(known[1], errors[1]))

    return keep


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for (name, dtype), (loss, gradient) in sorted(LARGEST.items()):
        terminalreporter.write_line(f"largest error {name:12} {dtype:14} loss {loss:.1e}  gradient {gradient:.1e}")
