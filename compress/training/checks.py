"""Checks of a distillation before its first epoch, every time; by themselves with `edgestill distill --check`.

In: teacher, student, losses, data. Out: a list of checks and an error for the first that failed. The teacher's accuracy
is measured as the student will see it, so it is also what the student's is compared with at the end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.compute.device import to_device
from compress.compute.resize import reduced
from compress.compute.timing import Stopwatch
from compress.config import DistillConfig
from compress.data.dataset import Sample
from compress.data.loader import Batch, batch_count, epoch_tasks, train_batch
from compress.data.train_dataset import TrainItems
from compress.data.train_loader import worker_count
from compress.evaluate import as_network_input, evaluate_outputs
from compress.log import Log
from compress.losses.autoanchor import GOOD_RECALL, measure, scaled_sizes
from compress.losses.distill import detached
from compress.losses.preflight import Check, preflight
from compress.models import YOLOv5
from compress.models.architecture import Anchors
from compress.models.network import decode_level
from compress.training.objective import Objective
from compress.training.teacher import AnyTeacher, Source, Teacher
from runtime.errors import EdgestillError

PROBE_IMAGES = 4
OPTIMIZER_COPIES = 5
"""Copies of the trained weights that a training holds: themselves, their gradients, two averages of the optimiser and
the averaged model."""
GIB = 1 << 30
LEAST_MAP50 = 0.05
"""A teacher below it was made for other images or classes, or not trained."""


def require_passed(checks: Sequence[Check], log: Log) -> None:
    """Log every warning. Raises EdgestillError when a check failed, with the first that did."""
    for check in checks:
        if not check.ok:
            raise EdgestillError(f"the distillation would not work: {check.name}: {check.detail}")
    for check in checks:
        if check.warns:
            log(f"{check.name}: {check.detail}")


def check_distillation(
    objective: Objective, teacher: AnyTeacher, train: TrainItems, config: DistillConfig, log: Log
) -> list[Check]:
    """Refuse a distillation that would silently do nothing, and log what it costs.

    One small training batch passes through copies: no weight, statistic or gradient changes. Raises EdgestillError
    when a check fails, with the first that did.
    """
    batch = train_batch(train, epoch_tasks(train, 0, batch=min(config.batch, PROBE_IMAGES))[0])
    probe = to_device(copy.deepcopy(objective), teacher.device)
    on_device = batch._replace(images=batch.images.to(teacher.device), targets=batch.targets.to(teacher.device))
    losses: Any = probe.losses
    label_loss = partial(probe.label_loss, labelled=batch.labelled) if train.labelled else None
    checks = preflight(
        probe.model, teacher, losses, on_device, task=label_loss, label_weight=config.label_weight, imgsz=config.imgsz
    )
    require_passed(checks, log)
    log(f"distillation: {len(checks)} checks passed; {checks[-1].name}: {checks[-1].detail}")
    cost = measured_cost(probe, teacher, on_device, config)
    log(cost.line)
    return [*checks, Check("time and memory, estimated", True, cost.estimate(config, len(train)))]


# ---- time and memory ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Milliseconds an image, and bytes: `fixed` whatever the batch, `image_bytes` more with each of its images."""

    teacher_ms: float
    student_ms: float
    fixed_bytes: int
    image_bytes: float
    trains_teacher: bool = False

    @property
    def line(self) -> str:
        share = self.teacher_ms / (self.teacher_ms + self.student_ms)
        teacher = "teacher, which trains too" if self.trains_teacher else "teacher"
        return f"{teacher}: {self.teacher_ms:.1f} ms an image, {share:.0%} of a step (student {self.student_ms:.1f} ms)"

    def estimate(self, config: DistillConfig, images: int) -> str:
        """The time of a step and of all, and the memory, for a training on so many images."""
        an_image = self.teacher_ms + self.student_ms
        minutes = an_image * images * config.epochs / 60_000
        memory = (self.fixed_bytes + self.image_bytes * min(config.batch, images)) / GIB
        return (
            f"{an_image * min(config.batch, images):.0f} ms a step of {config.batch} images, "
            f"{batch_count(images, config.batch) * config.epochs} steps, {minutes:.0f} min without loading and "
            f"validation; {memory:.1f} GiB beside torch itself"
        )


def measured_cost(objective: Objective, teacher: AnyTeacher, batch: Batch, config: DistillConfig) -> Cost:
    """Time and memory of the teacher's forward, with its backward where it trains too, and of the student's forward and
    backward. Leaves gradients behind.
    """
    images, joint = as_network_input(batch.images, teacher.device), objective.teacher
    watch, peaks = Stopwatch(teacher.device), _Memory(teacher.device)
    for _ in range(2):  # the first round warms up
        watch.seconds.clear()
        with peaks.watched():
            with watch.phase("teacher"):
                outputs = joint.student_outputs(images) if joint else teacher(images)
            with watch.phase("student"):
                student = objective.student_outputs(reduced(images, config.imgsz))
                loss = objective.loss(student, detached(outputs), batch.targets, labelled=batch.labelled)
                loss.total.backward()
            if joint:
                with watch.phase("teacher"):
                    joint.label_loss(outputs.raw, batch.targets, batch.labelled)[0].backward()
    teacher_ms, student_ms = (1e3 * watch.seconds[name] / len(images) for name in ("teacher", "student"))
    frozen = () if joint else teacher.networks
    fixed = OPTIMIZER_COPIES * _bytes(objective.parameters()) + sum(_bytes(one.parameters()) for one in frozen)
    return Cost(teacher_ms, student_ms, fixed, peaks.bytes / len(images), trains_teacher=joint is not None)


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Memory:
    """The most bytes beyond those at the start that a watched part held: on a GPU as torch counts them, on a CPU those
    that autograd keeps for the backward pass.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    @contextmanager
    def watched(self) -> Iterator[None]:
        if self._device.type == "cuda":
            before = torch.cuda.memory_allocated(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            yield
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device) - before)
            return
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield
        self.bytes = max(self.bytes, sum(kept.values()))


# ---- the teacher ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """mAP on the val split."""

    map50_95: float
    map50: float
    images: int
    rect: bool
    """Whether the images were rectangular, as those of a training's validation are; a student is measured likewise."""


def teacher_accuracy(
    teacher: AnyTeacher, val: Sequence[Sample], config: DistillConfig, *, rect: bool | None = None
) -> Accuracy:
    """The accuracy of what the student will see.

    On rectangular images if the teacher takes them, unless `rect` says which. A class that the teacher does not know
    counts as never found.
    """
    terms, factor = teacher.arch, config.image_side // config.imgsz
    grid = torch.tensor(terms.anchors, device=teacher.device) * factor

    def decode(raw: list[Tensor]) -> Tensor:
        levels = zip(raw, grid, terms.strides, strict=True)
        rows = [decode_level(level.float(), anchors, stride * factor) for level, anchors, stride in levels]
        return torch.cat(rows, 1).nan_to_num(0)

    rect = teacher.takes_any_size if rect is None else rect
    found = evaluate_outputs(
        lambda images: teacher(images).raw, decode, val, imgsz=config.image_side, batch=2 * config.batch,
        stride=max(terms.strides), rect=rect, device=teacher.device,
        workers=worker_count(config.workers, teacher.device),
    )  # fmt: skip
    return Accuracy(found.yolo.map50_95, found.yolo.map50, found.images, rect)


def student_accuracy(
    student: YOLOv5, val: Sequence[Sample], config: DistillConfig, device: str | torch.device, *, rect: bool
) -> Accuracy:
    """The accuracy of a student."""
    own = config.model_copy(update={"teacher_imgsz": None})
    return teacher_accuracy(Teacher(student, device), val, own, rect=rect)


def check_anchors(anchors: Anchors, labelled: Sequence[Sample], config: DistillConfig) -> Iterator[Check]:
    """The part of the labelled boxes that match an anchor, in pixels of the student's images; nothing without boxes."""
    sizes = scaled_sizes([one.labels[:, 3:5] for one in labelled], [one.size_hw for one in labelled], config.imgsz)
    sizes = sizes[(sizes > 0).all(1)]
    if not len(sizes):
        return
    recall = measure(sizes, np.array(anchors).reshape(-1, 2), config.loss.anchor_t).recall
    told = f"{recall:.1%} of the labelled boxes match one at {config.imgsz} pixels"
    if recall <= GOOD_RECALL:
        told += "; no box is learned from the others: fine-tune the teacher on this data at this size, or raise imgsz"
    yield Check("anchors suit the labels", True, told, warns=recall <= GOOD_RECALL)


def check_teacher(
    sources: Sequence[Source], teacher: Accuracy, start: Accuracy | None, config: DistillConfig, names: Sequence[str]
) -> list[Check]:
    """The facts that the files tell of themselves, and whether there is something to learn from them."""
    return [
        *(_trained_size(source, config) for source in sources if source.imgsz),
        *(_classes(source, names, config) for source in sources if not source.classes.is_identity),
        _is_better(teacher, start),
    ]


def _trained_size(source: Source, config: DistillConfig) -> Check:
    name, size, side = f"size of {source.path.name}", source.imgsz, config.image_side
    if size == side:
        return Check(name, True, f"trained at {size} pixels, as it is used")
    ways = [f"fine-tune it at {side}"]
    if size and size % config.imgsz == 0:
        ways.insert(0, f"set distill.teacher_imgsz={size}")
    return Check(name, True, f"trained at {size} pixels, used at {side}: {' or '.join(ways)}", warns=True)


def _classes(source: Source, names: Sequence[str], config: DistillConfig) -> Check:
    classes = source.classes
    lost = [names[index] for index in classes.unknown]
    told = f"{len(names) - len(lost)} of {len(names)} classes, {len(classes.dropped)} of its own left out"
    if lost:
        told += f"; {'only the labels teach' if config.label_weight else 'nothing teaches'} {', '.join(lost)}"
    return Check(f"classes of {source.path.name}", True, told, warns=bool(lost))


def _is_better(teacher: Accuracy, start: Accuracy | None) -> Check:
    told = f"mAP50-95 {teacher.map50_95:.4f}, mAP50 {teacher.map50:.4f} on {teacher.images} val images"
    if start:
        told += f"; the student starts at {start.map50_95:.4f}"
    remedies = {
        "it finds next to nothing here, so check its classes and image size, or fine-tune it on this data":
            teacher.map50 < LEAST_MAP50,
        "train the teacher longer, or take a better one":
            start is not None and teacher.map50_95 <= start.map50_95,
    }  # fmt: skip
    remedy = next((text for text, holds in remedies.items() if holds), "")
    return Check("accuracy of the teacher", True, f"{told}: {remedy}" if remedy else told, warns=bool(remedy))


def compared(student_map: float, teacher_map: float) -> str:
    """One line: the trained student beside its teacher."""
    if not teacher_map:
        return f"the student reaches mAP50-95 {student_map:.4f}, its teacher 0"
    line = (
        f"the student reaches {student_map / teacher_map:.0%} of its teacher: "
        f"mAP50-95 {student_map:.4f} against {teacher_map:.4f} on val"
    )
    if student_map < teacher_map:
        return line
    return f"{line}; a better teacher would teach it more, and `edgestill study` tells whether this one helps"
