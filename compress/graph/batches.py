"""Images (1, ...) joined to the batches that a graph takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice

import numpy as np
import onnx


def batch_of(model: onnx.ModelProto) -> int | None:
    """Images of one call of the model; None where it takes any number."""
    return model.graph.input[0].type.tensor_type.shape.dim[0].dim_value or None


def whole_batches(images: Sequence[np.ndarray], batch: int | None) -> Iterator[np.ndarray]:
    """Neighbours of one shape in arrays of `batch` images, or where that is None in one array."""
    for _, group in groupby(images, key=np.shape):
        same = list(group)
        step = batch or len(same)
        yield from (np.concatenate(same[start : start + step]) for start in range(0, len(same), step))


def filled_batches(images: Iterable[np.ndarray], batch: int | None) -> Iterator[tuple[np.ndarray, int]]:
    """Arrays of `batch` images (1 where it is None), and how many are new: the last one fills up an array."""
    left = iter(images)
    while some := list(islice(left, batch or 1)):
        yield np.concatenate([*some, *some[-1:] * ((batch or 1) - len(some))]), len(some)
