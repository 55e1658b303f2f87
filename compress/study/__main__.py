"""One run of a study, in a process of its own: train, or find it done, then measure.

`python -m compress.study RUN STUDY PIPE`: the run's folder with its job.json, the study's folder with data and teacher,
and the descriptor of a pipe that the study keeps open as long as it wants the run.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.config import Recipe
from compress.data import Dataset
from compress.data.unlabelled import UNLABELLED
from compress.pipeline import stage
from compress.store import Outcome, alone_in, execute
from compress.study import GRACE_S, JOB, RESULT, STOPPED
from compress.study.figures import Run
from compress.study.judge import accuracy_of, judges_of, measured_by, measured_once
from compress.training.resume import LAST
from runtime.child_process import end_when_closed
from runtime.errors import EdgestillError
from runtime.files import read_json, sha256

FRAMES = "frames"


def main(folder: Path, study: Path) -> None:
    job = read_json(folder / JOB)
    recipe = Recipe.model_validate(job["recipe"])
    with alone_in(folder, wait=True):  # one may work there still, because it outlived the study that started it
        trained = execute(stage("distill").task(recipe, study), folder, log=lambda line: print(line, flush=True))
        share_frames(trained.folder, study / FRAMES)
        judges = judges_of(recipe, study)
        of = measured_by(trained.fingerprint, judges)
        measured_once(folder / RESULT, of, lambda: measured(job, recipe, trained, judges)._asdict())


def share_frames(training: Path, store: Path) -> None:
    """Make the frames of an unlabelled video, which every run of a study extracts, hard links to one file each in
    `store`. Where the file system has none they stay as they are.
    """
    with suppress(OSError):
        for file in training.glob(f"{UNLABELLED}/*/*.jpg"):
            if file.stat().st_nlink == 1:
                store.mkdir(exist_ok=True)
                _share(file, store / f"{sha256(file)}.jpg")


def _share(file: Path, kept: Path) -> None:
    """Make both paths one file, `kept` if it is there already."""
    try:
        os.link(file, kept)
    except FileExistsError:
        link = file.with_suffix(".link")
        link.unlink(missing_ok=True)
        os.link(kept, link)
        link.replace(file)


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
