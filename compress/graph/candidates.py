"""The number of candidates, rows that enter NMS, and how often it is too small on images.

The number follows from the number of rows: a view of half the width and height holds a quarter of the rows and of the
objects. It is not fitted to images: whether any of them shows a crowd says nothing about what the camera will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.graph.batches import filled_batches
from compress.graph.columns import TENSORRT_MOST
from runtime.detector import Placement
from runtime.image import letterbox, read_image

ROWS_PER_CANDIDATE = 25
"""1024 candidates at 640 pixels; crowds of 50 to 110 objects had 440 to 800 rows over a confidence of 0.25 there."""
FEWEST, STEP = 320, 64


@dataclass(frozen=True)
class Validation:
    """Images with their id in `ground_truth`, a COCO dictionary with category id = class index."""

    images: Sequence[tuple[int, Path]]
    ground_truth: Mapping[str, Any]


@dataclass(frozen=True)
class Room:
    """Images on which a limit was reached above `conf`, so that boxes may be missing, and the highest cutoff of all."""

    images: int
    conf: float
    reached: int
    highest_cutoff: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def canvas_of(path: Path, size_hw: tuple[int, int]) -> tuple[np.ndarray, Placement]:
    """An image file -> uint8 BGR canvas (1,H,W,3) by the runtime's letterbox, and where the image lies on it."""
    frame = read_image(path)
    image, gain, pad_wh = letterbox(frame, size_hw)
    height, width = frame.shape[:2]
    return image[None], Placement(gain, pad_wh, (height, width))


def candidates_for(rows: int, wanted: int = 0) -> int:
    """The number of candidates of a head with `rows` rows: `wanted`, or where that is 0 one for each 25 rows."""
    usual = max(FEWEST, STEP * -(-rows // (ROWS_PER_CANDIDATE * STEP)))
    return min(wanted or min(usual, TENSORRT_MOST - 1), rows)


def measure_room(
    cutoffs_of: Callable[[np.ndarray], np.ndarray], sources: Iterable[np.ndarray], batch: int | None, conf: float
) -> Room:
    """How the limits of NMS fit these inputs (1,...) of the graph; `cutoffs_of` runs it on `batch` of them."""
    batches = filled_batches(sources, batch)
    cutoffs = [float(value) for source, count in batches for value in cutoffs_of(source)[:count]]
    return Room(len(cutoffs), conf, sum(value > conf for value in cutoffs), max(cutoffs, default=0.0))
