"""The shape of YOLOv5's detection head."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEW_CLASSES = 16
"""Up to this number, joining the class maps of all levels costs less than reading each of them."""


@dataclass(frozen=True)
class HeadShape:
    """The detection head: its raw maps, and `anchors_px` (nl, na, 2), width and height in pixels."""

    nc: int
    anchors_px: np.ndarray
    strides: tuple[int, ...]
    size_hw: tuple[int, int]

    @property
    def na(self) -> int:
        return int(self.anchors_px.shape[1])

    @property
    def no(self) -> int:
        return 5 + self.nc

    @property
    def few_classes(self) -> bool:
        return self.nc <= FEW_CLASSES

    @property
    def grids_hw(self) -> tuple[tuple[int, int], ...]:
        return tuple((self.size_hw[0] // s, self.size_hw[1] // s) for s in self.strides)

    @property
    def level_rows(self) -> tuple[int, ...]:
        return tuple(self.na * h * w for h, w in self.grids_hw)

    @property
    def rows(self) -> int:
        return sum(self.level_rows)
