"""The one training loop.

In: an objective (model and losses), samples, settings. Out, in the run's folder: `best.safetensors` and
`last.safetensors` (EMA weights), `state.pt` (everything to resume), `results.csv`, `curves.png`, `tensorboard/`.

Written on accelerate: one process or several is a matter of how it is launched. Batches are divided among processes by
the data loader itself, since every batch is a function of (seed, epoch, number).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from compress.compute.device import pick_device, place
from compress.compute.numerics import require_finite
from compress.compute.timing import Span, timed_items, unwatched
from compress.config import TrainConfig, result_settings
from compress.data.dataset import Sample
from compress.data.loader import Batch, batch_count, train_batches
from compress.data.train_dataset import TrainDataset
from compress.log import Log
from compress.losses.distill import Outputs
from compress.models.checkpoint import save_model
from compress.training.curves import METRICS, RATES, VAL, Record, Scalars, draw_curves, write_csv
from compress.training.ema import Ema
from compress.training.objective import Objective
from compress.training.optimizer import build_optimizer, freeze, set_rates
from compress.training.progress import Progress, epoch_line, open_progress
from compress.training.schedule import Schedule, distill_factor, mosaic_epochs
from compress.training.state import STATE, load_state, random_state, restore_random_state, save_state
from compress.validate import ValResult, as_network_input, validate
from runtime.errors import EdgestillError, UsageError

Guide = Callable[[torch.Tensor], Outputs]
"""A teacher: float images (B, 3, H, W) -> its outputs, without gradient."""
FINITE_CHECK_EVERY = 50
"""Batches between two looks at the losses on a GPU, where each look waits for the device."""


@dataclass(frozen=True)
class Job:
    """What is to be trained."""

    config: TrainConfig
    objective: Objective
    train: TrainDataset
    val: Sequence[Sample]
    out: Path
    guide: Guide | None = None
    decay_to: float = 1.0
    """Where the weight of the distillation terms ends."""


@dataclass(frozen=True)
class TrainResult:
    """Files and figures of a finished training."""

    best: Path
    last: Path
    metrics: dict[str, float]
    """Row of results.csv of the best epoch."""
    epochs: int
    """Epochs that were trained, fewer than asked after an early stop."""

    @property
    def figures(self) -> dict[str, float]:
        """Of the best epoch, as the manifest of a stage keeps them."""
        map50, map50_95 = (self.metrics[f"metrics/mAP_{name}"] for name in ("0.5", "0.5:0.95"))
        return {"epochs": self.epochs, "map50": map50, "map50_95": map50_95}


@dataclass
class Course:
    """What changes from epoch to epoch beside tensors."""

    epoch: int = 0
    """The next epoch to train, from 0."""
    last_step: int = -1
    """Iteration of the newest optimiser step."""
    best_fitness: float = -1.0
    best_epoch: int = 0
    stopped: bool = False
    history: list[Record] = field(default_factory=list)


def fit(job: Job, *, device: str = "auto", resume: dict[str, Any] | None = None, log: Log = print) -> TrainResult:
    """Train until the last epoch or an early stop. `resume` is what `read_resume` returned.

    Errors: EdgestillError where a loss is not finite, the GPU's memory is full or a file cannot be written; the files
    then hold the last good epoch.
    """
    trainer = Trainer(job, device, log)
    if resume:
        trainer.restore(resume)
    try:
        return trainer.run()
    except torch.OutOfMemoryError as error:
        where = f"batch {job.config.batch} at {job.config.imgsz} pixels"
        raise EdgestillError(f"the GPU's memory is full: {where} do not fit", "Lower batch or imgsz") from error


def read_resume(out: Path, config: TrainConfig) -> dict[str, Any]:
    """The state in `out`. Errors: InputError where there is none, UsageError where it belongs to other settings."""
    state = load_state(out / STATE)
    was, now = state["config"], result_settings(config)
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            raise UsageError(
                f"{out} was trained with {key} = {was.get(key)}, not {now.get(key)}",
                "resume with the same settings, or start anew in another folder",
            )
    return state


class Trainer:
    """One training in the making; `run` is the loop, everything else serves it."""

    def __init__(self, job: Job, device: str, log: Log, span: Span = unwatched) -> None:
        where, config = pick_device(device), job.config
        self.accelerator = _accelerator(where, half=config.amp)
        self.job, self.config, self.course, self.span = job, config, Course(), span
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.log: Log = log if self.accelerator.is_main_process else lambda _: None
        self.batches = batch_count(len(job.train), config.batch)
        self.schedule = Schedule(config.optimizer, config.epochs, self.batches, config.batch)
        freeze(job.objective.model.model, config.freeze)
        place(job.objective, self.device)
        job.objective.span = span
        self.ema = Ema(job.objective.model, config.optimizer.ema_decay, config.optimizer.ema_ramp)
        optimizer = build_optimizer(job.objective, config.optimizer, self.schedule.weight_decay)
        self.objective, self.optimizer = self.accelerator.prepare(job.objective, optimizer)

    # -- the loop ---------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        course, first = self.course, self.course.epoch
        scalars = Scalars(
            self.job.out / "tensorboard", on=self.config.tensorboard and self.accelerator.is_main_process, start=first
        )
        progress = open_progress(self.config.epochs, shown=self.accelerator.is_main_process)
        with scalars, progress:
            while course.epoch < self.config.epochs and not course.stopped:
                started = time.perf_counter()
                record = self.train_epoch(progress)
                seconds = time.perf_counter() - started
                self._close_epoch(record)
                scalars.add(record)
                self.log(epoch_line(record, self.config.epochs, seconds, len(self.job.train)))
        return self._result()

    def train_epoch(self, progress: Progress) -> Record:
        """All batches of the running epoch. Returns its losses and rates."""
        epoch, losses = self.course.epoch, _LossLog(self.job.objective.terms, self.course.epoch, self.device)
        self.objective.train()
        progress.epoch(epoch + 1, self.batches)
        for number, batch in enumerate(timed_items(self._batches(), self.span, "data")):
            losses.add(self.train_batch(batch, epoch * self.batches + number, last=number + 1 == self.batches))
            progress.batch(losses.means_if_cheap())
        rates = {key: group["lr"] for key, group in zip(RATES, self.optimizer.param_groups, strict=True)}
        return {"epoch": float(epoch), **losses.close(), **rates}

    def _batches(self) -> Iterator[Batch]:
        epoch, accelerator = self.course.epoch, self.accelerator
        return train_batches(
            self.job.train, batch=self.config.batch, epoch=epoch, workers=self.config.workers,
            rank=accelerator.process_index, world=accelerator.num_processes,
            augment_mosaic=epoch < mosaic_epochs(self.config.augment, self.config.epochs),
        )  # fmt: skip

    def train_batch(self, batch: Batch, iteration: int, *, last: bool = True) -> torch.Tensor:
        """One batch forward and backward, and an optimiser step where one is due. Returns the loss terms."""
        rates = self.schedule.at(iteration)
        set_rates(self.optimizer, rates)
        due = iteration - self.course.last_step >= rates.accumulate
        images = as_network_input(batch.images, self.device)
        factor = distill_factor(self.course.epoch, self.config.epochs, self.job.decay_to)
        with self._sync(due or last):
            with self.span("teacher"):
                guide = self.job.guide(images) if self.job.guide else None
            total, terms = self.objective(images, batch.targets.to(self.device), guide, factor, self._upstream())
            with self.span("backward"):
                # the processes' gradients are averaged; times their number they add up, as one process would have it
                self.accelerator.backward(total * self.world)
        if due:
            with self.span("step"):
                self._step(iteration)
        return terms

    def _upstream(self) -> torch.Tensor | None:
        """The gradient that a batch's loss will get: the gradient scaler's factor times the processes. None without a
        scaler, where gradients are float32 and need no such care.
        """
        scaler = self.accelerator.scaler
        return scaler.scale(torch.ones((), device=self.device)) * self.world if scaler else None

    def _sync(self, wanted: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients only where a step, or a saved state, needs them."""
        return nullcontext() if wanted else self.accelerator.no_sync(self.objective)

    def _step(self, iteration: int) -> None:
        self.accelerator.clip_grad_norm_(self.objective.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.job.objective.model)
        self.course.last_step = iteration

    # -- after an epoch ---------------------------------------------------------------------------

    def _close_epoch(self, record: Record) -> None:
        """Validate where due, judge, publish; the first process decides for all."""
        if self.accelerator.is_main_process:
            if self._due(self.config.val_interval):
                self._judge(record)
            self.course.history.append(record)
            self.course.epoch += 1
            self._publish()
        self.course = broadcast_object_list([self.course])[0] if self.world > 1 else self.course

    def _due(self, interval: int) -> bool:
        done = self.course.epoch + 1
        return done % interval == 0 or done == self.config.epochs

    def _judge(self, record: Record) -> None:
        found, course = self._validate(), self.course
        metrics = (found.yolo.precision, found.yolo.recall, found.yolo.map50, found.yolo.map50_95)
        record.update(zip(METRICS, metrics, strict=True))
        record.update(zip(VAL, found.loss or (), strict=False))
        if found.fitness >= course.best_fitness:
            course.best_fitness, course.best_epoch = found.fitness, course.epoch
            self._save_weights("best.safetensors", record)
        patience = self.config.patience
        course.stopped = 0 < patience <= course.epoch - course.best_epoch

    def _validate(self) -> ValResult:
        return validate(
            self.ema.module, self.job.val, imgsz=self.config.imgsz, batch=2 * self.config.batch,
            device=str(self.device), half=self.config.amp, workers=self.config.workers,
            loss=self.job.objective.detection, coco=False,
        )  # fmt: skip

    def _publish(self) -> None:
        """Write everything; `state.pt` comes last, so whatever it says is already there."""
        course, terms, out = self.course, self.job.objective.terms, self.job.out
        write_csv(course.history, terms, out / "results.csv")
        finished = course.stopped or course.epoch == self.config.epochs
        if finished or course.epoch % self.config.checkpoint_interval == 0:
            self._save_weights("last.safetensors", course.history[-1])
            save_state(self.state(), out / STATE)
        if finished:
            draw_curves(course.history, terms, out / "curves.png")

    def _save_weights(self, name: str, record: Record) -> None:
        save_model(self.ema.module, self.job.out / name, {"imgsz": self.config.imgsz, "record": record})

    def _result(self) -> TrainResult:
        best, last = (self.job.out / name for name in ("best.safetensors", "last.safetensors"))
        self.log(f"best epoch {self.course.best_epoch + 1}, fitness {self.course.best_fitness:.4f}: {best}")
        return TrainResult(best, last, self.course.history[self.course.best_epoch], self.course.epoch)

    # -- kill and resume --------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "config": result_settings(self.config),
            "architecture": self.job.objective.model.arch.to_json(),
            "objective": self.job.objective.state_dict(),
            "gradients": [parameter.grad for parameter in self.job.objective.parameters()],
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "random": random_state(),
            "course": vars(self.course),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Become what `state` was taken from; the objective must have the same shape."""
        self.job.objective.load_state_dict(state["objective"])
        for parameter, gradient in zip(self.job.objective.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(self.device)
        self.ema.module.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        restore_random_state(state["random"])
        self.course = Course(**state["course"])


def _accelerator(device: torch.device, *, half: bool) -> Accelerator:
    """Of one training on `device`; float16 arithmetic on GPUs only, and only with `half`."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # accelerate takes the current GPU
    # a second training in this process may differ in device or arithmetic, which accelerate's shared state forbids
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    return Accelerator(cpu=device.type == "cpu", mixed_precision="fp16" if half and device.type == "cuda" else "no")


class _LossLog:
    """Loss terms of one epoch, kept where they were computed; read from a GPU only now and then."""

    def __init__(self, names: Sequence[str], epoch: int, device: torch.device) -> None:
        self._names, self._epoch, self._cheap = names, epoch, device.type == "cpu"
        self._sum = torch.zeros(len(names), device=device)
        self._unchecked: list[torch.Tensor] = []
        self._count = 0

    def add(self, terms: torch.Tensor) -> None:
        self._sum += terms
        self._count += 1
        self._unchecked.append(terms)
        if self._cheap or len(self._unchecked) == FINITE_CHECK_EVERY:
            self._check()

    def _check(self) -> None:
        rows, self._unchecked = self._unchecked, []
        if rows:
            require_finite(torch.stack(rows), self._names, epoch=self._epoch, first_batch=self._count - len(rows))

    def _means(self) -> dict[str, float]:
        return dict(zip(self._names, (self._sum / self._count).tolist(), strict=True))

    def means_if_cheap(self) -> dict[str, float] | None:
        """Means so far; None where reading them would make the host wait for the device."""
        return self._means() if self._cheap else None

    def close(self) -> Record:
        self._check()
        return {f"train/{name}_loss": value for name, value in self._means().items()}
