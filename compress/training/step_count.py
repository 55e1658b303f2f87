"""The operations that one step of a distillation gives to its device, phase by phase.

In: a trainer and a batch. Out: operations and bytes. Tensors have shapes and no data, so any size is counted anywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._foreach_utils import _foreach_supported_types

from compress.compute.operations import BACKWARD, OperationCount, Work
from compress.compute.timing import attach
from compress.config import DistillConfig
from compress.data.loader import Batch
from compress.kernels.fused import as_operations
from compress.models import Architecture, YOLOv5
from compress.training.loop import Job, Trainer
from compress.training.ratio import is_due
from compress.training.step_cost import BOXES
from compress.training.teacher import Teacher, distillation


def attach_count(count: OperationCount, trainer: Trainer) -> None:
    """Let `count` tell the phases of every step of the trainer apart from now on."""
    objective: Any = trainer.objective
    for phase, owner, method in (
        ("teacher", trainer, "teacher_outputs"),
        ("student", objective, "student_outputs"),
        ("weights", objective, "loss"),
        ("detection", objective, "label_loss"),
        *((name, loss, "forward") for name, loss in objective.losses.items()),
        ("clip", trainer, "clip"),
        ("optimiser", trainer.optimizer, "step"),
        *(("EMA", average, "update") for average in trainer.averages),
    ):
        attach(count, phase, owner, method)


def count_step(trainer: Trainer, *, half: bool = True, fused: bool = False) -> OperationCount:
    """The operations of one step of a trainer on the CPU, the optimiser's included. The trainer cannot be used again.

    With `half` in float16 where autocast has it; the operations of a gradient scaler are not in it. With `fused`,
    losses with kernels are the one operation that they are on a GPU.
    """
    batch, side = trainer.config.batch, trainer.config.image_side
    fake, count = FakeTensorMode(allow_non_fake_inputs=True), OperationCount()
    objective: Any = trainer.objective
    attach_count(count, trainer)
    if half:  # as a training on a GPU has it
        objective.forward = torch.autocast("cpu", torch.float16)(objective.forward)
        cast(Teacher, trainer.job.teacher).compute_in(torch.float16)
    trainer.wrapped.train()
    with _foreach_for_fakes(), fake, as_operations() if fused else nullcontext():
        images = torch.empty((batch, 3, side, side), dtype=torch.uint8)
        seen = Batch(images, torch.empty((batch * BOXES, 6)), tuple(range(batch)))
        trainer.train_batch(seen, 0)  # makes what is made once
        trainer.state.last_step = -batch  # no batch waits for another
        usual = next(iteration for iteration in itertools.count(1) if not is_due(iteration))
        with count, count.phase("input"):
            trainer.train_batch(seen, usual)
    return count


@contextmanager
def _foreach_for_fakes() -> Iterator[None]:
    """Let torch take tensors without data for those that its functions of many tensors serve."""
    _foreach_supported_types.append(FakeTensor)
    try:
        yield
    finally:
        _foreach_supported_types.remove(FakeTensor)


def new_trainer(
    teacher: str, student: str, classes: int, imgsz: int, batch: int, losses: Sequence[str], folder: Path
) -> Trainer:
    """A distillation on the CPU between two scales of the network with random weights."""
    names = tuple(f"class {number}" for number in range(classes))
    learns, teaches = (YOLOv5(Architecture.of_scale(scale, names)) for scale in (student, teacher))
    config = DistillConfig.model_validate(
        {"losses": dict.fromkeys(losses, "auto"), "batch": batch, "imgsz": imgsz, "tensorboard": False}
    )
    frozen = Teacher(teaches, "cpu")
    data: Any = range(batch)
    job = Job(config, distillation(learns, frozen, config), data, (), folder, frozen)
    return Trainer(job, "cpu", lambda _: None)


def count_table(work: Mapping[str, Work]) -> str:
    """Lines of operations and GB, a phase beside its backward pass."""
    phases = [phase for phase in work if not phase.endswith(BACKWARD)]
    rows = {phase: (work[phase], work.get(phase + BACKWARD, Work())) for phase in phases}
    own, back = ([row[i] for row in rows.values()] for i in (0, 1))
    rows["all"] = sum(own, Work()), sum(back, Work())
    lines = [
        f"{phase:12}{own.operations:8}{own.bytes / 1e9:9.3f}{back.operations:12}{back.bytes / 1e9:9.3f}"
        f"{own.operations + back.operations:12}{(own.bytes + back.bytes) / 1e9:9.3f}"
        for phase, (own, back) in rows.items()
    ]
    return "\n".join([f"{'':12}{'forward':>8}{'GB':>9}{'backward':>12}{'GB':>9}{'both':>12}{'GB':>9}", *lines])
