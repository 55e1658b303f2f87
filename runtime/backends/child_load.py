"""Load a foreign model file first in a child process with limits on memory and time.

Files that pass every checker have crashed ONNX Runtime while it loads them, or made it allocate gigabytes for a file of
a hundred bytes. Here only the child crashes. This protects from broken files and does not check the model. Files with
an edgestill card skip it, because edgestill exported them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from pkgutil import resolve_name

from runtime.child_process import answer, limit, refusal
from runtime.errors import InputError

MEMORY_BYTES = 6 << 30
CPU_SECONDS = 60
REMEDY = "Do not use this file; export it again from a checkpoint that you trust"


def load_in_child(path: Path, loader: str) -> None:
    """Load with `loader`, "module:function", which takes the path and returns why the file does not load, or "".

    Raises InputError when it does not load within the limits.
    """
    statement = f"from runtime.backends.child_load import main; main({loader!r})"
    if reason := refusal(statement, os.fsencode(path.resolve()), CPU_SECONDS):
        raise InputError(f"{path}: {reason}", REMEDY)


def main(loader: str) -> None:
    """The child: accepts the file whose path is on standard input when it loads."""
    path = Path(os.fsdecode(sys.stdin.buffer.read()))
    limit(MEMORY_BYTES, CPU_SECONDS)
    answer(resolve_name(loader)(path))
