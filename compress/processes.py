"""The processes of one training and which of them this is, as torchrun sets them, and those that share the machine."""

from __future__ import annotations

import os

from runtime.errors import UsageError

JOBS = "EDGESTILL_JOBS"
"""Environment variable: the number of trainings that a study runs at a time."""


def process_count() -> int:
    """The number of processes that were started together; 1 without torchrun."""
    return _number("WORLD_SIZE", 1)


def process_index() -> int:
    """The number of this process, from 0; 0 without torchrun."""
    return _number("RANK", 0)


def sharing_count() -> int:
    """The number of trainings' processes that share this machine's cores and memory, this one included: those that
    torchrun started here, or the jobs of a study.
    """
    return _number("LOCAL_WORLD_SIZE", 1) * _number(JOBS, 1)


def is_first_process() -> bool:
    """Whether this process is the one that logs and writes files: the only one, or the first that torchrun started."""
    return process_index() == 0


def _number(variable: str, default: int) -> int:
    """Raises UsageError when the environment variable is no whole number."""
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise UsageError(f"{variable} is {text!r}, expected a whole number", "Start several processes by torchrun")
    return int(text)
