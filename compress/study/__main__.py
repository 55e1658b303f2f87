"""One run of a study, in a process of its own: train, or find it done, then measure.

`python -m compress.study RUN STUDY`: the run's folder with its job.json, and the study's folder with data and teacher.
"""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from compress.config import Recipe
from compress.data import Dataset, load_data
from compress.data.dataset import Sample
from compress.evaluate import evaluate
from compress.models import load_model
from compress.pipeline import stage
from compress.store import Outcome, execute
from compress.study import JOB, RESULT, split_index
from compress.study.figures import Run
from runtime.errors import EdgestillError
from runtime.files import write_json


def main(folder: Path, study: Path) -> None:
    job = json.loads((folder / JOB).read_text(encoding="utf-8"))
    recipe = Recipe.model_validate(job["recipe"])
    with _alone_in(folder):
        trained = execute(stage("distill").task(recipe, study), folder, log=lambda line: print(line, flush=True))
        judges = Dataset.load(split_index(study, recipe.study.split), load_data(recipe.data).root)
        of = {"training": trained.fingerprint, "judges": judges.sha256}
        if not _is_of(folder / RESULT, of):
            run = measured(job, recipe, trained, judges.splits[recipe.study.split].samples)
            write_json(folder / RESULT, {"of": of, "run": run._asdict()})


def _is_of(result: Path, of: Mapping[str, str]) -> bool:
    """Whether the file is there and tells of this training and these images."""
    return result.is_file() and json.loads(result.read_text(encoding="utf-8")).get("of") == of


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Wait for a process that works there still, because it outlived the study that started it."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def measured(job: Mapping[str, Any], recipe: Recipe, trained: Outcome, judges: Sequence[Sample]) -> Run:
    """The accuracy of the last epoch's averaged weights on the images that judge."""
    config = recipe.distill
    model = load_model(trained.folder / "last.safetensors")
    found = evaluate(model, judges, imgsz=config.imgsz, device=recipe.device, coco=False).yolo
    return Run(job["arm"], job["seed"], found.map50_95, found.map50, trained.seconds / trained.figures["steps"])


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:3]))
    except EdgestillError as error:
        sys.exit(str(error))
