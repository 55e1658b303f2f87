"""Write a YOLO data set: a folder that appears only when it is complete, splits, label rows and data.yaml."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from compress.data.dataset_yaml import SPLITS
from runtime.boxes import xyxy_to_xywh
from runtime.errors import UsageError
from runtime.files import unwritable

VAL_EVERY = 5
"""Every fifth image is for validation."""


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`. It becomes `target` when the block ends without an error, else it is removed.

    Raises UsageError when `target` exists and is not an empty folder, EdgestillError when it cannot be written.
    """
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UsageError(f"{target} exists and is not empty", "Name a new folder, or remove it first")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        temporary.chmod(0o755)
        yield temporary
        temporary.rename(target)
    except OSError as error:
        raise unwritable(target, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def split_of(index: int, images: int) -> str:
    """The split of image `index`. In a set that is too small for a fifth image, the last one is for validation; a
    single image is for training.
    """
    is_last_of_few = images < VAL_EVERY and 0 < index == images - 1
    return "val" if is_last_of_few or index % VAL_EVERY == VAL_EVERY - 1 else "train"


def label_text(boxes: NDArray[np.floating[Any]], size_hw: tuple[int, int]) -> str:
    """YOLO rows of boxes (n, 5) [class, x1, y1, x2, y2] in pixels."""
    height, width = size_hw
    values = xyxy_to_xywh(boxes[:, 1:].astype(np.float64)) / (width, height, width, height)
    return "".join(
        f"{int(class_id)} " + " ".join(f"{value:.6f}" for value in own) + "\n"
        for class_id, own in zip(boxes[:, 0], values.tolist(), strict=True)
    )


def write_data_yaml(folder: Path, names: Sequence[str], header: str = "") -> None:
    """Write `folder/data.yaml` for the splits in `images`; without a `val` there, `train` is both."""
    own = {split: f"images/{split}" for split in SPLITS if (folder / "images" / split).is_dir()}
    content = {"path": ".", "train": own["train"], "val": own["train"]} | own
    text = yaml.safe_dump(content | {"names": dict(enumerate(names))}, sort_keys=False, allow_unicode=True)
    (folder / "data.yaml").write_text(header + text, encoding="utf-8")
