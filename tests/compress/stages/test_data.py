from __future__ import annotations

import os
from pathlib import Path

from compress.config import NoSettings, Recipe
from compress.data import INDEX, Dataset, load_data
from compress.stages.data import STAGE, run
from compress.store import content_digest, fingerprint


def test_the_index_is_published(tiny_data: Dataset, tmp_path: Path) -> None:
    lines: list[str] = []
    figures = run(NoSettings(), load_data(tiny_data.path), tmp_path, lines.append)
    assert figures == {"classes": 2, "train_images": 10, "val_images": 4}
    found = Dataset.load(tmp_path / INDEX, tiny_data.root)
    assert found.sha256 == tiny_data.sha256
    assert (len(found.splits["val"].samples), found.splits["val"].boxes) == (4, tiny_data.splits["val"].boxes)
    assert found.splits["val"].problems == ()
    assert lines == []


def test_an_image_that_was_touched_is_indexed_again_and_changes_no_later_stage(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    recipe, image = Recipe(data=tiny_data.path), tiny_data.splits["val"].samples[0].image
    before = fingerprint(STAGE.task(recipe, tmp_path))
    run(NoSettings(), load_data(tiny_data.path), tmp_path / "a", print)
    os.utime(image, (1, 1))
    assert fingerprint(STAGE.task(recipe, tmp_path)) != before
    run(NoSettings(), load_data(tiny_data.path), tmp_path / "b", print)
    assert content_digest(tmp_path / "a") == content_digest(tmp_path / "b")
