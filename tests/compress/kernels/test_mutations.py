"""Every fault that is planted in a kernel must be seen; `make kernels` runs this."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from mutations import CAUGHT, FAULTS, SHRUNK, findings, texts
from shim import figures

from compress.kernels.losses import FUSED

SCRIPT = Path(__file__).resolve().parent / "mutations.py"


pytestmark = pytest.mark.mutation


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_caught(shim, name):
    """In a process of its own, since a fault may crash it."""
    texts(FAULTS[name])  # the pattern is there
    done = subprocess.run([sys.executable, SCRIPT, name], capture_output=True, text=True, timeout=300)
    caught = done.returncode == CAUGHT or done.returncode < 0
    figures.faults["caught" if caught else "survived"] += 1
    assert caught, done.stdout + done.stderr


@pytest.mark.parametrize("loss", [*FUSED, "rescale"])
def test_nothing_is_found_where_no_fault_is_planted(shim, monkeypatch, loss):
    for (module, name), value in SHRUNK.items():
        monkeypatch.setattr(module, name, value)  # undone afterwards
    assert list(findings(loss, {})) == []
