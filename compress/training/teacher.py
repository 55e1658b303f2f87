"""The frozen teacher of a distillation: one network, or several files that teach together.

Whatever a teacher is, for a batch of images it gives `Outputs` in the student's terms: its levels, anchors and
classes. The files' own outputs are carried over by what is exact: logits are averaged and mirrored as they are,
classes are mapped by probability, a larger image's cells are joined, and boxes are written where labels would be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from compress.compute.device import pick_device, to_device
from compress.compute.precision import pick_precision
from compress.config import DistillConfig, PrecisionName
from compress.data.class_names import class_conflict
from compress.log import Log
from compress.losses.distill import (
    LOSSES,
    DistillLoss,
    FeatureLoss,
    Outputs,
    Shape,
    make_losses,
    reference_of,
    require_labels_for,
)
from compress.losses.distill.head import same_anchors
from compress.losses.maps import coarser, maps_from_boxes, mean_maps, mirrored, pooled
from compress.models import YOLOv5
from compress.models.architecture import Anchors, Architecture
from compress.models.checkpoint import Checkpoint, load, network_of
from compress.training.class_map import ClassMap, map_classes, map_to_write, require_known
from compress.training.objective import Objective, detection_loss
from compress.training.onnx_teacher import OnnxTeacher, is_onnx, open_onnx
from runtime.errors import InputError, UsageError

Infer = Callable[[Tensor], Outputs]


class Teacher:
    """A network that only infers: evaluation mode, convolutions fused with their normalisation, no gradient.

    It is no part of any module, so no optimiser, no `train()` and no saved file ever reaches it.
    """

    def __init__(
        self, model: YOLOv5, device: str | torch.device = "auto", *, precision: PrecisionName = "float32"
    ) -> None:
        self.device = device if isinstance(device, torch.device) else pick_device(device)
        self.model = to_device(model.fuse().eval().requires_grad_(False), self.device)
        self.compute_in(pick_precision(precision, self.device))

    def compute_in(self, dtype: torch.dtype) -> None:
        """Bring the weights to `dtype`, once: autocast would do it in each forward. Anchors stay float32."""
        self._dtype = dtype
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    @property
    def arch(self) -> Architecture:
        return self.model.arch

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.model,)

    @property
    def shape(self) -> Shape:
        return shape_of(self.model)

    takes_any_size = True
    """Whether images may have any height and width that are multiples of the strides."""
    runs_in_torch = True
    """Whether no other library computes a part of it."""

    @torch.no_grad()  # not inference_mode: its tensors may not take part in the student's backward
    def __call__(self, images: Tensor) -> Outputs:
        """Outputs for float images (B, 3, H, W), in the teacher's precision."""
        return Outputs(*self.model.forward_features(images.to(self._dtype)))


def shape_of(model: YOLOv5) -> Shape:
    """The facts of a network that the distillation losses need."""
    return Shape(model.feature_channels, model.arch.nc, model.arch.na, model.detect.anchors, model.arch.strides)


class Terms(NamedTuple):
    """The meaning of a teacher's maps."""

    names: tuple[str, ...]
    anchors: Anchors
    """In pixels of the student's images."""
    strides: tuple[int, ...]


class TeacherGroup:
    """Files that teach together: the mean of their logits, and the features of the first that has some."""

    def __init__(
        self,
        members: Sequence[Infer],
        terms: Terms,
        shape: Shape,
        networks: Sequence[nn.Module],
        device: torch.device,
        *,
        takes_any_size: bool,
    ) -> None:
        self.runs_in_torch = len(networks) == len(members)
        self._members, self.arch, self.shape = members, terms, shape
        self.networks, self.device, self.takes_any_size = tuple(networks), device, takes_any_size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Outputs:
        """Outputs in the student's terms for float images (B, 3, S, S), of the teachers' size."""
        found = [member(images) for member in self._members]
        raw = found[0].raw if len(found) == 1 else mean_maps([one.raw for one in found])
        return Outputs(raw, next((one.features for one in found if one.features), []))


AnyTeacher = Teacher | TeacherGroup


def build_losses(student: YOLOv5, teacher: AnyTeacher, config: DistillConfig) -> dict[str, DistillLoss]:
    """The recipe's losses by name. Raises UsageError as `make_losses` does, and when a loss compares features that the
    teacher does not give.
    """
    if not teacher.shape.channels:
        for name in config.used_losses:
            if issubclass(LOSSES.get(name, DistillLoss), FeatureLoss):
                raise UsageError(
                    f"loss {name!r} compares features, which an ONNX file does not give",
                    "Use soft, or give the teacher's checkpoint",
                )
    return make_losses(shape_of(student), teacher.shape, config)


def distillation(student: YOLOv5, teacher: AnyTeacher, config: DistillConfig, *, has_labels: bool = True) -> Objective:
    """The objective of a distillation. Where the images have no labels, the weights of its losses follow the first one
    that compares heads. Raises UsageError as `build_losses` does, and when a loss reads labels that are not there.
    """
    losses = build_losses(student, teacher, config)
    for name in () if has_labels else losses:
        require_labels_for(name)
    reference = None if has_labels else reference_of(losses)
    return Objective(
        student, detection_loss(student, config), losses, label_weight=config.label_weight, reference=reference
    )


# ---- files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A teacher's file, loaded, and what its classes are for the data. It has a `model` or is `onnx`."""

    path: Path
    classes: ClassMap
    anchors: Anchors | None
    """In pixels of its own images; None where it gives boxes."""
    strides: tuple[int, ...]
    model: YOLOv5 | None = None
    onnx: OnnxTeacher | None = None
    imgsz: int | None = None
    """Pixels of the images that it was trained with, where the file says it."""


def load_sources(paths: Sequence[Path], names: Sequence[str], config: DistillConfig, device: str) -> list[Source]:
    """The teachers' files, for data of the classes `names`.

    Raises InputError when one cannot be used or, without a class map, has other classes than the data; UsageError when
    the files do not suit each other or the settings.
    """
    where = pick_device(device)
    opened = [(path, open_onnx(path, where, names) if is_onnx(path) else load(path)) for path in paths]
    require_known(config.class_map or {}, [_names(file) for _, file in opened])
    sources = [source_from(path, file, names, config) for path, file in opened]
    for source in sources:
        _require_usable(source, sources, config)
    return sources


def _names(file: OnnxTeacher | Checkpoint) -> tuple[str, ...]:
    return file.file.names if isinstance(file, OnnxTeacher) else file.architecture.names


def source_from(path: Path, file: OnnxTeacher | Checkpoint, data_names: Sequence[str], config: DistillConfig) -> Source:
    """A teacher whose file is read already.

    Raises InputError when it has other classes than the data and no map is given, UsageError when the map is wrong.
    """
    names = _names(file)
    if config.class_map is None and names != tuple(data_names):
        raise InputError(
            class_conflict(f"the teacher {path}", names, "the data", data_names), map_to_write(names, data_names)
        )
    classes = map_classes(f"the teacher {path}", names, data_names, config.class_map or {})
    if isinstance(file, OnnxTeacher):
        return Source(path, classes, file.anchors, file.strides, onnx=file)
    known = file.architecture
    return Source(path, classes, known.anchors, known.strides, model=network_of(file), imgsz=file.imgsz)


def _require_usable(source: Source, sources: Sequence[Source], config: DistillConfig) -> None:
    """Raises UsageError when the source does not take the images, or cannot teach together with the others."""
    path, side = source.path, source.onnx.file.side if source.onnx else None
    if side is not None and side != config.image_side:
        raise UsageError(
            f"{path} takes images of {side} pixels, not of {config.image_side}",
            f"Set distill.teacher_imgsz={side}" if side % config.imgsz == 0 else f"Export it at {config.imgsz} pixels",
        )
    if not source.anchors and (len(sources) > 1 or config.teacher_flip):
        raise UsageError(
            f"{path} gives boxes, which have no mean with other logits", "Let it teach alone, without teacher_flip"
        )
    if not _answers_alike(source, sources[0]):
        raise UsageError(
            f"{path} has other anchors or strides than {sources[0].path}, so their logits have no mean",
            "Fine-tune one from the other, or give one teacher",
        )


def _answers_alike(one: Source, other: Source) -> bool:
    """Whether each cell and anchor of both means the same."""
    anchors = (torch.tensor(source.anchors or (), dtype=torch.float64) for source in (one, other))
    return one.strides == other.strides and same_anchors(*anchors)


def student_anchors(sources: Sequence[Source], config: DistillConfig) -> Anchors | None:
    """The teachers' anchors as the student has them, in its own pixels; None where the teachers give boxes.

    They are the same shares of the image, so that a level of the student answers for the same objects as the teachers'
    level of the same number, however large the images of both are.
    """
    anchors, scale = sources[0].anchors, config.imgsz / config.image_side
    return anchors and tuple(tuple((w * scale, h * scale) for w, h in level) for level in anchors)


# ---- files in the student's terms -----------------------------------------------------------------------------------


def make_teacher(
    sources: Sequence[Source], student: YOLOv5, config: DistillConfig, device: str, log: Log
) -> AnyTeacher:
    """The teacher that the files make together, in the student's terms. A single network that needs no change is left
    as it is.
    """
    where, first = pick_device(device), sources[0]
    factor = config.image_side // config.imgsz
    networks = [Teacher(one.model, where, precision=config.precision) if one.model else None for one in sources]
    as_it_is = len(sources) == 1 and factor == 1 and not config.teacher_flip and first.classes.is_identity
    if networks[0] and as_it_is and networks[0].arch.names == student.arch.names:
        return networks[0]
    members = [_member(*pair, student, config) for pair in zip(sources, networks, strict=True)]
    featured = next((source for source in sources if source.model), None)
    if len(sources) > 1:
        features = f"; features are those of {featured.path.name}" if featured else ""
        log(f"teachers: the mean of {len(sources)} teachers' logits{features}")
    anchors = student_anchors(sources, config) or student.arch.anchors
    terms = Terms(student.arch.names, anchors, student.arch.strides if not first.strides else first.strides)
    unknown = sorted({index for source in sources for index in source.classes.unknown})
    grid = torch.tensor(anchors) / torch.tensor(terms.strides).view(-1, 1, 1)
    channels = featured.model.feature_channels if featured and featured.model else ()
    shape = Shape(
        channels, len(terms.names), len(anchors[0]), grid.to(where), terms.strides, tuple(unknown),
        tells_all=not unknown and first.anchors is not None,
    )  # fmt: skip
    models = [network.model for network in networks if network]
    any_size = factor == 1 and len(models) == len(members)
    return TeacherGroup(members, terms, shape, models, where, takes_any_size=any_size)


def trainable(sources: Sequence[Source], teacher: AnyTeacher) -> YOLOv5:
    """The network of a teacher that trains along. Raises UsageError when the teacher is no network of the data's
    classes.
    """
    model = sources[0].model
    if model is None or not isinstance(teacher, Teacher):
        raise UsageError(
            f"strategy joint trains the teacher on the data's labels, and {sources[0].path} is no checkpoint of its "
            "classes",
            "Fine-tune a checkpoint on this data, or take strategy offline",
        )
    return model


def _member(source: Source, network: Teacher | None, student: YOLOv5, config: DistillConfig) -> Infer:
    """The file's outputs in the student's terms."""
    onnx, classes, factor = source.onnx, source.classes, config.image_side // config.imgsz
    if onnx and not onnx.anchors:
        grids = [(config.imgsz // stride,) * 2 for stride in student.arch.strides]
        anchors_wh, anchor_t = student.detect.anchors.detach().clone(), config.loss.anchor_t

        def from_boxes(images: Tensor) -> Outputs:
            return Outputs(maps_from_boxes(classes(onnx.boxes(images)), anchors_wh.to(images), grids, anchor_t), [])

        return from_boxes
    infer: Infer = network or (lambda images: Outputs(onnx.maps(images) if onnx else [], []))

    def from_head(images: Tensor) -> Outputs:
        outputs = infer(images)
        raw = outputs.raw
        if config.teacher_flip:
            raw = mean_maps([raw, mirrored(infer(images.flip(3)).raw)])
        return Outputs([coarser(classes(level), factor) for level in raw], pooled(outputs.features, factor))

    return from_head
