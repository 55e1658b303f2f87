from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from compress.compute.numerics import require_finite
from runtime.errors import EdgestillError

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


def test_a_bad_loss_names_its_term_and_batch() -> None:
    terms = torch.tensor([[1.0, 2.0], [1.0, float("nan")], [float("inf"), 1.0]])
    with pytest.raises(EdgestillError, match=r"epoch 3, batch 12: obj = nan"):
        require_finite(terms, ("box", "obj"), epoch=2, first_batch=10)


def test_finite_losses_pass() -> None:
    require_finite(torch.ones(2, 3), ("box", "obj", "cls"), epoch=0, first_batch=0)
