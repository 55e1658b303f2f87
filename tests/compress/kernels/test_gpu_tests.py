"""The tests for a GPU expect what the host shim gives, so that their first run on a GPU tells of the GPU alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.mutation
@pytest.mark.timeout(1800)
def test_what_is_expected_of_a_gpu_holds_on_the_shim(shim) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-W",
        "ignore",
        "-p",
        "no:cacheprovider",
        "tests/gpu/test_on_gpu.py",
    ]
    on_shim = os.environ | {"EDGESTILL_TESTED_ON": "shim"}
    done = subprocess.run(command, cwd=REPOSITORY, env=on_shim, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
