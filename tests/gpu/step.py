"""One real training step, way by way: `python3 tests/gpu/step.py [--out FILE.json]`.

A yolov5s learns from 32 random images of 640 pixels, mixed precision, by the product's own training loop. The ways take
turns in blocks, as long as there is time: labels alone; beside a yolov5l that teaches nothing; taught by its outputs,
also as a CUDA graph; taught by feat_mse and cwd, in plain torch and by the kernels. At the end the profiler tells how
long the GPU works in a step, and how much of the step it is.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

NEEDED = ("accelerate", "cv2", "pydantic", "safetensors", "torch", "yaml")
FEATURES = {"feat_mse": 1.0, "cwd": 10.0}


class Way(NamedTuple):
    """One way to train."""

    losses: Mapping[str, float] = {}
    """Distillation losses and their weights."""
    has_teacher: bool = True
    switch: str | None = None
    """Value of the kernels' switch."""
    settings: Mapping[str, Any] = {}


WAYS = {
    "labels": Way(has_teacher=False),
    "teacher": Way(),
    "soft": Way({"soft": 1.0}),
    "soft as a graph": Way({"soft": 1.0}, settings={"cuda_graph": True}),
    "features by torch": Way(FEATURES, switch="off"),
    "features by kernels": Way(FEATURES),
}
WHY = "why_no_kernel_time"
CLASSES = 80
BOXES = 8
"""Labelled boxes of an image."""
BLOCK = 5
WARM_UP = 3


def trainers_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A trainer for each way, with a student of its own; they share the teacher."""
    from compress.config import DistillConfig
    from compress.models import Architecture, YOLOv5
    from compress.training.loop import Job, Trainer
    from compress.training.objective import Objective, detection_loss
    from compress.training.teacher import Teacher, build_losses

    names = [f"class {i}" for i in range(CLASSES)]
    teacher = YOLOv5(Architecture.of_scale(options.teacher, names))
    config = DistillConfig(batch=options.batch, imgsz=options.imgsz, tensorboard=False)
    frozen = Teacher(teacher, options.device, precision=config.precision)

    def trainer(way: Way) -> Any:
        own = DistillConfig.model_validate(config.model_dump() | {"losses": way.losses} | way.settings)
        student = YOLOv5(Architecture.of_scale(options.student, names))
        student.init_detect_bias()
        losses = build_losses(student, frozen, own) if way.losses else {}
        objective = Objective(student, detection_loss(student, own), losses)
        items, beside = range(100 * options.batch), frozen if way.has_teacher else None
        made = Trainer(Job(own, objective, items, (), folder, teacher=beside), options.device, print)  # type: ignore[arg-type]
        made.wrapped.train()
        return made

    return {name: trainer(way) for name, way in WAYS.items()}


def batch_of(options: argparse.Namespace, device: Any) -> Any:
    """Random images and labels, on the device already."""
    import torch

    from compress.data.loader import Batch

    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (options.batch, 3, options.imgsz, options.imgsz), generator=generator)
    count = options.batch * BOXES
    targets = torch.cat(
        (
            torch.arange(options.batch).repeat_interleave(BOXES)[:, None],
            torch.randint(CLASSES, (count, 1), generator=generator),
            torch.rand(count, 2, generator=generator),
            0.05 + 0.3 * torch.rand(count, 2, generator=generator),
        ),
        1,
    )
    return Batch(images.to(torch.uint8).to(device), targets.float().to(device), tuple(range(options.batch)))


class Steps:
    """Takes steps and keeps what they cost."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        import torch

        torch.manual_seed(0)
        self.trainers = trainers_of(options, folder)
        self.device = self.trainers["teacher"].device
        self.batch = batch_of(options, self.device)
        self.taken = 0
        self.ms: dict[str, list[float]] = {name: [] for name in WAYS}
        self.peaks: dict[str, list[int]] = {name: [] for name in WAYS}
        self.terms: dict[str, list[float]] = {}

    def block(self, name: str, count: int, *, counts: bool = True) -> None:
        """`count` steps of one way."""
        import torch

        from compress.compute.device import synchronize

        switch(WAYS[name].switch)
        on_gpu = self.device.type == "cuda"
        synchronize(self.device)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spent = [self.step(name) for _ in range(count)]
        if counts:
            self.ms[name] += spent
            self.peaks[name].append(torch.cuda.max_memory_allocated() - before if on_gpu else 0)

    def add_gpu_work(self, ways: Mapping[str, dict[str, Any]]) -> None:
        """Enter the time of a step's kernels, their number, and the share of the step in which the GPU works."""
        from compress.kernels.bench_case import kernel_times
        from runtime.errors import one_line

        try:
            found = kernel_times([(functools.partial(self.profiled, name), 1) for name in ways])
        except Exception as error:  # what was timed is worth more than the profiler's reasons
            found = [{WHY: one_line(error)}] * len(ways)
        for way, work in zip(ways.values(), found, strict=True):
            way.update(work)
            if WHY not in work:
                way["busy"] = work["kernels_us"] / 1e3 / way["ms"]["p50"]

    def profiled(self, name: str, _: int) -> tuple[()]:
        switch(WAYS[name].switch)
        self.step(name)
        return ()

    def step(self, name: str) -> float:
        """Take a step. Returns its milliseconds."""
        from compress.compute.device import synchronize

        started = time.perf_counter()
        terms = self.trainers[name].train_batch(self.batch, self.taken)
        synchronize(self.device)
        spent = 1e3 * (time.perf_counter() - started)
        self.taken += 1
        self.terms[name] = [float(term) for term in terms]
        return spent


def switch(value: str | None) -> None:
    from compress.kernels.fused import SWITCH

    os.environ.pop(SWITCH, None)
    if value:
        os.environ[SWITCH] = value


def measure(options: argparse.Namespace, folder: Path, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The document. What is known of it before the profiler starts, which may not end, is given to `keep`."""
    until = time.monotonic() + options.seconds
    steps = Steps(options, folder)
    for name in WAYS:
        steps.block(name, WARM_UP, counts=False)
    take_turns(steps, options.steps, until)
    ways = {name: found(steps, name) for name in WAYS}
    keep(document_of(options, ways))
    steps.add_gpu_work(ways)
    return document_of(options, ways)


def take_turns(steps: Steps, count: int, until: float) -> None:
    """`count` steps of each way in blocks; after the first round only those rounds that end before `until`."""
    from compress.kernels.bench_case import shuffled_rounds

    size, rng, longest = min(BLOCK, count), random.Random(0), 0.0
    for _ in range(count // size):
        started = time.monotonic()
        if longest and started + longest > until:
            break
        for name in shuffled_rounds(list(WAYS), 1, rng):
            steps.block(name, size)
        longest = max(longest, time.monotonic() - started)


def document_of(options: argparse.Namespace, ways: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    from runtime import machine

    bare = next(iter(ways.values()))["ms"]["p50"]
    return {
        "measured": "tests/gpu/step.py",
        "machine": machine.facts(),
        "settings": {k: v for k, v in vars(options).items() if k not in ("out", "seconds")},
        "ways": {name: way | {"more_ms": way["ms"]["p50"] - bare} for name, way in ways.items()},
    }


def found(steps: Steps, name: str) -> dict[str, Any]:
    """The figures of one way."""
    from compress.kernels.bench_case import quantiles

    return {
        "losses": dict(WAYS[name].losses),
        "ms": quantiles(steps.ms[name]),
        "samples": len(steps.ms[name]),
        "peak_extra_bytes": max(steps.peaks[name]),
        "terms": [str(term) for term in steps.terms[name]],
    }


COLUMNS = {
    "p20 ms": (1, 1, lambda way: way["ms"]["p20"]),
    "p50": (1, 1, lambda way: way["ms"]["p50"]),
    "p80": (1, 1, lambda way: way["ms"]["p80"]),
    "more": (1, 1, lambda way: way["more_ms"]),
    "GPU ms": (1e-3, 1, lambda way: way.get("kernels_us")),
    "busy %": (100, 0, lambda way: way.get("busy")),
    "kernels": (1, 0, lambda way: way.get("kernels")),
    "MiB": (2**-20, 0, lambda way: way["peak_extra_bytes"]),
}
"""Title -> factor, decimals, and the value of a way: of a step, beyond the first way's, and beside all that stays."""


def table(document: dict[str, Any]) -> str:
    """A line for each way, and one for each whose kernels could not be timed."""
    ways = document["ways"]
    lines = [f"{'a step':20}" + "".join(f"{title:>9}" for title in COLUMNS)]
    for name, way in ways.items():
        values = [(factor, places, read(way)) for factor, places, read in COLUMNS.values()]
        cells = [f"{'-':>9}" if x is None else f"{factor * x:9.{places}f}" for factor, places, x in values]
        lines.append(f"{name:20}" + "".join(cells))
    lines += [f"{name}: {way[WHY]}" for name, way in ways.items() if WHY in way]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--teacher", default="l")
    parser.add_argument("--student", default="s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20, help="of each way")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of work before the profiler starts")
    options = parser.parse_args()
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"no distillation step: {', '.join(absent)} not installed")
        return 1
    from runtime.errors import EdgestillError
    from runtime.files import write_json

    def keep(document: dict[str, Any]) -> None:
        if options.out:
            write_json(options.out, document)

    try:
        with tempfile.TemporaryDirectory() as folder:
            document = measure(options, Path(folder), keep)
    except (ImportError, EdgestillError) as error:
        print(f"no distillation step: {error}")
        return 1
    print(table(document))
    keep(document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
