"""One of two processes of a training that ends before its last epoch: `python -m ...two_endings HOW FOLDER`.

The process says how it ended in its last line, as the command line does; in a further line, that threads of its
connections still run when the interpreter ends, which may abort it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from compress.training import loop
from compress.training.loop import Trainer, run_job
from runtime.errors import EdgestillError

from . import toys

FIRST = os.environ["RANK"] == "0"


def fail(kind: type[BaseException], *text: str) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> Any:
        raise kind(*text)

    return failing


def worse_each_time() -> Callable[..., Any]:
    fitness = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    figures = SimpleNamespace(precision=0.5, recall=0.5, map50=0.5, map50_95=0.5)
    return lambda *_, **__: SimpleNamespace(yolo=figures, loss=None, fitness=next(fitness))


ENDINGS: dict[str, Callable[[], None]] = {
    "validation": lambda: setattr(loop, "evaluate", fail(EdgestillError, "an image cannot be read")),
    "bug in validation": lambda: setattr(loop, "evaluate", fail(ValueError, "a bug")),
    "step of the second": lambda: None if FIRST else setattr(Trainer, "step", fail(EdgestillError, "not finite")),
    "step of the first": lambda: setattr(Trainer, "step", fail(EdgestillError, "not finite")) if FIRST else None,
    "interrupt": lambda: setattr(loop, "evaluate", fail(KeyboardInterrupt)),
    "early stop": lambda: setattr(loop, "evaluate", worse_each_time()),
}


def tell_open_connections() -> None:
    threads = [Path(task, "comm").read_text().strip() for task in Path("/proc/self/task").glob("*")]
    if connections := [name for name in threads if "gloo" in name]:
        print("still running:", *connections)


def main(how: str, out: Path) -> str:
    ENDINGS[how]()
    job = toys.trainer(toys.config(epochs=9, val_interval=1, patience=2), out).job
    try:
        return f"epochs {run_job(job, device='cpu', log=toys.quiet).epochs}"
    except EdgestillError as error:
        return str(error)


if __name__ == "__main__":
    atexit.register(tell_open_connections)  # runs after what the training registers
    print(main(sys.argv[1], Path(sys.argv[2])))
