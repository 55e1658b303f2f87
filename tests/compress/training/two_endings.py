"""One of two processes of a training that ends before its last epoch: `python -m ...two_endings HOW FOLDER`.

The process says how it ended in its last line, as the command line does; in a further line, that its connections are
still open when the interpreter ends, which may abort it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed

from compress.training import loop
from compress.training.loop import Trainer, run_job
from runtime.errors import EdgestillError

from . import toys

FIRST = os.environ["RANK"] == "0"


def fail(error: BaseException) -> Callable[..., Any]:
    def failing(*_: object, **__: object) -> Any:
        raise error

    return failing


def worse_each_time() -> Callable[..., Any]:
    fitness = iter([0.5, 0.4, 0.3, 0.2, 0.1])
    figures = SimpleNamespace(precision=0.5, recall=0.5, map50=0.5, map50_95=0.5)
    return lambda *_, **__: SimpleNamespace(yolo=figures, loss=None, fitness=next(fitness))


ENDINGS: dict[str, Callable[[], None]] = {
    "validation": lambda: setattr(loop, "evaluate", fail(EdgestillError("an image cannot be read"))),
    "bug in validation": lambda: setattr(loop, "evaluate", fail(ValueError("a bug"))),
    "step of the second": lambda: None if FIRST else setattr(Trainer, "step", fail(EdgestillError("not finite"))),
    "step of the first": lambda: setattr(Trainer, "step", fail(EdgestillError("not finite"))) if FIRST else None,
    "interrupt": lambda: setattr(loop, "evaluate", fail(KeyboardInterrupt())),
    "early stop": lambda: setattr(loop, "evaluate", worse_each_time()),
}


def tell_open_connections() -> None:
    if torch.distributed.is_initialized():
        print("connections are open")


def main(how: str, out: Path) -> str:
    ENDINGS[how]()
    made = toys.trainer(toys.config(epochs=9, val_interval=1, patience=2), out)
    try:
        return f"epochs {run_job(made.job, device='cpu', log=toys.quiet).epochs}"
    except EdgestillError as error:
        return str(error)


if __name__ == "__main__":
    atexit.register(tell_open_connections)  # runs after what the training registers
    print(main(sys.argv[1], Path(sys.argv[2])))
