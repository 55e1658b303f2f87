"""Distil a recipe in processes that are killed: `python -m tests.compress.kills RECIPE FOLDER SEED`.

Out, in the folder: `straight/`, the run of a process that nobody kills, and `killed/`, that of processes that are
killed one after the other, each at a random call within the next phase, until a last one may end. A moment is a call
and no time, so a seed kills at the same places however busy the machine is. Prints the moments.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from compress import store
from compress.pipeline import run_recipe
from compress.recipe import load_recipe
from compress.stages import distill
from compress.training import loop
from runtime.files import read_json, write_json

PHASES: dict[str, tuple[Any, str, int]] = {
    "unlabelled": (distill, "open_unlabelled", 1),
    "inheritance": (distill, "inherit_from", 1),
    "adapters": (distill, "fit_adapters", 1),
    "checks": (distill, "check_distillation", 1),
    "teacher": (distill, "teacher_accuracy", 1),
    "epoch": (loop.Trainer, "train_epoch", 2),
    "validation": (loop.Trainer, "_accuracy", 1),
    "files": (loop.Trainer, "_write_files", 2),
    "state": (loop, "save_state", 2),
    "comparison": (distill, "_compare_with_teacher", 1),
    "publication": (store, "_publish", 1),
}
"""Name -> the function within which a process is killed: its owner, its name, and which of its runs is meant."""
PART = 0.95
"""Part of a phase, as the run that nobody killed counted it, within which a process is killed."""


class Moment(NamedTuple):
    phase: str
    call: int


class Calls:
    """Counts the calls that are made within phases; kills this process at a moment, if one is given."""

    def __init__(self, moment: Moment | None = None) -> None:
        self.counts: Counter[str] = Counter()
        self._moment, self._active, self._entered = moment, [], Counter[str]()
        for phase, (owner, name, run) in PHASES.items():
            setattr(owner, name, self._counted(phase, getattr(owner, name), run))

    def _counted(self, phase: str, function: Callable[..., Any], run: int) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            self._entered[phase] += 1
            if self._entered[phase] != run:
                return function(*arguments, **named)
            self._active.append(phase)
            sys.setprofile(self._count)
            try:
                return function(*arguments, **named)
            finally:
                sys.setprofile(None)
                self._active.remove(phase)
                if self._active:
                    sys.setprofile(self._count)

        return counted

    def _count(self, _frame: Any, event: str, _argument: Any) -> None:
        if event not in ("call", "c_call"):
            return
        for phase in self._active:
            self.counts[phase] += 1
            if self._moment == (phase, self.counts[phase]):
                os.kill(os.getpid(), signal.SIGKILL)


def run_apart(work: Callable[[], None]) -> int:
    """Do the work in a fork of this process. Returns the signal that ended it, else its exit code."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def main(recipe: Path, folder: Path, seed: int) -> None:
    settings, counted = load_recipe(recipe), folder / "calls.json"

    def run(out: str, moment: Moment | None = None) -> None:
        calls = Calls(moment)
        run_recipe(settings, folder / out, until="distill", log=lambda _: None)
        write_json(counted, calls.counts)

    assert run_apart(lambda: run("straight")) == 0
    lengths, rng = read_json(counted), random.Random(seed)
    assert lengths.keys() == PHASES.keys()
    for phase in PHASES:
        moment = Moment(phase, rng.randint(1, int(PART * lengths[phase])))
        print(*moment, "of", lengths[phase], flush=True)
        assert run_apart(lambda moment=moment: run("killed", moment)) == signal.SIGKILL
    assert run_apart(lambda: run("killed")) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
