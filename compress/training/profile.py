"""Time the phases of a training: `python -m compress.training.profile --data D --weights W --imgsz 320 --batch 16`.

Runs real epochs of the real loop with a stopwatch around its phases, writes nothing, and prints images per second with
the share of each phase. The first epoch (decoding images, warming up) is left out. Set OMP_WAIT_POLICY=PASSIVE to have
threads wait as `edgestill` has them.

With --count it takes one step of a distillation with tensors that have shapes and no data, and prints the operations
that each phase gives to the device and the bytes that they move. So any size is counted on any machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

import torch

from compress.compute.numerics import flush_denormals
from compress.compute.timing import Stopwatch, attach
from compress.config import SCALES, TrainConfig
from compress.data import index_dataset, load_data
from compress.losses.distill import LOSSES
from compress.training.loop import Job, Trainer
from compress.training.objective import Objective, detection_loss
from compress.training.prepare import new_model, open_splits
from compress.training.progress import Progress
from compress.training.step_count import count_step, count_table, new_trainer
from runtime.numbers import whole
from runtime.terminal import exit_code_of

PHASES = ("data", "teacher", "forward", "loss", "backward", "step")


def attach_watch(watch: Stopwatch, trainer: Trainer) -> None:
    """Let `watch` time every phase of the trainer from now on: each phase is one method."""
    batches = trainer.epoch_batches
    trainer.epoch_batches = lambda: watch.waits("data", batches())  # type: ignore[method-assign]
    for phase, owner, method in (
        *([("teacher", trainer, "teacher_outputs")] if trainer.job.teacher else []),
        ("forward", trainer.objective, "student_outputs"),
        ("loss", trainer.objective, "loss"),
        ("backward", trainer, "backward"),
        ("step", trainer, "step"),
    ):
        attach(watch, phase, owner, method)


def measure(trainer: Trainer, epochs: int) -> tuple[float, dict[str, float]]:
    """Seconds per image in all and by phase, over `epochs` epochs after one that does not count."""
    watch = Stopwatch(trainer.device)
    attach_watch(watch, trainer)
    trainer.train_epoch(Progress())
    watch.seconds.clear()
    started = time.perf_counter()
    for _ in range(epochs):
        trainer.state.epoch += 1
        trainer.train_epoch(Progress())
    images = epochs * len(trainer.job.train)
    whole = (time.perf_counter() - started) / images
    return whole, {phase: watch.seconds.get(phase, 0.0) / images for phase in PHASES}


def table(whole: float, split: Mapping[str, float]) -> str:
    """Lines of milliseconds per image and share; `other` is the time outside of all phases."""
    rows = {**{phase: s for phase, s in split.items() if s}, "other": whole - sum(split.values())}
    lines = [f"{phase:10}{1e3 * s:8.2f} ms/image{100 * s / whole:7.1f} %" for phase, s in rows.items()]
    return "\n".join([*lines, f"{'all':10}{1e3 * whole:8.2f} ms/image   {1 / whole:.1f} images/s"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m compress.training.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--count", action="store_true", help="count the operations of a step instead")
    parser.add_argument("--imgsz", type=whole(1), help="default: 320; 640 with --count")
    parser.add_argument("--batch", type=whole(1), help="default: 16; 32 with --count")
    timed = parser.add_argument_group("without --count")
    timed.add_argument("--data", type=Path, help="required")
    timed.add_argument("--weights", type=Path)
    timed.add_argument("--scale")
    timed.add_argument("--epochs", type=whole(1), default=2)
    timed.add_argument("--workers", type=whole(0, 256), default=TrainConfig().workers)
    timed.add_argument("--threads", type=whole(0, 256), default=0, help="compute threads; 0 as in a training")
    timed.add_argument("--device", default="auto")
    counted = parser.add_argument_group("with --count")
    counted.add_argument("--teacher", choices=SCALES, default="l")
    counted.add_argument("--student", choices=SCALES, default="s")
    counted.add_argument("--classes", type=whole(1), default=80)
    counted.add_argument("--losses", nargs="+", choices=LOSSES, default=["soft"])
    counted.add_argument("--fused", action="store_true", help="losses with kernels as one operation, as on a GPU")
    counted.add_argument("--full", action="store_true", help="float32, as without mixed precision")
    asked = parser.parse_args(arguments)
    if asked.count:
        print(counted_step(asked))
    elif asked.data:
        print_times(asked)
    else:
        parser.error("--data is required, or --count")


def counted_step(asked: argparse.Namespace) -> str:
    """The table of one step's operations."""
    imgsz, batch = asked.imgsz or 640, asked.batch or 32
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = new_trainer(asked.teacher, asked.student, asked.classes, imgsz, batch, asked.losses, Path(nowhere))
        count = count_step(trainer, half=not asked.full, fused=asked.fused)
    return count_table(count.work)


def print_times(asked: argparse.Namespace) -> None:
    """Train, and print where the time went."""
    imgsz, batch = asked.imgsz or 320, asked.batch or 16
    flush_denormals(print)
    config = TrainConfig(
        epochs=100, batch=batch, imgsz=imgsz, workers=asked.workers, threads=asked.threads,
        tensorboard=False,
    )  # fmt: skip
    data = index_dataset(load_data(asked.data))
    model = new_model(data.names, scale=asked.scale, weights=asked.weights)
    splits = open_splits(data, config, print)
    with tempfile.TemporaryDirectory() as nowhere:
        objective = Objective(model, detection_loss(model, config))
        job = Job(config, objective, splits.train, splits.val, Path(nowhere))
        trainer = Trainer(job, asked.device, print)
        trainer.choose_threads()
        with closing(trainer.loader):
            print(table(*measure(trainer, asked.epochs)))
    print(f"{torch.get_num_threads()} compute threads, {trainer.workers} data workers, torch {torch.__version__}")


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
