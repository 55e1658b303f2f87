"""The toy models, loaded by path because tests are no package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def toys() -> ModuleType:
    spec = importlib.util.spec_from_file_location("runtime_toys", Path(__file__).with_name("toys.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def white_frame():
    import numpy as np

    return np.full((480, 640, 3), 255, np.uint8)
