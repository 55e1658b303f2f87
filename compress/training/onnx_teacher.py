"""A teacher that is an ONNX file: a YOLOv5 head's raw maps or decoded rows, or the finished boxes of any detector.

In: a file from anyone, first loaded in a limited child process. Out: raw maps where the file's anchors can be read from
it, so that its decode can be undone exactly; else boxes, which become maps as labels would. It has no features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.graph.untrusted_onnx import read_model
from compress.losses.maps import logit, maps_from_rows
from compress.models.architecture import Anchors
from runtime.backends import LoadOptions, LoadRequest, TensorSpec
from runtime.backends.onnx import OnnxBackend, open_session, tensor_spec
from runtime.bundle import card_inside, metadata_of
from runtime.errors import InputError, one_line
from runtime.yolov5_export import STRIDES, parse_names, yolov5_card

SUFFIX = ".onnx"
MOST_BOXES = 1000
"""Rows of an image, by objectness, that teach where the anchors are not known."""
CERTAIN = 4.6
"""Logit of 0.99: a finished box says its class, but not how sure the class is."""
LARGEST_SIDE = 4.0
"""A decoded side is below this many anchors."""
TRIED = 64
"""Pixels of the image that a file of any size is tried with."""
GREY = 0.45
WANTED = "expected raw maps [1, anchors, H, W, 5 + classes], rows [1, N, 5 + classes] or boxes [1, N, 6]"
PARTS = (("box",), ("score", "conf"), ("class", "label"))
"""Words by which three outputs are known: boxes (1, N, 4), scores (1, N) and classes (1, N)."""
Arrays = Sequence[NDArray[Any]]


def is_onnx(path: Path) -> bool:
    """Whether a teacher's file is read as ONNX; others are checkpoints."""
    return path.suffix.lower() == SUFFIX


class _File(NamedTuple):
    """A loaded file."""

    path: Path
    session: Any
    input: TensorSpec
    outputs: tuple[TensorSpec, ...]
    names: tuple[str, ...]
    side: int | None
    """Pixels of its images; None if they are free."""

    def run(self, image: Tensor) -> Arrays:
        """The outputs for a float RGB image (3, S, S): a float tensor, or a uint8 BGR canvas.

        Raises InputError when the graph fails.
        """
        if self.input.dtype == np.uint8:
            array = (image.flip(0) * 255).round().byte().permute(1, 2, 0)[None].contiguous().cpu().numpy()
        else:
            array = image[None].contiguous().cpu().numpy().astype(self.input.dtype)
        try:
            found = self.session.run(None, {self.input.name: array})
        except Exception as error:  # ONNX Runtime's errors share no other base
            size = "x".join(map(str, image.shape[1:]))
            raise InputError(f"{self.path}: fails for one image of {size} pixels: {one_line(error)}") from error
        return [np.asarray(one) for one in found]


@dataclass(frozen=True)
class OnnxTeacher:
    """A file that gives either `maps`, for its own anchors, or `boxes`, which need none."""

    file: _File
    read: Callable[[Arrays, int], Any]
    """(outputs, pixels of the image) -> its raw maps, or its boxes."""
    anchors: Anchors | None = None
    """In pixels; None where the file gives boxes."""
    strides: tuple[int, ...] = ()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Raw maps (B, na, H, W, 5 + nc) of float RGB images (B, 3, S, S), on their device."""
        return [torch.cat(level).to(images.device) for level in zip(*self._read(images), strict=True)]

    def boxes(self, images: Tensor) -> Tensor:
        """(B, K, 5 + nc): centre and size as shares of the image, size 0 where there is none; logits of objectness and
        classes.
        """
        return torch.nn.utils.rnn.pad_sequence(list(self._read(images)), batch_first=True).to(images.device)

    def _read(self, images: Tensor) -> Iterator[Any]:
        """Image by image: most files take one."""
        return (self.read(self.file.run(image), image.shape[-1]) for image in images)


def open_onnx(path: Path, device: torch.device, data_names: Sequence[str]) -> OnnxTeacher:
    """The teacher in `path`; a file that does not name its classes has those of the data.

    Raises InputError when the file does not load, or gives neither a head nor boxes.
    """
    options = LoadOptions("auto" if device.type == "cuda" else "cpu", spin=False)
    session = open_session(LoadRequest("onnx", path, options=options, has_card=False))
    backend, metadata = OnnxBackend(session, path), metadata_of(path)
    outputs = tuple(tensor_spec(node, path) for node in session.get_outputs())
    names = parse_names(metadata.get("names", "")) or tuple(data_names)
    file = _File(path, session, backend.input, outputs, names, _side(path, backend.input))
    if maps := [index for index, output in enumerate(outputs) if len(output.shape) == 5]:
        return _of_maps(file, maps)
    if parts := _three_parts(outputs):
        return OnnxTeacher(file, lambda arrays, pixels: _of_parts([arrays[i] for i in parts], pixels, len(names)))
    if _gives_boxes(path, backend, metadata):
        return OnnxTeacher(file, lambda arrays, pixels: _of_boxes(arrays[0], pixels, len(names)))
    return _of_rows(file)


def _side(path: Path, wanted: TensorSpec) -> int | None:
    """Pixels of the square images that the file takes; None if it takes any."""
    is_canvas, shape = wanted.dtype == np.uint8, wanted.shape
    sides, channels = (shape[1:3], shape[3:]) if is_canvas else (shape[2:4], shape[1:2])
    if len(shape) != 4 or shape[0] not in (1, None) or channels[0] not in (3, None) or sides[0] != sides[1]:
        raise InputError(
            f"{path}: input is {wanted.dtype} {list(shape)}, expected float [1, 3, S, S] or uint8 [1, S, S, 3]",
            "Export it for one square image a call",
        )
    return sides[0]


def _three_parts(outputs: Sequence[TensorSpec]) -> list[int]:
    """Indices of the outputs of boxes, scores and classes; empty where one is not there."""
    named = [[i for i, one in enumerate(outputs) if any(w in one.name.lower() for w in words)] for words in PARTS]
    return [indices[0] for indices in named] if all(named) and len(outputs) >= len(PARTS) else []


def _gives_boxes(path: Path, backend: OnnxBackend, metadata: Mapping[str, str]) -> bool:
    """Whether the output is finished boxes and not rows of a head. Raises InputError when it is neither."""
    if card := card_inside(path):
        return card.output == "boxes"
    try:
        yolov5_card(path, {key: text for key, text in metadata.items() if key != "names"}, backend)
    except InputError:
        shape = backend.output.shape
        if len(shape) == 3 and shape[2] == 6:
            return True
        raise InputError(f"{path}: output is {backend.output.dtype} {list(shape)}, {WANTED}") from None
    return False


# ---- a head -------------------------------------------------------------------------------------------------------


def _of_maps(file: _File, indices: Sequence[int]) -> OnnxTeacher:
    """Raw maps: only the anchors must be found."""
    found, side = _tried(file)
    order = sorted(indices, key=lambda index: -found[index].shape[2])
    na, columns = found[order[0]].shape[1], found[order[0]].shape[4]
    anchors = tuple(_anchors_inside(file.path))
    if [len(group) for group in anchors] != [na] * len(order):
        raise InputError(f"{file.path} holds raw maps without their anchors", "Export it with its decode")
    _require_names(file, columns - 5)
    strides = tuple(side // found[index].shape[2] for index in order)
    return OnnxTeacher(file, lambda arrays, _: [_tensor(arrays[index]) for index in order], anchors, strides)


def _of_rows(file: _File) -> OnnxTeacher:
    """Decoded rows: maps where anchors are found that explain the sizes, else boxes."""
    found, side = _tried(file)
    rows = _tensor(found[0])
    _require_names(file, rows.shape[-1] - 5)
    anchors = tuple(_anchors_inside(file.path))
    for strides in (STRIDES[first : first + len(anchors)] for first in range(len(STRIDES))):
        if anchors and _explains(anchors, strides, side, rows):
            return OnnxTeacher(file, _undone(anchors, strides), anchors, strides)
    return OnnxTeacher(file, lambda arrays, pixels: _best_rows(arrays[0], pixels))


def _tried(file: _File) -> tuple[Arrays, int]:
    """The outputs for a grey image, and its side."""
    side = file.side or TRIED
    return file.run(torch.full((3, side, side), GREY)), side


def _undone(anchors: Anchors, strides: Sequence[int]) -> Callable[[Arrays, int], list[Tensor]]:
    grid = torch.tensor(anchors) / torch.tensor(strides).view(-1, 1, 1)
    return lambda arrays, pixels: maps_from_rows(_tensor(arrays[0]), grid, strides, (pixels, pixels))


def _explains(anchors: Anchors, strides: Sequence[int], side: int, rows: Tensor) -> bool:
    """Whether a decode with these anchors makes as many rows, none of them larger."""
    if len(strides) != len(anchors) or len({len(group) for group in anchors}) != 1:
        return False
    cells = torch.tensor([(side // stride) ** 2 for stride in strides for _ in anchors[0]])
    largest = LARGEST_SIDE * torch.tensor(anchors).flatten(0, 1).repeat_interleave(cells, 0)
    return len(largest) == rows.shape[1] and bool((rows[0, :, 2:4] <= 1.001 * largest).all())


def _require_names(file: _File, count: int) -> None:
    if len(file.names) != count:
        raise InputError(
            f"{file.path} has {count} classes, and names for {len(file.names)}",
            "Export it with the names of its classes in the metadata",
        )


def _anchors_inside(path: Path) -> list[tuple[tuple[float, float], ...]]:
    """Groups of anchors in pixels, smallest first, which a decode holds as constants (1, na, h, w, 2), equal in every
    cell; none where the graph has operators beyond those of a detector's own graph.
    """
    try:
        graph = read_model(path).graph
    except InputError:
        return []
    inside = [a.t for node in graph.node if node.op_type == "Constant" for a in node.attribute if a.HasField("t")]
    constants = [onnx.numpy_helper.to_array(tensor) for tensor in (*graph.initializer, *inside)]
    groups = {
        tuple((float(w), float(h)) for w, h in values[0, :, 0, 0]) for values in constants if _are_anchors(values)
    }
    return sorted(groups, key=lambda group: sum(w * h for w, h in group))


def _are_anchors(values: NDArray[Any]) -> bool:
    shaped = values.ndim == 5 and values.shape[0] == 1 and values.shape[4] == 2 and values.dtype.kind == "f"
    return bool(shaped and (values > 0).all() and (values == values[:, :, :1, :1]).all())


# ---- boxes: (K, 5 + nc) as `OnnxTeacher.boxes` has them -------------------------------------------------------------


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(array, np.float32))


def _best_rows(rows: NDArray[Any], pixels: int) -> Tensor:
    """The rows (1, N, 5 + nc) with the largest objectness."""
    found = _tensor(rows[0])
    best = found[found[:, 4].topk(min(MOST_BOXES, len(found))).indices]
    return torch.cat((best[:, :4] / pixels, logit(best[:, 4:])), 1)


def _of_boxes(boxes: NDArray[Any], pixels: int, nc: int) -> Tensor:
    """Finished boxes (1, N, 6): x1 y1 x2 y2 in pixels, score, class."""
    found = _tensor(boxes[0])
    return _one_class_each(found[:, :4] / pixels, found[:, 4], found[:, 5].long(), nc)


def _of_parts(parts: Arrays, pixels: int, nc: int) -> Tensor:
    """Boxes (1, N, 4), x1 y1 x2 y2 in pixels; scores (1, N); classes (1, N)."""
    boxes, scores, classes = map(_tensor, parts)
    return _one_class_each(boxes.reshape(-1, 4) / pixels, scores.flatten(), classes.flatten().long(), nc)


def _one_class_each(corners: Tensor, scores: Tensor, classes: Tensor, nc: int) -> Tensor:
    """Corners (N, 4) as shares of the image, scores (N,) 0..1, classes (N,): the score is the objectness."""
    low, high = corners[:, :2], corners[:, 2:]
    is_box = (scores > 0) & (high > low).all(1) & (classes >= 0) & (classes < nc)
    hot = F.one_hot(classes.clamp(0, nc - 1), nc)
    sides = is_box[:, None] * (high - low)
    return torch.cat(((low + high) / 2, sides, logit(scores)[:, None], (2 * hot - 1) * CERTAIN), 1)
