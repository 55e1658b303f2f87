"""Load a foreign ONNX file first in a child process with limits on memory and time.

Files that pass every checker have crashed ONNX Runtime while it loads them, or made it allocate gigabytes for a file of
a hundred bytes. Here only the child crashes. This protects from broken files and does not check the model. Files with
an edgestill card skip it, because edgestill exported them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from runtime.child_process import answer, limit, refusal
from runtime.errors import InputError, one_line
from runtime.files import is_utf8

MEMORY_BYTES = 6 << 30
CPU_SECONDS = 60
REMEDY = "Do not use this file; export it again from a checkpoint that you trust"


def load_in_child(path: Path) -> None:
    """Raises InputError when the file does not load within the limits."""
    statement = "from runtime.backends.onnx_child_load import main; main()"
    if reason := refusal(statement, os.fsencode(path.resolve()), CPU_SECONDS):
        raise InputError(f"{path}: {reason}", REMEDY)


def main() -> None:
    """The child: accepts the file whose path is on standard input when it loads."""
    path = os.fsdecode(sys.stdin.buffer.read())
    limit(MEMORY_BYTES, CPU_SECONDS)
    reason = load_error(path if is_utf8(Path(path)) else Path(path).read_bytes())
    answer(reason and f"ONNX Runtime cannot load it: {reason}")


def load_error(model: str | bytes) -> str:
    """ONNX Runtime's error on loading the file of this path, or these bytes; empty when it loads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's errors share no other base
        return one_line(error)
    return ""
