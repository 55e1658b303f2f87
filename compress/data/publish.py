"""A folder that appears whole: it is filled beside its goal and renamed at the end."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from runtime.errors import UsageError
from runtime.files import unwritable


@contextmanager
def new_folder(goal: Path) -> Iterator[Path]:
    """A temporary folder that becomes `goal` when the block ends well and is removed when it does not.

    Raises UsageError where `goal` exists and is not an empty folder, EdgestillError where the disk refuses.
    """
    goal = goal.resolve()
    if goal.exists() and (not goal.is_dir() or any(goal.iterdir())):
        raise UsageError(f"{goal} exists and is not empty", "Name a new folder, or remove it first")
    temporary: Path | None = None
    try:
        goal.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{goal.name}-", dir=goal.parent))
        temporary.chmod(0o755)
        yield temporary
        temporary.rename(goal)
    except OSError as error:
        raise unwritable(goal, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
