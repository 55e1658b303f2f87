"""In: samples. Out: training items, each a pure function of (seed, epoch, index), and their order in an epoch.

Nothing here imports torch, so that a process that only makes images starts quickly and stays small.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.config import AugmentConfig
from compress.data.augment import Boxes, apply_plan, draw_plan, to_pixels
from compress.data.dataset import Sample
from compress.data.image_store import ImageStore, write_rgb
from runtime.image import Image

Item = tuple[Image, NDArray[np.float32]]
"""Image uint8 (imgsz, imgsz, 3) BGR and labels (n, 5) float32 [class, cx, cy, w, h] normalised."""


class TrainItems(Protocol):
    """The items of a training: those with an index below `labelled` have labels, of the others none are known."""

    @property
    def imgsz(self) -> int:
        """Pixels of a side of every item's image."""
        ...

    @property
    def labelled(self) -> int: ...

    @property
    def stores(self) -> tuple[ImageStore, ...]:
        """Where its images come from."""
        ...

    def __len__(self) -> int:
        """Items of an epoch."""
        ...

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The indices of the epoch's items in the order of the training."""
        ...

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> Item: ...


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The order of images in an epoch: a permutation, read-only, that depends on (seed, epoch) alone."""
    order = np.random.default_rng([seed % 2**64, epoch]).permutation(count)
    order.setflags(write=False)
    return order


class Task(NamedTuple):
    """One batch that is to be made: its images are the items `indices` of `epoch`, the first `labelled` with labels.

    `labelled` is None if all have labels.
    """

    epoch: int
    indices: tuple[int, ...]
    labelled: int | None
    mosaic: bool


def write_items(
    dataset: TrainItems, epoch: int, indices: Iterable[int], images: NDArray[np.uint8], first: int, *, mosaic: bool
) -> NDArray[np.float32]:
    """Make the items `indices` as images `first`, `first + 1`, ... of a batch, `images` uint8 (B, S, S, 3) RGB.

    Returns their targets, float32 (n, 6) [image in batch, class, cx, cy, w, h] normalised.
    """
    targets = []
    for place, index in enumerate(indices, first):
        image, labels = dataset.item(epoch, index, mosaic=mosaic)
        write_rgb(image, images[place])
        targets.append(targets_of(labels, place))
    return np.concatenate(targets)


def targets_of(labels: NDArray[np.float32], place: int) -> NDArray[np.float32]:
    """The labels (n, 5) of a batch's image number `place`, that number before each, (n, 6) float32."""
    targets = np.empty((len(labels), 6), np.float32)
    targets[:, 0], targets[:, 1:] = place, labels
    return targets


class TrainDataset:
    """Augmented training items of `samples`. Where `has_labels` is false, no label of any of them is known."""

    def __init__(
        self,
        samples: Sequence[Sample],
        imgsz: int,
        config: AugmentConfig,
        seed: int = 0,
        *,
        cache: bool | None = None,
        has_labels: bool = True,
    ) -> None:
        self.samples = samples
        self.labelled = len(samples) if has_labels else 0
        self.imgsz = imgsz
        self.config = config
        self.seed = seed
        self.store = ImageStore(samples, imgsz, cache=cache)
        self.stores = (self.store,)

    def __len__(self) -> int:
        return len(self.samples)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Every image once."""
        return epoch_order(self.seed, epoch, len(self))

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> Item:
        """One augmented image with its labels.

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
        return apply_plan(plan, self.load, index, self.imgsz)

    def load(self, index: int) -> tuple[Image, Boxes]:
        """The resized image and its boxes in its pixels."""
        image, is_real = self.store.load(index)
        labels = self.samples[index].labels if is_real else np.zeros((0, 5), np.float32)
        return image, to_pixels(labels, image.shape[1], image.shape[0])


class MixedDataset:
    """Items that alternate between the images of two data sets, so that a batch holds as many of one as of the other.

    An epoch has each image of the first, the train split, once. Epoch by epoch it goes on through the unlabelled ones,
    each once in a pass, and mosaics join images of the same data set only.
    """

    def __init__(self, own: TrainDataset, unlabelled: TrainDataset) -> None:
        self._own, self._unlabelled = own, unlabelled
        self.labelled, self.imgsz = own.labelled, own.imgsz
        self.stores = (*own.stores, *unlabelled.stores)

    def __len__(self) -> int:
        return 2 * len(self._own)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """The first indices are those of the train split; from there on they count the unlabelled items."""
        own = self._own.order(epoch)
        return np.stack([own, np.arange(len(own)) + len(own)], 1).flatten()

    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> Item:
        """One augmented image with its labels, if they are known."""
        count = len(self._own)
        if index < count:
            return self._own.item(epoch, index, mosaic=mosaic)
        place = epoch * count + index - count
        passed, place = divmod(place, len(self._unlabelled))
        return self._unlabelled.item(passed, int(self._unlabelled.order(passed)[place]), mosaic=mosaic)
