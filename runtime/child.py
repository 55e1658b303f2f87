"""A fresh interpreter for work that may crash, leak or never end, so that the caller's process does none of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_child(
    statement: str, *, text: str = "", folder: Path | None = None, timeout_s: float | None = None
) -> subprocess.CompletedProcess[str]:
    """Run one Python statement that finds this package and its libraries, with `text` on its standard input.

    It never imports from the folder that the user happens to be in. Raises subprocess.TimeoutExpired.
    """
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", statement],
        input=text,
        text=True,
        errors="replace",
        capture_output=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())},
        cwd=folder or Path(__file__).parent.parent,
        timeout=timeout_s,
        check=False,
    )


def _import_path() -> list[str]:
    own = str(Path(__file__).resolve().parent.parent)
    return [own, *(entry for entry in sys.path if entry and Path(entry).is_dir() and entry != own)]


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What the child said last on its standard error."""
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else "it said nothing"
