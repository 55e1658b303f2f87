"""The training loop, for plain training and for distillation, by a frozen teacher or one that trains too.

In: an objective (model and losses), samples, settings, a teacher or none. Out, in the run's folder: `best.safetensors`
and `last.safetensors` (EMA weights), `state.pt` (everything to resume), `results.csv`, `curves.png`, `tensorboard/`.

Written on accelerate: one process or several is a matter of how it is launched. Batches are divided among processes by
the data loader itself, since every batch is a function of (seed, epoch, number).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from compress.compute.device import convolutions_measured, pick_device, to_device
from compress.compute.resize import reduced
from compress.compute.threads import ThreadChoice, fixed_threads, threads_restored
from compress.config import TrainConfig
from compress.data.dataset import Sample
from compress.data.loader import Batch, batch_count
from compress.data.train_dataset import TrainItems
from compress.data.train_loader import TrainLoader, open_loader, worker_count
from compress.evaluate import ValResult, as_network_input, evaluate
from compress.log import Log
from compress.losses.detection import targets_on
from compress.losses.distill import Outputs
from compress.models import YOLOv5
from compress.models.checkpoint import save_model
from compress.processes import process_count
from compress.training.compiled import compile_failures_named, compiled
from compress.training.curves import METRICS, RATES, VAL, Record, Scalars, draw_curves, share_column, write_csv
from compress.training.ema import Ema
from compress.training.epoch_losses import EpochLosses
from compress.training.graphs import BatchGraphs
from compress.training.objective import Objective
from compress.training.optimizer import build_optimizer, freeze, set_rates
from compress.training.progress import Progress, epoch_line, open_progress
from compress.training.ratio import is_due
from compress.training.resume import BEST, LAST, Origin
from compress.training.schedule import Schedule, fading_factor, mosaic_epochs
from compress.training.state import STATE, random_state, restore_random_state, save_state
from compress.training.statistics import SoundStatistics
from compress.training.teacher import AnyTeacher
from compress.training.together import decided_by_first, lost_processes_named, new_accelerator, require_shares
from runtime.errors import EdgestillError


@dataclass(frozen=True)
class Job:
    """One training: its settings, what it trains on what, and where its files go.

    Make it before the network takes its first batch: raises UsageError as `require_shares` does.
    """

    config: TrainConfig
    objective: Objective
    train: TrainItems
    val: Sequence[Sample]
    out: Path
    teacher: AnyTeacher | None = None
    """A frozen one; a teacher that trains too is part of the objective."""
    teacher_rate: float = 1.0
    """Learning rate of a teacher that trains too, as a share of the student's."""
    origin: Origin | None = None
    """Kept in the state, so that it is resumed from the same; a training that nobody resumes needs none."""

    def __post_init__(self) -> None:
        require_shares(self.objective.model, self.config, len(self.train), process_count())


@dataclass(frozen=True)
class TrainResult:
    """Files and figures of a finished training."""

    best: Path
    last: Path
    metrics: dict[str, float]
    """Row of results.csv of the best epoch."""
    epochs: int
    """Epochs that were trained, fewer than asked after an early stop."""
    steps: int
    """Batches of these epochs."""
    seconds: float
    """Time of these epochs with their validation; of one that was killed and resumed, of all its parts."""

    @property
    def figures(self) -> dict[str, float]:
        """The best epoch's figures and the time, as the manifest of a stage keeps them."""
        map50, map50_95 = (self.metrics[f"metrics/mAP_{name}"] for name in ("0.5", "0.5:0.95"))
        figures = {"epochs": self.epochs, "steps": self.steps, "map50": map50, "map50_95": map50_95}
        return figures | {"seconds": round(self.seconds, 3)}


@dataclass
class TrainState:
    """Progress of a training: all that changes from epoch to epoch beside tensors."""

    epoch: int = 0
    """The next epoch to train, from 0."""
    last_step: int = -1
    """Iteration of the newest optimiser step."""
    best_fitness: float = -1.0
    best_epoch: int = -1
    """-1 until one is validated."""
    stopped: bool = False
    history: list[Record] = field(default_factory=list)
    threads: int = 0
    """Compute threads of the next epoch on a CPU; 0 until they are chosen."""
    seconds: float = 0.0
    """Time of the epochs that are done; what a killed run had begun of the next is not in it."""


def run_job(job: Job, *, device: str = "auto", resume: dict[str, Any] | None = None, log: Log = print) -> TrainResult:
    """Train until the last epoch or an early stop, from the state `resume` (of `read_resume`) where it is given.

    Raises EdgestillError when a loss is not finite, the memory is full, a file cannot be written or another process of
    the training has ended; the files then hold the last good epoch.
    """
    trainer = Trainer(job, device, log)
    if resume:
        trainer.load_state_dict(resume)
    try:
        with lost_processes_named(), compile_failures_named():
            return trainer.run()
    except torch.OutOfMemoryError as error:
        where = f"batch {job.config.batch} at {job.config.imgsz} pixels"
        raise EdgestillError(f"the GPU's memory is full: {where} do not fit", "Lower batch or imgsz") from error


class Trainer:
    """Trains a job: `run` takes epochs, an epoch takes batches, a batch may end in a step of the optimiser."""

    def __init__(self, job: Job, device: str, log: Log) -> None:
        self.job, self.config, self.state = job, job.config, TrainState()
        self.accelerator = new_accelerator(pick_device(device), self.config.precision)
        self.device, self.processes = self.accelerator.device, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.log: Log = log if self.is_main else lambda _: None
        self.batches = batch_count(len(job.train), self.config.batch)
        self.schedule = Schedule(self.config.optimizer, self.config.epochs, self.batches, self.config.batch)
        freeze(job.objective.model.model, self.config.freeze)
        self.objective = to_device(job.objective, self.device)
        self.thread_choice = ThreadChoice()
        own = self.config.optimizer
        self.averages = [Ema(part.model, own.ema_decay, own.ema_ramp) for part in self.objective.parts]
        self.clipped = [self.objective.own_parameters(), *([*o.parameters()] for o in self.objective.parts[1:])]
        optimizer = build_optimizer(
            self.objective, own, self.schedule.weight_decay, slower=self.objective.teacher, rate=job.teacher_rate
        )
        # `wrapped` only runs the objective: in mixed precision, its gradients averaged over the processes
        self.wrapped, self.optimizer = self.accelerator.prepare(self.objective, optimizer)
        self.statistics = [SoundStatistics(part.model) for part in self.objective.parts] if self.skips else []
        self.teacher: Callable[[Tensor], Outputs] | None = job.teacher
        if self.config.compile:
            self._compile()
        self.graphs = BatchGraphs(self.add_gradients, self.device) if self._records_graphs() else None
        self._counted_until = time.perf_counter()

    @property
    def ema(self) -> Ema[YOLOv5]:
        """The average that is validated and shipped: the student's."""
        return self.averages[0]

    @property
    def skips(self) -> bool:
        """Whether a step without finite gradients moves no weight: only a gradient scaler sees to that."""
        return self.accelerator.scaler is not None

    @property
    def finished(self) -> bool:
        return self.state.stopped or self.state.epoch >= self.config.epochs

    def _compile(self) -> None:
        """Run the networks as compiled code; a teacher with files of other libraries stays as it is."""
        self.objective.compile_networks()
        if self.job.teacher and self.job.teacher.runs_in_torch:
            self.teacher = compiled(self.job.teacher.__call__)

    def _records_graphs(self) -> bool:
        """Whether batches run as CUDA graphs. Logs what stands against it where the settings ask for them."""
        obstacles = {
            "the device is a CPU": self.device.type == "cpu",
            f"{self.processes} processes exchange gradients": self.processes > 1,
            "a teacher is an ONNX file": self.job.teacher is not None and not self.job.teacher.runs_in_torch,
            **{f"loss {name} draws random numbers": not loss.replays for name, loss in self._losses()},
        }
        found = [obstacle for obstacle, stands in obstacles.items() if stands]
        if self.config.cuda_graph and found:
            self.log(f"cuda_graph is left out: {found[0]}")
        return self.config.cuda_graph and not found

    def _losses(self) -> Iterable[tuple[str, Any]]:
        return self.objective.losses.items()

    # -- training ---------------------------------------------------------------------------------

    def run(self) -> TrainResult:
        """Train, validate and write files until the training is finished."""
        scalars = Scalars(
            self.job.out / "tensorboard", on=self.config.tensorboard and self.is_main, start=self.state.epoch
        )
        progress = open_progress(self.config.epochs, shown=self.is_main)
        self._counted_until = time.perf_counter()
        decided_by_first(self.accelerator, self._save_best)
        with scalars, progress, threads_restored(), closing(self.loader):
            self.choose_threads()
            while not self.finished:
                started = time.perf_counter()
                record = self.train_epoch(progress)
                seconds = time.perf_counter() - started
                self.close_epoch(record)
                scalars.add(record)
                self.log(epoch_line(record, self.config.epochs, seconds, len(self.job.train)))
        return self._result()

    def train_epoch(self, progress: Progress) -> Record:
        """Train on every batch of the epoch. Returns its losses and learning rates."""
        epoch = self.state.epoch
        cheap = self.device.type == "cpu"
        losses = EpochLosses(self.objective.terms, epoch, self.device, cheap=cheap, skips=self.skips)
        self.wrapped.train()
        progress.epoch(epoch + 1, self.batches)
        for number, batch in enumerate(self.epoch_batches()):
            losses.add(self.train_batch(batch, epoch * self.batches + number, last=number + 1 == self.batches))
            progress.batch(losses.means_if_cheap())
        rates = {key: group["lr"] for key, group in zip(RATES, self.optimizer.param_groups, strict=False)}
        record = {"epoch": float(epoch), **losses.close(), **rates, **self._shares()}
        if losses.skipped:
            self.log(f"epoch {epoch + 1}: {losses.skipped} of {self.batches} batches overflowed and were skipped")
        return record

    def _shares(self) -> Record:
        """The gradient of each distillation loss as a share of the reference's, when last measured."""
        measured = self.objective.weights.measured.tolist()
        return {share_column(name): share for name, share in zip(self.objective.losses, measured, strict=True)}

    @property
    def workers(self) -> int:
        """Threads or processes that load data."""
        return worker_count(self.config.workers, self.device)

    @cached_property
    def loader(self) -> TrainLoader:
        """The share of this process in each batch; `run` closes it."""
        return open_loader(
            self.job.train, batch=self.config.batch, epochs=self.config.epochs,
            mosaic_epochs=mosaic_epochs(self.config.augment, self.config.epochs),
            workers=self.workers, device=self.device,
            rank=self.accelerator.process_index, world=self.processes,
        )  # fmt: skip

    def epoch_batches(self) -> Iterator[Batch]:
        """The batches of the epoch."""
        return self.loader.epoch(self.state.epoch)

    def train_batch(self, batch: Batch, iteration: int, *, last: bool = True) -> Tensor:
        """Forward and backward, and a step of the optimiser where one is due. Returns the loss terms, detached.

        `iteration` counts batches over the whole training; `last` says that the batch is the last of its epoch.
        """
        rates = self.schedule.at(iteration)
        set_rates(self.optimizer, rates)
        due = iteration - self.state.last_step >= rates.accumulate
        run, targets = self.graphs or self.add_gradients, targets_on(self.device, batch.targets)
        with self._exchange_gradients(due or last), convolutions_measured():
            terms = run(batch.images, targets, self._factors(), batch.labelled, is_due(iteration))
        if due:
            self.step(iteration)
        return terms

    def add_gradients(
        self, images: Tensor, targets: Tensor, factors: tuple[float, ...], labelled: int | None, measure: bool
    ) -> Tensor:
        """Add the gradients of one batch to the pending ones. Returns the loss terms, detached.

        `images` are uint8 and may be on the host, `targets` are those of `targets_on`.
        """
        pixels = as_network_input(images, self.device)
        teacher_outputs, seen = self.teacher_outputs(pixels), reduced(pixels, self.config.imgsz)
        loss = self.wrapped(seen, targets, teacher_outputs, factors, self._upstream(), measure, labelled)
        self.backward(loss.total)
        for statistics in self.statistics:
            statistics.keep_if(loss.total.isfinite())
        return loss.terms

    def _exchange_gradients(self, wanted: bool) -> AbstractContextManager[Any]:
        """Processes exchange gradients only where a step, or a saved state, needs them."""
        return nullcontext() if wanted else self.accelerator.no_sync(self.wrapped)

    def teacher_outputs(self, images: Tensor) -> Outputs | None:
        """The teacher's outputs for float images (B, 3, S, S) as loaded, without gradient; None without a teacher."""
        return self.teacher(images) if self.teacher else None

    def _factors(self) -> tuple[float, ...]:
        """The factor of each distillation loss in the running epoch."""
        return tuple(fading_factor(self.state.epoch, self.config.epochs, loss.until) for _, loss in self._losses())

    def _upstream(self) -> Tensor | None:
        """The gradient that a batch's loss will get: the processes, times the gradient scaler's factor if there is one.
        None on a CPU without a scaler, where no loss computes gradients ahead.
        """
        scaler = self.accelerator.scaler
        if scaler is None and self.device.type == "cpu":
            return None
        ones = torch.ones((), device=self.device)
        return (scaler.scale(ones) if scaler else ones) * self.processes

    def backward(self, total: Tensor) -> None:
        """Add the loss's gradients to the pending ones.

        The processes' gradients are averaged; times their number they add up, as one process would have it.
        """
        self.accelerator.backward(total * self.processes)

    def step(self, iteration: int) -> None:
        """Move the weights by the pending gradients, clear these, and let the average follow."""
        self.accelerator.unscale_gradients()
        self.clip()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.graphs is None)  # a graph adds to the gradients where they are
        for average in self.averages:
            average.update()
        self.state.last_step = iteration

    def clip(self) -> None:
        """Limit the norm of each network's gradients apart: large ones of a teacher must not slow the student."""
        for parameters in self.clipped:
            clip_grad_norm_(parameters, self.config.optimizer.clip_norm, foreach=True)

    # -- compute threads --------------------------------------------------------------------------

    def choose_threads(self) -> None:
        """Set the compute threads of the next epoch: the user's number, else that of the state, measured now and then.

        Equal numbers give equal bits. A resumed training begins with its state's number, so it repeats what was lost;
        where the machine's load changes, only a number that the user sets keeps two trainings equal to the last bit.
        """
        if self.device.type != "cpu":
            return
        fixed, before = fixed_threads(self.config.threads), self.state.threads
        if not fixed and self.processes == 1:
            self.state.threads = self.thread_choice.best(self._step_of_a_copy, before)
            if self.state.threads != before:
                self.log(f"compute threads: {self.state.threads}, measured to serve this network best now")
        else:
            self.state.threads = fixed or torch.get_num_threads()
        torch.set_num_threads(self.state.threads)

    def _step_of_a_copy(self) -> Callable[[], None]:
        """The networks' work of one batch; the training's weights, statistics and random numbers stay as they are."""
        models = [copy.deepcopy(part.model).train() for part in self.objective.parts]
        side = self.config.image_side
        shape = min(self.config.batch, len(self.job.train)), 3, side, side
        images = torch.linspace(0, 1, math.prod(shape)).view(shape).contiguous(memory_format=torch.channels_last)

        def work() -> None:
            self.teacher_outputs(images)
            seen = reduced(images, self.config.imgsz)
            torch.stack([level.square().mean() for model in models for level in model(seen)]).sum().backward()

        return work

    # -- the end of an epoch ----------------------------------------------------------------------

    def close_epoch(self, record: Record) -> None:
        """Validate where it is due and write the files; the first process does it, and decides for all."""
        self.state = decided_by_first(self.accelerator, lambda: self._closed_epoch(record))

    def _closed_epoch(self, record: Record) -> TrainState:
        if self._validation_is_due():
            self._validate(record)
        self.state.history.append(record)
        self.state.epoch += 1
        if not self.finished:
            self.choose_threads()
        self._count_seconds()
        self._write_files()
        return self.state

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.state.seconds += now - self._counted_until
        self._counted_until = now

    def _validation_is_due(self) -> bool:
        done = self.state.epoch + 1
        return done % self.config.val_interval == 0 or done == self.config.epochs

    def _validate(self, record: Record) -> None:
        """Add the averaged weights' accuracy to `record`; note if it is the best, stop if none get better."""
        found, state = self._accuracy(), self.state
        metrics = (found.yolo.precision, found.yolo.recall, found.yolo.map50, found.yolo.map50_95)
        record.update(zip(METRICS, metrics, strict=True))
        record.update(zip(VAL, found.loss or (), strict=False))
        if found.fitness >= state.best_fitness:
            state.best_fitness, state.best_epoch = found.fitness, state.epoch
        state.stopped = 0 < self.config.patience <= state.epoch - state.best_epoch

    def _accuracy(self) -> ValResult:
        return evaluate(
            self.ema.module, self.job.val, imgsz=self.config.imgsz, batch=2 * self.config.batch,
            device=self.device, precision=self.config.precision, workers=self.workers,
            loss=self.objective.detection, coco=False,
        )  # fmt: skip

    def _write_files(self) -> None:
        """Write everything; `state.pt` comes behind all that it tells of, but for the best weights."""
        state, terms, out = self.state, self.objective.terms, self.job.out
        write_csv(state.history, terms, out / "results.csv")
        if self.finished:
            draw_curves(state.history, terms, out / "curves.png", self.objective.reference)
        if self.finished or self._is_best or state.epoch % self.config.checkpoint_interval == 0:
            self._save_weights(LAST, state.history[-1])
            save_state(self.state_dict(), out / STATE)
        self._save_best()

    @property
    def _is_best(self) -> bool:
        """Whether the newest epoch is the best of all that were validated."""
        return 0 <= self.state.best_epoch == self.state.epoch - 1

    def _save_best(self) -> None:
        """Save the averaged weights as the best, if they are.

        The state has them too, so a training that was killed behind it saves them when it goes on. The other way round
        a best epoch could be lost to the state and, on a GPU, not come again with the same bits.
        """
        if self._is_best:
            self._save_weights(BEST, self.state.history[-1])

    def _save_weights(self, name: str, record: Record) -> None:
        student, *teacher = self.averages
        save_model(student.module, self.job.out / name, {"imgsz": self.config.imgsz, "record": record})
        for average in teacher:
            save_model(average.module, self.job.out / of_teacher(name), {"imgsz": self.config.imgsz})

    def _result(self) -> TrainResult:
        best, last = (self.job.out / name for name in (BEST, LAST))
        self.log(f"best epoch {self.state.best_epoch + 1}, fitness {self.state.best_fitness:.4f}: {best}")
        done, record = self.state.epoch, self.state.history[self.state.best_epoch]
        return TrainResult(best, last, record, done, done * self.batches, self.state.seconds)

    # -- kill and resume --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on."""
        return {
            "config": self.config.model_dump(mode="json"),
            "origin": asdict(self.job.origin) if self.job.origin else None,
            "architecture": self.objective.model.arch.to_json(),
            "objective": self.objective.state_dict(),
            "gradients": [parameter.grad for parameter in self.objective.parameters()],
            "ema": [average.module.state_dict() for average in self.averages],
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "random": random_state(),
            "train_state": vars(self.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which an objective of the same shape gave."""
        self.objective.load_state_dict(state["objective"])
        for parameter, gradient in zip(self.objective.parameters(), state["gradients"], strict=True):
            parameter.grad = None if gradient is None else gradient.to(self.device)
        for average, module in zip(self.averages, state["ema"], strict=True):
            average.module.load_state_dict(module)
            average.updates = state["ema_updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for statistics in self.statistics:
            statistics.keep()
        restore_random_state(state["random"])
        self.state = TrainState(**state["train_state"])


def of_teacher(name: str) -> str:
    """The file of a teacher that trains too, beside the student's of this name."""
    return f"teacher_{name}"
