"""One training or validation alone: train, distill, val."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from compress.cli.options import (
    FILE,
    as_json,
    batch,
    changes,
    data,
    device,
    imgsz,
    print_json,
    run_folder,
    say,
    settings,
)
from runtime.errors import UsageError

SCALES = click.Choice(["p", "n", "s", "m", "l", "x"])


def training_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `train` and `distill` have in common."""
    options = [
        data,
        click.option("--weights", type=FILE, help="Checkpoint to start from; tensors that fit are copied."),
        click.option("--scale", "--cfg", type=SCALES, help="Size of the network; default that of --weights."),
        click.option("--epochs", type=int),
        batch,
        imgsz,
        device,
        click.option("--workers", type=int, help="Threads that load data."),
        click.option("--seed", type=int),
        click.option("--resume", is_flag=True, help="Continue the newest run of this name, exactly where it was."),
        click.option("--project", type=FILE, help="Folder of the runs."),
        click.option("--name", default="exp", show_default=True),
        click.option("--exist-ok", is_flag=True, help="Write into an existing folder of this name."),
        changes,
    ]
    for option in reversed(options):
        command = option(command)
    return command


@click.command()
@training_options
@click.option("--preset", type=click.Choice(["finetune", "yolov5-low", "yolov5-med"]), help="Hyper-parameters.")
def train(preset: str | None, **options: Any) -> None:
    """Train without a teacher."""
    from compress.config import TrainConfig
    from compress.train import train as run

    _fit(run, TrainConfig, options, "train", preset=preset)


@click.command()
@training_options
@click.option("--teacher", type=FILE, required=True, help="Checkpoint of the teacher.")
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME=WEIGHT",
    help="Distillation loss, and NAME.SETTING=VALUE for its settings; repeatable.",
)
def distill(teacher: Path, losses: tuple[str, ...], **options: Any) -> None:
    """Train a student against a frozen teacher."""
    from compress.config import DistillConfig
    from compress.distill import distill as run

    _fit(run, DistillConfig, options, "distill", {"teacher": teacher}, losses=loss_choices(losses) or None)


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


def _fit(
    run: Callable[..., Any],
    model: type[Any],
    options: dict[str, Any],
    task: str,
    extra: dict[str, Any] | None = None,
    **given: Any,
) -> None:
    from compress.compute.device import is_first_process
    from compress.data import load_data

    keys = ("epochs", "batch", "imgsz", "workers", "seed")
    config = settings(model, given | {key: options[key] for key in keys}, options["changes"], task)
    out = run_folder(
        options["project"] or Path("runs") / task,
        options["name"],
        exist_ok=options["exist_ok"],
        resume=options["resume"],
    )
    result = run(
        config,
        data=load_data(options["data"]),
        out=out,
        weights=options["weights"],
        scale=options["scale"],
        device=options["device"],
        resume=options["resume"],
        log=say,
        **(extra or {}),
    )
    if is_first_process():
        click.echo(result.best)


@click.command()
@data
@click.option("--weights", type=FILE, required=True, help=".pt or .safetensors, or an .onnx, engine or bundle.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="val", show_default=True)
@click.option("--imgsz", "--img", type=int, default=640, show_default=True)
@click.option("--batch", "--batch-size", type=int, default=32, show_default=True)
@click.option("--rect/--square", default=False, show_default=True, help="Rectangular batches, as YOLOv5 validates.")
@click.option("--conf", "--conf-thres", type=float, default=0.001, show_default=True)
@click.option("--iou", "--iou-thres", type=float, default=0.6, show_default=True)
@click.option("--max-det", type=int, default=300, show_default=True)
@click.option("--single-label", is_flag=True, help="One class a box, as the shipped graph has it.")
@click.option("--annotations", type=FILE, help="COCO JSON for the COCO figures, in place of the text labels.")
@click.option("--half", is_flag=True, help="float16 network; GPU only.")
@device
@as_json
def val(as_json: bool, **options: Any) -> None:
    """Measure mAP by YOLOv5's protocol and by COCO's."""
    from compress.pipeline.validation import validate_file

    result = validate_file(**options)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(result.to_text())
