"""The cost of distillation: `python -m compress.training.step_cost --teacher n --student p --imgsz 320 --batch 16`.

Takes real steps of the real loop on one random batch, in several ways that take turns in random order, round by round:
plain training, the same beside a teacher whose outputs nobody compares, with the soft loss, with each feature loss on
top, and with the measurement of gradients. A round gives each way the median of its steps; ratios are of one round.
Prints a table; with --out it also writes step_cost.json and step_cost.md. Loading of data is not in it.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.formats import milliseconds
from benchmarks.latency import Durations
from benchmarks.statistics import bootstrap
from compress.compute.device import pick_device, synchronize
from compress.compute.numerics import flush_denormals
from compress.compute.threads import threads_restored
from compress.config import PRECISIONS, SCALES, DistillConfig
from compress.data.loader import Batch
from compress.losses.distill import LOSSES, FeatureLoss
from compress.models import Architecture, YOLOv5
from compress.training.loop import Job, Trainer
from compress.training.objective import Objective, detection_loss
from compress.training.ratio import EVERY, is_due
from compress.training.teacher import Teacher, build_losses
from runtime import machine
from runtime.files import atomic_write, write_json
from runtime.numbers import whole
from runtime.terminal import exit_code_of

CLASSES = 3
BOXES = 8
"""Labelled boxes of an image."""
PLAIN, TEACHER, SOFT, MEASURED = "plain", "plain + teacher", "soft", "soft, measured"
WARM_UP = 3
Milliseconds = dict[str, list[float]]
"""One value a round for each way: the median of its steps."""


class Way(NamedTuple):
    """One way to take a step."""

    losses: tuple[str, ...] = ()
    has_teacher: bool = True
    measures: bool = False


WAYS: dict[str, Way] = {
    PLAIN: Way(has_teacher=False),
    TEACHER: Way(),
    SOFT: Way(("soft",)),
    MEASURED: Way(("soft",), measures=True),
    **{f"soft + {name}": Way(("soft", name)) for name, loss in LOSSES.items() if issubclass(loss, FeatureLoss)},
}


class Steps:
    """Takes steps of one way; weights, statistics and moments move as in a training."""

    def __init__(self, way: Way, options: argparse.Namespace, folder: Path) -> None:
        names = tuple(f"class {number}" for number in range(CLASSES))
        torch.manual_seed(0)
        student, teacher = (YOLOv5(Architecture.of_scale(scale, names)) for scale in (options.student, options.teacher))
        student.init_detect_bias()
        config = DistillConfig.model_validate(
            {"losses": dict.fromkeys(way.losses, "auto"), "batch": options.batch, "imgsz": options.imgsz,
             "tensorboard": False, "precision": options.precision, "compile": options.compile,
             "cuda_graph": options.cuda_graph}
        )  # fmt: skip
        frozen = Teacher(teacher, options.device, precision=config.precision) if way.has_teacher else None
        losses = build_losses(student, frozen, config) if frozen and way.losses else {}
        objective = Objective(student, detection_loss(student, config), losses)
        data: Any = range(EVERY * options.batch)
        self.trainer = Trainer(Job(config, objective, data, (), folder, frozen), options.device, lambda _: None)
        self.trainer.wrapped.train()
        self.iteration = next(i for i in range(EVERY, 3 * EVERY) if is_due(i) == way.measures)
        self.batch = random_batch(options.batch, options.imgsz, self.trainer.device)

    def __call__(self) -> None:
        """One step, that of the optimiser included."""
        self.trainer.state.last_step = -self.iteration  # no batch waits for another
        self.trainer.train_batch(self.batch, self.iteration)
        synchronize(self.trainer.device)


def random_batch(count: int, imgsz: int, device: torch.device) -> Batch:
    """`count` images of noise, each with as many random boxes, on the device."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, imgsz, imgsz), generator=generator).to(torch.uint8)
    boxes = count * BOXES
    rows = (
        torch.arange(count).repeat_interleave(BOXES)[:, None].float(),
        torch.randint(CLASSES, (boxes, 1), generator=generator).float(),
        torch.rand(boxes, 2, generator=generator),
        0.05 + 0.3 * torch.rand(boxes, 2, generator=generator),
    )
    return Batch(images.to(device), torch.cat(rows, 1).to(device), tuple(range(count)))


def measure(
    ways: Mapping[str, Callable[[], None]],
    rounds: int,
    calls: int,
    rng: random.Random,
    clock: Callable[[], float] = time.perf_counter,
) -> Milliseconds:
    """Let the ways take turns; `clock` returns seconds."""

    def timed(step: Callable[[], None]) -> float:
        start = clock()
        step()
        return 1e3 * (clock() - start)

    for step in ways.values():
        for _ in range(WARM_UP):
            step()
    found: Milliseconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name in rng.sample(list(ways), len(ways)):
            found[name].append(median(timed(ways[name]) for _ in range(calls)))
    return found


def document(found: Milliseconds, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The measurement as plain JSON values."""
    rounds = {name: np.array(values) for name, values in found.items()}
    return {
        "measured": "python -m compress.training.step_cost",
        "machine": machine.facts(),
        "settings": dict(settings),
        "ways": {
            name: {"ms": _spread(values), f"times {TEACHER}": _ratio(values / rounds[TEACHER])}
            for name, values in rounds.items()
        },
        f"share of measurements, every {EVERY} steps": _ratio((rounds[MEASURED] - rounds[SOFT]) / EVERY / rounds[SOFT]),
    }


def _spread(values: Any) -> dict[str, Any]:
    durations = Durations.of(values)
    return {"median": float(np.median(values)), "min": durations.min, "max": durations.max, "rounds": durations.n}


def _ratio(values: Any) -> dict[str, float]:
    """The median over rounds and its 95 % interval by bootstrap."""
    low, high = bootstrap(values, np.median, rng=np.random.default_rng(0))
    return {"median": float(np.median(values)), "low": low, "high": high}


def to_markdown(found: Mapping[str, Any]) -> str:
    """A table with a line for each way, and a line on the measurements."""
    lines = [f"| step | ms (min to max) | times {TEACHER} [95 % interval] |", "|---|---|---|"]
    for name, way in found["ways"].items():
        ms, ratio = way["ms"], way[f"times {TEACHER}"]
        shown = f"{milliseconds(ms['median'])} ({milliseconds(ms['min'])} to {milliseconds(ms['max'])})"
        lines.append(f"| {name} | {shown} | {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}] |")
    share, told = next((value, key) for key, value in found.items() if key.startswith("share"))
    settings = found["settings"]
    return "\n".join(
        [
            *lines,
            "",
            f"The {told}: {share['median']:.2%} [{share['low']:.2%}, {share['high']:.2%}] of a step.",
            f"{settings['rounds']} rounds of {settings['calls']} steps each; {settings['teacher']} teaches "
            f"{settings['student']}, batch {settings['batch']}, {settings['imgsz']} pixels, on {settings['device']}.",
        ]
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m compress.training.step_cost", description=__doc__.splitlines()[0])
    made.add_argument("--teacher", default="n", choices=SCALES)
    made.add_argument("--student", default="p", choices=SCALES)
    made.add_argument("--imgsz", type=whole(32), default=320)
    made.add_argument("--batch", type=whole(1), default=16)
    made.add_argument("--rounds", type=whole(2), default=20)
    made.add_argument("--calls", type=whole(1), default=3, help="steps of a way in a round (default: 3)")
    made.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="by default all")
    made.add_argument("--threads", type=whole(1), default=1, help="compute threads on a CPU (default: 1)")
    made.add_argument("--device", default="auto")
    made.add_argument("--precision", choices=PRECISIONS, default="auto")
    made.add_argument("--compile", action="store_true", help="run the networks through torch.compile")
    made.add_argument("--cuda-graph", action="store_true", help="launch forward and backward as one CUDA graph")
    made.add_argument("--out", type=Path, help="folder for step_cost.json and step_cost.md")
    return made


def run(options: argparse.Namespace) -> int:
    options.device = str(pick_device(options.device))
    flush_denormals(print)
    wanted = {*options.ways, TEACHER, SOFT, MEASURED}
    with tempfile.TemporaryDirectory() as folder, threads_restored():
        torch.set_num_threads(options.threads)
        ways = {name: Steps(way, options, Path(folder)) for name, way in WAYS.items() if name in wanted}
        found = measure(ways, options.rounds, options.calls, random.Random(0))
    settings = {name: value for name, value in vars(options).items() if name not in ("out", "ways")}
    made = document(found, settings)
    table = to_markdown(made)
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "step_cost.json", made)
        with atomic_write(options.out / "step_cost.md") as temporary:
            temporary.write_text(table + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: run(parser().parse_args(arguments)))


if __name__ == "__main__":
    sys.exit(main())
