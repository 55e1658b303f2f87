"""One real distillation step with and without the kernels: `python3 tests/gpu/step.py [--out FILE.json]`.

A yolov5l teaches a yolov5s by feat_mse and cwd, 32 random images of 640 pixels, mixed precision, by the product's own
training loop. Three ways take turns in blocks: the loss left out (the teacher still runs), plain torch, the kernels.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEEDED = ("accelerate", "cv2", "pydantic", "safetensors", "torch", "yaml")
MODES = {"loss off": None, "reference": "off", "kernels": None}
"""Name -> value of the switch."""
LOSSES = {"feat_mse": 1.0, "cwd": 10.0}
CLASSES = 80
BOXES = 8
"""Labelled boxes of an image."""
BLOCK = 5
WARM_UP = 3


def trainers_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A trainer of plain training beside the teacher, and one of distillation, which two ways share."""
    from compress.config import DistillConfig
    from compress.models import Architecture, YOLOv5
    from compress.training.loop import Job, Trainer
    from compress.training.objective import Objective, detection_loss
    from compress.training.teacher import Teacher, build_losses

    names = [f"class {i}" for i in range(CLASSES)]
    teacher = YOLOv5(Architecture.of_scale(options.teacher, names))
    config = DistillConfig(losses=LOSSES, batch=options.batch, imgsz=options.imgsz, tensorboard=False)
    frozen = Teacher(teacher, options.device, precision=config.precision)

    def trainer(distils: bool) -> Any:
        student = YOLOv5(Architecture.of_scale(options.student, names))
        student.init_detect_bias()
        detection = detection_loss(student, config)
        losses = build_losses(student, frozen, config) if distils else {}
        objective = Objective(student, detection, losses)
        job = Job(config, objective, range(100 * options.batch), (), folder, teacher=frozen)  # type: ignore[arg-type]
        made = Trainer(job, options.device, print)
        made.wrapped.train()
        return made

    plain, distilling = trainer(False), trainer(True)
    return {name: plain if name == "loss off" else distilling for name in MODES}


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
        self.device = self.trainers["kernels"].device
        self.batch = batch_of(options, self.device)
        self.taken = 0
        self.ms: dict[str, list[float]] = {name: [] for name in MODES}
        self.peaks: dict[str, list[int]] = {name: [] for name in MODES}
        self.terms: dict[str, list[float]] = {}

    def block(self, name: str, count: int, *, counts: bool = True) -> None:
        """`count` steps of one way."""
        import torch

        from compress.compute.device import synchronize

        switch(MODES[name])
        on_gpu = self.device.type == "cuda"
        synchronize(self.device)
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        spent = [self.step(name) for _ in range(count)]
        if counts:
            self.ms[name] += spent
            self.peaks[name].append(torch.cuda.max_memory_allocated() - before if on_gpu else 0)

    def step(self, name: str) -> float:
        """Milliseconds."""
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


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from compress.kernels.bench_case import quantiles, shuffled_rounds
    from runtime import machine

    steps = Steps(options, folder)
    for name in MODES:
        steps.block(name, WARM_UP, counts=False)
    size = min(BLOCK, options.steps)
    for name in shuffled_rounds(list(MODES), options.steps // size, random.Random(0)):
        steps.block(name, size)
    return {
        "measured": "tests/gpu/step.py",
        "machine": machine.facts(),
        "settings": {k: v for k, v in vars(options).items() if k != "out"} | {"losses": LOSSES},
        "ways": {
            name: {
                "ms": quantiles(steps.ms[name]),
                "samples": len(steps.ms[name]),
                "peak_extra_bytes": max(steps.peaks[name]),
                "terms": [str(term) for term in steps.terms[name]],
            }
            for name in MODES
        },
    }


def table(document: dict[str, Any]) -> str:
    """A line for each way; the last words are what the loss costs beyond the step without it."""
    ways = document["ways"]
    bare = ways["loss off"]["ms"]["p50"]
    return "\n".join(
        f"{name:10} {way['ms']['p20']:8.1f} {way['ms']['p50']:8.1f} {way['ms']['p80']:8.1f} ms per step (p20 p50 p80), "
        f"{way['peak_extra_bytes'] / 2**20:8.0f} MiB at the peak, loss {way['ms']['p50'] - bare:+.1f} ms"
        for name, way in ways.items()
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--teacher", default="l")
    parser.add_argument("--student", default="s")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--steps", type=int, default=20, help="of each way")
    options = parser.parse_args()
    if absent := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"no distillation step: {', '.join(absent)} not installed")
        return 1
    from runtime.errors import EdgestillError
    from runtime.files import write_json

    try:
        with tempfile.TemporaryDirectory() as folder:
            document = measure(options, Path(folder))
    except (ImportError, EdgestillError) as error:
        print(f"no distillation step: {error}")
        return 1
    print(table(document))
    if options.out:
        write_json(options.out, document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
