"""One step on files alone: export, quantize, build, bench."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli.options import FILE, as_json, changes, data, imgsz, print_json, say, settings
from runtime.errors import UsageError


@click.command()
@click.option("--weights", type=FILE, required=True, help="Checkpoint, .pt or .safetensors.")
@click.option("--data", type=FILE, help="data.yaml; its val images measure how many boxes must enter NMS.")
@imgsz
@click.option(
    "--frame", metavar="HxW", help="Bake the letterbox in: frames of this size in, boxes in frame pixels out."
)
@click.option("--out", type=FILE, default=Path("runs/export"), show_default=True)
@changes
@as_json
def export(
    weights: Path,
    data: Path | None,
    imgsz: int | None,
    frame: str | None,
    out: Path,
    changes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Checkpoint to model.onnx (frame in, boxes out) and model.yolov5.onnx (YOLOv5's conventions)."""
    from compress.config import ExportConfig
    from compress.data import load_data
    from compress.export import export as run
    from compress.pipeline.inputs import validation_of

    config = settings(ExportConfig, {"frame": frame and _frame(frame)}, changes, "export")
    validation = validation_of(load_data(data)) if data else None
    result = run(config, model=weights, out=out, imgsz=imgsz or 640, data=validation, log=say)
    if as_json:
        print_json(result.to_json())
    else:
        click.echo(f"{result.model_onnx}\n{result.yolov5_onnx}")


def _frame(text: str) -> list[int]:
    try:
        height, width = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise UsageError(f"--frame {text!r}: expected HEIGHTxWIDTH", "For example --frame 1080x1920") from None
    return [height, width]


@click.command()
@click.option("--model", "--weights", type=FILE, required=True, help="model.onnx that `edgestill export` wrote.")
@data
@click.option("--out", type=FILE, help="Folder for the flavours; default that of the model.")
@changes
@as_json
def quantize(model: Path, data: Path, out: Path | None, changes: tuple[str, ...], as_json: bool) -> None:
    """FP16 and INT8 flavours, calibrated on training images, each gated on its measured mAP."""
    from compress.config import BenchConfig, QuantizeConfig
    from compress.data import load_data
    from compress.pipeline.inputs import training_images, validation_of
    from compress.pipeline.measure import gate
    from compress.quantize import quantize as run

    config, given = settings(QuantizeConfig, {}, changes, "quantize"), load_data(data)
    flavours = run(
        config,
        model=model,
        images=training_images(given),
        out=out or model.parent,
        gate=gate(validation_of(given), BenchConfig()),
        log=say,
    )
    if as_json:
        print_json([flavour.to_json() for flavour in flavours])
    else:
        click.echo("\n".join(str(flavour.path) for flavour in flavours if flavour.kept))


@click.command()
@click.option("--model", "--weights", "models", type=FILE, multiple=True, required=True, help=".onnx file; repeatable.")
@click.option("--target", default="", help="For example sm86,sm89,sm120; tensorrt_rtx builds for them ahead of time.")
@click.option("--out", type=FILE, default=Path("runs/build"), show_default=True)
@changes
@as_json
def build(models: tuple[Path, ...], target: str, out: Path, changes: tuple[str, ...], as_json: bool) -> None:
    """ONNX to TensorRT plans with the model.json that they need on the device."""
    from compress.build import build as run
    from compress.config import BuildConfig
    from compress.flavours import PLAN_PRECISIONS
    from runtime.bundle import card_of

    given = {"targets": target.split(",") if target else None}
    config = settings(BuildConfig, given, changes, "build")
    cards = {model: card_of(model) for model in models}
    by_precision = {card.precision: model for model, card in cards.items()}
    if unbuildable := by_precision.keys() - set(config.precisions):
        raise UsageError(
            f"{min(unbuildable)} is no precision that TensorRT plans are built from",
            f"Known: {', '.join(PLAN_PRECISIONS)}",
        )
    plans = run(config, models=by_precision, out=out, card=next(iter(cards.values())), log=say)
    if as_json:
        print_json([plan.to_json() for plan in plans])
    else:
        click.echo(out)


@click.command()
@click.option(
    "--model", "--weights", "models", type=FILE, multiple=True, required=True, help="File or bundle; repeatable."
)
@data
@click.option("--out", type=FILE, default=Path("runs/bench"), show_default=True)
@changes
@as_json
def bench(models: tuple[Path, ...], data: Path, out: Path, changes: tuple[str, ...], as_json: bool) -> None:
    """Latency and mAP of each file, measured in one run; report.html, .md, .csv and .json."""
    from compress.config import BenchConfig
    from compress.pipeline.measure import bench_files

    report = bench_files(models, data, settings(BenchConfig, {}, changes, "bench"), out, say)
    if as_json:
        print_json(report)
    else:
        click.echo(out / "report.html")
