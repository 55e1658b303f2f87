"""The result of a detector: checked when made, sliced like an array, drawn and written by plain functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

PALETTE_BGR = (
    (56, 56, 255), (49, 210, 207), (10, 249, 72), (255, 194, 0), (168, 153, 44), (255, 115, 100),
    (31, 112, 255), (187, 212, 0), (134, 219, 61), (29, 178, 255), (236, 24, 0), (199, 55, 255),
)  # fmt: skip


FONT = cv2.FONT_HERSHEY_SIMPLEX
MAX_LISTED = 10
"""Most names in one warning."""


class Detection(NamedTuple):
    """One box [x1, y1, x2, y2] in frame pixels, its score and class."""

    xyxy: tuple[float, float, float, float]
    score: float
    class_id: int


@dataclass(frozen=True, eq=False)
class Detections:
    """Boxes of one frame: `xyxy` (N, 4) float32 frame pixels, `score` (N,) float32 in 0..1, `class_id` (N,) int64.

    Raises ValueError when shapes disagree, a value is not finite, a corner is crossed or a score is outside 0..1.
    """

    xyxy: NDArray[np.float32]
    score: NDArray[np.float32]
    class_id: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name, dtype in (("xyxy", np.float32), ("score", np.float32), ("class_id", np.int64)):
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype))
        count = len(self.score)
        shapes = self.xyxy.shape, self.score.shape, self.class_id.shape
        if shapes != ((count, 4), (count,), (count,)):
            raise ValueError(f"shapes are {shapes}, expected ((N, 4), (N,), (N,))")
        if not np.isfinite(self.xyxy).all():
            raise ValueError("a box has a coordinate that is not finite")
        if (self.xyxy[:, 2:] < self.xyxy[:, :2]).any():
            raise ValueError("a box has its second corner before its first")
        if not ((self.score >= 0) & (self.score <= 1)).all():
            raise ValueError("a score is outside 0..1")
        if (self.class_id < 0).any():
            raise ValueError("a class is negative")

    @classmethod
    def from_rows(cls, rows: NDArray[np.float32]) -> Detections:
        """From (N, 6) [x1, y1, x2, y2, score, class]."""
        return cls(rows[:, :4], rows[:, 4], rows[:, 5].astype(np.int64))

    @classmethod
    def empty(cls) -> Detections:
        return cls.from_rows(np.empty((0, 6), np.float32))

    def __len__(self) -> int:
        return len(self.score)

    def __iter__(self) -> Iterator[Detection]:
        for box, score, class_id in zip(self.xyxy.tolist(), self.score.tolist(), self.class_id.tolist(), strict=True):
            yield Detection(tuple(box), score, class_id)

    def __getitem__(self, which: int | slice | Sequence[int] | NDArray[Any]) -> Detections:
        """Some of the detections, in the given order: an index, a slice, a list of indices or a mask."""
        which = [which] if isinstance(which, (int, np.integer)) else which
        return Detections(self.xyxy[which], self.score[which], self.class_id[which])

    def to_list(self, names: Sequence[str] = ()) -> list[dict[str, Any]]:
        """JSON-ready: `[{"box": [x1, y1, x2, y2], "score": 0.9, "class_id": 0, "name": "bolt"}, ...]`."""
        return [
            {
                "box": [round(value, 2) for value in found.xyxy],
                "score": round(found.score, 6),
                "class_id": found.class_id,
                "name": name_of(found.class_id, names),
            }
            for found in self
        ]


def name_of(class_id: int, names: Sequence[str]) -> str:
    """The class's name, or its number if the list is too short."""
    return names[class_id] if class_id < len(names) else str(class_id)


def draw(image: NDArray[np.uint8], detections: Detections, names: Sequence[str] = ()) -> NDArray[np.uint8]:
    """A copy of the BGR image with boxes, names and scores; line and letter sizes follow the image's size.

    A name in a script for which this OpenCV has no letters is drawn as its class number, such as `class 3`.
    """
    canvas = image.copy()
    thickness = max(1, round(sum(image.shape[:2]) / 2 * 0.003))
    for found in reversed(list(detections)):  # the best box is drawn last, on top
        colour = PALETTE_BGR[found.class_id % len(PALETTE_BGR)]
        left, top, right, bottom = (round(value) for value in found.xyxy)
        cv2.rectangle(canvas, (left, top), (right, bottom), colour, thickness, cv2.LINE_AA)
        _label(canvas, f"{drawn_name(found.class_id, names)} {found.score:.2f}", (left, top), colour, thickness)
    return canvas


def drawn_name(class_id: int, names: Sequence[str]) -> str:
    """The class's name if every letter of it can be drawn, else `class` and its number."""
    name = name_of(class_id, names)
    return name if all(map(has_glyph, name)) else f"class {class_id}"


def label_problem(names: Sequence[str]) -> str:
    """Names that are drawn as class numbers, as a warning on one line; empty when there is none."""
    numbered = [f"{number} is {name}" for number, name in enumerate(names) if not all(map(has_glyph, name))]
    if not numbered:
        return ""
    listed = ", ".join(numbered[:MAX_LISTED]) + (", ..." if len(numbered) > MAX_LISTED else "")
    return (
        f"OpenCV {cv2.__version__} has no letters for {len(numbered)} names, they are drawn as class numbers: {listed}"
    )


@lru_cache(maxsize=4096)
def has_glyph(character: str) -> bool:
    """Whether OpenCV has a letter for the character: it draws "?" for the others, version 4 one for each byte."""
    if character.isascii():
        return character.isprintable()
    drawn = _sample(character)
    return not any(np.array_equal(drawn, _sample("?" * count)) for count in range(1, 5))


def _sample(text: str) -> NDArray[np.uint8]:
    canvas = np.zeros((40, 120), np.uint8)
    cv2.putText(canvas, text, (2, 30), FONT, 1, 255, 2)
    return canvas


def _label(
    canvas: NDArray[np.uint8], text: str, corner_xy: tuple[int, int], colour: tuple[int, int, int], thickness: int
) -> None:
    """A filled tag above the corner, or inside the box if there is no room above."""
    scale, weight = thickness / 3, max(1, thickness - 1)
    (width, height), drop = cv2.getTextSize(text, FONT, scale, weight)
    left, top = corner_xy
    base = top - drop if top - height - drop >= 0 else top + height + drop
    cv2.rectangle(canvas, (left, base - height - drop), (left + width, base + drop), colour, cv2.FILLED)
    ink = (0, 0, 0) if sum(colour) > 382 else (255, 255, 255)
    cv2.putText(canvas, text, (left, base), FONT, scale, ink, weight, cv2.LINE_AA)
