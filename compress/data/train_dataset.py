"""In: samples. Out: training items, each a pure function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from compress.config import AugmentConfig
from compress.data.augment import Boxes, apply_plan, draw_plan, to_pixels
from compress.data.dataset import Sample
from compress.data.image_store import ImageStore, to_chw_rgb
from runtime.image import Image


class TrainDataset:
    """Augmented training items."""

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        config: AugmentConfig,
        seed: int = 0,
        *,
        cache: bool | None = None,
    ) -> None:
        self.samples = samples
        self.imgsz = imgsz
        self.config = config
        self.seed = seed
        self.store = ImageStore(samples, imgsz, cache=cache)

    def __len__(self) -> int:
        return len(self.samples)

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> tuple[Image, NDArray[np.float32]]:
        """Image uint8 (3, imgsz, imgsz) RGB and labels (n, 5) float32 [class, cx, cy, w, h] normalised.

        `mosaic=False` switches mosaic and mixup off (the last epochs of a training).
        """
        plan = draw_plan(
            self.config,
            seed=self.seed,
            epoch=epoch,
            index=index,
            count=len(self),
            imgsz=self.imgsz,
            mosaic=mosaic,
        )
        image, labels = apply_plan(plan, self.load, index, self.imgsz)
        return to_chw_rgb(image), labels

    def load(self, index: int) -> tuple[Image, Boxes]:
        """The resized image and its boxes in its pixels."""
        image, is_real = self.store.load(index)
        labels = self.samples[index].labels if is_real else np.zeros((0, 5), np.float32)
        return image, to_pixels(labels, image.shape[1], image.shape[0])
