"""The number of processes of one training, and which of them this is, as torchrun sets them."""

from __future__ import annotations

import os


def process_count() -> int:
    """The number of processes that were started together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_index() -> int:
    """The number of this process, from 0; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def is_first_process() -> bool:
    """Whether this process is the one that logs and writes files: the only one, or the first that torchrun started."""
    return process_index() == 0
