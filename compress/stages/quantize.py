"""Quantise: `model.onnx` becomes FP16 and INT8 flavours, each judged by its own measured accuracy.

In: the shipped FP32 graph, training images to calibrate on, validation images to measure on.
Out: `model.<flavour>.onnx` beside each other, and `quantize.json`, which says of each whether it is kept. One
calibration, through the input that the device feeds, serves every INT8 flavour. Rounding is chaotic: one file is one
draw, so the verdict is about the mean loss of several, and the layers that lose most return to float until it holds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compress.config import BenchConfig, QuantizeConfig, Settings
from compress.data import Dataset
from compress.flavours import FILES, REFERENCE
from compress.gate import FileGate, Gate, JudgedFile, boxes_card, describe, flavour_of, judge, origin_of
from compress.graph.untrusted_onnx import read_model
from compress.inputs import CALIBRATED, SHIPPED, dataset_of, plan_of, refuse_another_model
from compress.log import Log
from compress.stages import Figures, Stage, cpu_and_runtime
from runtime.files import write_json


class Config(Settings):
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()


class Inputs(NamedTuple):
    model: Path
    data: Dataset


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write every flavour and `quantize.json` into `out`. Raises the errors of `quantize`."""
    judged = quantize(
        config.quantize,
        model=inputs.model,
        images=[sample.image for sample in inputs.data.splits["train"].samples],
        out=out,
        gate=FileGate(plan_of(config.bench, inputs.data)),
        log=log,
    )
    write_json(out / CALIBRATED, [file.to_json() for file in judged])
    return {"kept": ", ".join(file.name for file in judged if file.kept)}


def quantize(
    config: QuantizeConfig,
    *,
    model: Path,
    images: Sequence[Path],
    out: Path,
    gate: Gate,
    log: Log = print,
) -> tuple[JudgedFile, ...]:
    """All flavours of `config`, after the FP32 reference itself. Files are written into the folder `out`.

    `images` come from the training split; `config.calibration_images` of them are used, spread evenly. Raises
    `InputError` when `model` is not a graph that `export` wrote or has no layer that `config.float_layers` names,
    `OccupiedError` when `out` holds files of another model, and `EdgestillError` when a flavour that is calibrated
    has no images.
    """
    source = read_model(model)
    refuse_another_model(out, boxes_card(source, model.name), [FILES[name] for name in config.flavours])
    origin = origin_of(config, source, model=model, images=images, gate=gate)
    log(f"{REFERENCE}: mAP50-95 {origin.reference[0]:.4f}")
    judged = [JudgedFile(REFERENCE, model, True, "the reference", float(origin.reference[0]))]
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        for name in config.flavours:
            judged.append(judge(origin, flavour_of(config, name), out / FILES[name], Path(folder)))
            log(describe(judged[-1]))
    return tuple(judged)


STAGE = Stage(
    "quantize",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(folders["export"] / SHIPPED, dataset_of(recipe, folders)),
    run=run,
    after=("data", "export"),
    facts={"machine": cpu_and_runtime},
    version=5,
)
