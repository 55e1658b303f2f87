"""The number of candidates, rows that enter NMS, and how often it is too small on images.

The number follows from the number of rows: a view of half the width and height holds a quarter of the rows and of the
objects. It is not fitted to images: whether any of them shows a crowd says nothing about what the camera will see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.graph.columns import TENSORRT_MOST
from runtime.image import letterbox, read_image

ROWS_PER_CANDIDATE = 25
"""1024 candidates at 640 pixels; crowds of 50 to 110 objects had 440 to 800 rows over a confidence of 0.25 there."""
FEWEST, STEP = 320, 64


class Placement(NamedTuple):
    """Where the letterboxed image lies on its canvas; `pad_wh` in canvas pixels."""

    gain: float
    pad_wh: tuple[float, float]
    frame_hw: tuple[int, int]


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
    """An image file -> uint8 BGR canvas (1,S,S,3) by the runtime's letterbox, and where the image lies on it."""
    frame = read_image(path)
    image, gain, pad_wh = letterbox(frame, size_hw)
    height, width = frame.shape[:2]
    return image[None], Placement(gain, pad_wh, (height, width))


def candidates_for(rows: int, wanted: int = 0) -> int:
    """The number of candidates of a head with `rows` rows: `wanted`, or where that is 0 one for each 25 rows."""
    usual = max(FEWEST, STEP * -(-rows // (ROWS_PER_CANDIDATE * STEP)))
    return min(wanted or min(usual, TENSORRT_MOST - 1), rows)


def measure_room(cutoff_of: Callable[[np.ndarray], float], sources: Iterable[np.ndarray], conf: float) -> Room:
    """How the limits of NMS fit these inputs of the graph; `cutoff_of` runs it."""
    cutoffs = [cutoff_of(source) for source in sources]
    return Room(len(cutoffs), conf, sum(value > conf for value in cutoffs), max(cutoffs, default=0.0))
