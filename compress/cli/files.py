"""One stage on files alone: export, quantize, build, bench."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import click

from compress.cli.options import (
    FILE,
    IMGSZ_OPTIONS,
    SizedCommand,
    as_json,
    backend,
    changes,
    data,
    flag,
    indexed,
    numbered,
    run_alone,
    run_folder,
    say,
    setting,
    setting_is_given,
    show,
)
from runtime.errors import UsageError
from runtime.files import read_json
from runtime.identity import OccupiedError


@click.command(cls=SizedCommand)
@click.option("--weights", type=FILE, required=True, help="Checkpoint, .pt or .safetensors.")
@click.option("--data", type=FILE, help="data.yaml; its val images measure how many boxes must enter NMS.")
@setting(*IMGSZ_OPTIONS, key="export.imgsz", metavar="H [W]", help="Height and width in pixels; one number is both.")
@setting("--batch-size", "--batch", key="export.batch", help="Images of one call.")
@flag("--dynamic", key="export.dynamic", help="Any number of images a call; model.yolov5.onnx takes any size, too.")
@flag("--half", key="export.half", help="model.yolov5.onnx in float16; `quantize` makes model.fp16.onnx.")
@setting("--opset", key="export.opset", help="ONNX operator set of model.yolov5.onnx; model.onnx has 17 to 20.")
@click.option(
    "--simplify",
    is_flag=True,
    expose_value=False,
    callback=lambda _, __, given: say("--simplify: the files are written without nodes to fold") if given else None,
    help="For those who are used to it: the files are written without nodes to fold.",
)
@setting(
    "--frame",
    key="export.frame",
    metavar="H W",
    help="Letterbox inside the graph: frames of this size in, their boxes out.",
)
@click.option("--out", type=FILE, help="Folder to write into; default runs/export, or a new one beside other models.")
@changes
@as_json
def export(weights: Path, data: Path | None, out: Path | None, as_json: bool) -> None:
    """Checkpoint to model.onnx (frame in, boxes out) and model.yolov5.onnx (YOLOv5's conventions)."""
    from compress.inputs import CONVENTIONAL, SHIPPED, validation_of
    from compress.stages.export import STAGE, Inputs

    inputs = cache(lambda: Inputs(weights, validation_of(indexed(data, "val")) if data else None))
    folder = into(out, Path("runs/export"), lambda target: run_alone(STAGE, inputs, target))
    show(read_json(folder / "export.json"), f"{folder / SHIPPED}\n{folder / CONVENTIONAL}", as_json)


def into(out: Path | None, default: Path, work: Callable[[Path], None]) -> Path:
    """Do the work in `out`; where none was named, in the first of `default`, `default2`, ... without another model."""
    for folder in (out,) if out else numbered(default):
        try:
            work(folder)
        except OccupiedError as error:
            if out:
                raise
            say(f"{error.message}; trying the next folder")
        else:
            return folder
    raise UsageError(f"{default} and the folders after it hold other models", "Choose a folder with --out")


@click.command()
@click.option("--model", "--weights", type=FILE, required=True, help="model.onnx that `edgestill export` wrote.")
@data
@click.option("--out", type=FILE, help="Folder for the flavours; default that of the model.")
@changes
@as_json
def quantize(model: Path, data: Path, out: Path | None, as_json: bool) -> None:
    """FP16 and INT8 flavours, calibrated on training images, each judged by its measured mAP."""
    from compress.data.index import JUDGES
    from compress.flavours import REFERENCE
    from compress.inputs import CALIBRATED
    from compress.stages.quantize import STAGE, Inputs

    target = out or model.parent
    run_alone(STAGE, lambda: Inputs(model, indexed(data, labelled=JUDGES)), target)
    files = read_json(target / CALIBRATED)
    kept = [model if file["name"] == REFERENCE else target / file["file"] for file in files if file["kept"]]
    show(files, "\n".join(map(str, kept)), as_json)


@click.command()
@click.option("--model", "--weights", "models", type=FILE, multiple=True, required=True, help=".onnx file; repeatable.")
@setting("--targets", "--target", key="build.targets", metavar="SM,...", help="GPUs that tensorrt_rtx builds for.")
@setting("--batches", key="build.batches", metavar="MIN,OPT,MAX", help="Batch of the plans of dynamic files.")
@click.option("--out", type=FILE, help="Folder to write into; default runs/build, or a new one beside other models.")
@changes
@as_json
def build(models: tuple[Path, ...], out: Path | None, as_json: bool) -> None:
    """ONNX to TensorRT plans with the model.json that they need on the device."""
    from compress.stages.build import STAGE, Inputs, by_precision, require_open_batches

    @cache
    def inputs() -> Inputs:
        found = by_precision(models)
        if setting_is_given("build.batches"):
            require_open_batches(found)
        return found

    folder = into(out, Path("runs/build"), lambda folder: run_alone(STAGE, inputs, folder))
    show(read_json(folder / "build.json"), folder, as_json)


@click.command()
@click.option(
    "--model", "--weights", "models", type=FILE, multiple=True, required=True, help="File or bundle; repeatable."
)
@data
@setting("--batch-size", "--batch", key="bench.batch", help="Images of a timed call, of files that leave it open.")
@backend
@click.option("--out", type=FILE, help="Folder to write into; default runs/bench, or a new one where that exists.")
@changes
@as_json
def bench(models: tuple[Path, ...], data: Path, backend: str, out: Path | None, as_json: bool) -> None:
    """Latency and mAP of each file, measured in one run; report.html, .md, .csv and .json."""
    from compress.inputs import MeasuredFile
    from compress.stages.bench import STAGE, Inputs, write_report

    files = [MeasuredFile(model) for model in models]
    folder = out or run_folder(Path("runs"), "bench", exist_ok=False, resume=False)
    run_alone(STAGE, lambda: Inputs(files, indexed(data, "val"), device="auto", backend=backend), folder)
    show(write_report(folder).data, folder / "report.html", as_json)
