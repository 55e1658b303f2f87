"""One training or validation alone: train, distill, val."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from compress.cli.options import (
    FILE,
    SCALE,
    as_json,
    changes,
    data,
    device,
    imgsz,
    indexed,
    print_json,
    run_alone,
    run_folder,
    say,
    setting,
    settings,
)
from runtime.errors import UsageError


def training_options(stage: str) -> Callable[[Any], Any]:
    """The options that `train` and `distill` have in common; `stage` is the part of the recipe that they change."""
    options = [
        data,
        click.option("--weights", type=FILE, help="Checkpoint to start from; tensors that fit are copied."),
        click.option("--scale", "--cfg", type=SCALE, help="Size of the network; default that of --weights."),
        setting("--epochs", key=f"{stage}.epochs", help="Passes over the training images."),
        setting("--batch", "--batch-size", key=f"{stage}.batch", help="Images a batch."),
        imgsz(f"{stage}.imgsz"),
        device,
        setting("--workers", key=f"{stage}.workers", help="Threads that load data."),
        setting("--seed", key=f"{stage}.seed", help="Seed of every random number."),
        setting("--preset", key=f"{stage}.preset", help="Hyper-parameters to start from."),
        click.option("--resume", is_flag=True, help="Continue the newest run of this name, exactly where it was."),
        click.option("--project", type=FILE, help="Folder of the runs; default runs/train or runs/distill."),
        click.option("--name", default="exp", help="Folder of this run; a number is added where it exists."),
        click.option("--exist-ok", is_flag=True, help="Write into an existing folder of this name."),
        changes,
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _out(task: str, project: Path | None, name: str, exist_ok: bool, resume: bool) -> Path:
    return run_folder(project or Path("runs") / task, name, exist_ok=exist_ok, resume=resume)


@click.command()
@training_options("teacher")
def train(data: Path, weights: Path | None, scale: str | None, device: str, resume: bool, **folder: Any) -> None:
    """Train without a teacher."""
    from compress.stages.teacher import Config
    from compress.stages.teacher import train as run

    config = settings(Config, "teacher").teacher
    out = _out("train", resume=resume, **folder)
    run(config, data=indexed(data), out=out, weights=weights, scale=scale, device=device, resume=resume, log=say)
    _print_best(out)


@click.command()
@training_options("distill")
@click.option("--teacher", type=FILE, required=True, help="Checkpoint of the teacher.")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME=WEIGHT",
    help="Distillation loss, and NAME.SETTING=VALUE for its settings; repeatable.",
)
def distill(
    data: Path,
    weights: Path | None,
    scale: str | None,
    device: str,
    resume: bool,
    teacher: Path,
    losses: tuple[str, ...],
    **folder: Any,
) -> None:
    """Train a student against a frozen teacher."""
    from compress.stages.distill import STAGE, Inputs

    more: dict[str, Any] = {"student.scale": scale, "student.weights": weights, "device": device}
    if losses:
        more["distill.losses"] = loss_choices(losses)
    out = _out("distill", resume=resume, **folder)
    run_alone(STAGE, lambda: Inputs(indexed(data), teacher, resume), out, more)
    _print_best(out)


def loss_choices(given: Sequence[str]) -> dict[str, Any]:
    """("cwd=0.2", "cwd.tau=2") as the `losses` of a recipe. Raises UsageError for another form."""
    from compress.recipe import with_change

    raw: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals:
            raise UsageError(f"--loss {text!r}: expected NAME=WEIGHT", "For example --loss cwd=0.2")
        raw = with_change(raw, f"{key if '.' in key else f'{key}.weight'}={value}")
    return raw


def _print_best(out: Path) -> None:
    from compress.compute.device import is_first_process

    if is_first_process():
        click.echo(out / "best.safetensors")


@click.command()
@data
@click.option("--weights", type=FILE, required=True, help=".pt or .safetensors, or an .onnx, engine or bundle.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="val", help="Images to measure on.")
@imgsz(type=int, expose_value=True)
@click.option("--batch", "--batch-size", type=int, default=32, help="Images a batch.")
@click.option("--rect/--square", default=False, help="Rectangular batches, as YOLOv5 validates.")
@setting("--conf", "--conf-thres", key="bench.accuracy_conf", type=float, expose_value=True, help="Least score.")
@setting("--iou", "--iou-thres", key="export.iou", type=float, expose_value=True, help="IoU threshold of NMS.")
@setting("--max-det", key="export.max_det", type=int, expose_value=True, help="Most boxes of an image.")
@click.option("--single-label", is_flag=True, help="One class a box, as the shipped graph has it.")
@click.option("--annotations", type=FILE, help="COCO JSON for the COCO figures, in place of the text labels.")
@click.option("--half", is_flag=True, help="float16 network; GPU only.")
@device
@as_json
def val(as_json: bool, **options: Any) -> None:
    """Measure mAP by YOLOv5's protocol and by COCO's."""
    from compress.validate_file import validate_file

    result = validate_file(**options)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.to_text())
