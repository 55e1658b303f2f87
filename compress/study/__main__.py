"""One run of a study, in a process of its own: train, or find it done, then measure.

`python -m compress.study RUN STUDY PIPE`: the run's folder with its job.json, the study's folder with data and teacher,
and the descriptor of a pipe that the study keeps open as long as it wants the run.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.config import Recipe
from compress.data import Dataset
from compress.pipeline import stage
from compress.store import Outcome, alone_in, execute
from compress.study import GRACE_S, JOB, RESULT, STOPPED
from compress.study.figures import Run
from compress.study.judge import accuracy_of, judges_of, measured_once
from compress.training.resume import LAST
from runtime.child_process import end_when_closed
from runtime.errors import EdgestillError
from runtime.files import read_json


def main(folder: Path, study: Path) -> None:
    job = read_json(folder / JOB)
    recipe = Recipe.model_validate(job["recipe"])
    with alone_in(folder, wait=True):  # one may work there still, because it outlived the study that started it
        trained = execute(stage("distill").task(recipe, study), folder, log=lambda line: print(line, flush=True))
        judges = judges_of(recipe, study)
        of = {"training": trained.fingerprint, "judges": judges.sha256}
        measured_once(folder / RESULT, of, lambda: measured(job, recipe, trained, judges)._asdict())


def measured(job: Mapping[str, Any], recipe: Recipe, trained: Outcome, judges: Dataset) -> Run:
    """The accuracy of the last epoch's averaged weights on the images that judge."""
    accuracy = accuracy_of(trained.folder / LAST, recipe, judges)
    return Run(
        job["arm"], job["seed"], **accuracy, seconds_per_step=trained.figures["seconds"] / trained.figures["steps"]
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))  # so that what it started is ended, too
    end_when_closed(int(sys.argv[3]), GRACE_S)
    try:
        main(*map(Path, sys.argv[1:3]))
    except EdgestillError as error:
        sys.exit(str(error))
