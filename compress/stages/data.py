"""Data: decode every image once, and keep the index for all later stages.

In: data.yaml. Out: `index.json`: path, size, digest and labels of each usable image, and the problems of the others.
"""

from __future__ import annotations

from pathlib import Path

from compress.config import NoSettings
from compress.data import INDEX, DataConfig, index_dataset, load_data
from compress.data.index import JUDGES, quick_digest
from compress.log import Log
from compress.stages import Figures, Stage


def run(_: NoSettings, data: DataConfig, out: Path, log: Log) -> Figures:
    """Index the train and val splits of `data`.

    Raises InputError when one of them has no usable image, or val no label; whoever trains on labels asks for them.
    """
    dataset = index_dataset(data, labelled=JUDGES)
    for split, index in dataset.splits.items():
        for problem in index.problems:
            log(f"{split}: skipped {problem}")
    dataset.save(out / INDEX)
    counts = {f"{split}_images": len(index.samples) for split, index in dataset.splits.items()}
    return {"classes": len(data.names)} | counts


STAGE = Stage(
    "data",
    settings=NoSettings,
    inputs=lambda recipe, _: load_data(recipe.data),
    run=run,
    digests={"data": lambda recipe: quick_digest(load_data(recipe.data))},
)
