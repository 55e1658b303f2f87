from __future__ import annotations

import subprocess
import sys

FLUSH = """
import torch
torch.set_num_threads(2)
from compress.compute.numerics import all_threads_flush, flush_denormals
assert not all_threads_flush() if {late} else True
print(flush_denormals(print))
"""


def flushed(*, late: bool) -> list[str]:
    """The output of a fresh process; `late` starts torch's threads before the flush."""
    done = subprocess.run([sys.executable, "-c", FLUSH.format(late=late)], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_denormals_are_flushed_on_all_threads_of_a_fresh_process() -> None:
    assert flushed(late=False) == ["True"]


def test_a_flush_after_the_threads_have_started_is_told() -> None:
    warning, covered = flushed(late=True)
    assert "denormal" in warning
    assert covered == "False"
