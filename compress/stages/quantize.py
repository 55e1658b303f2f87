"""Quantise: `model.onnx` becomes FP16 and INT8 flavours, each judged by its own measured accuracy.

In: the shipped FP32 graph, training images to calibrate on, validation images to measure on.
Out: `model.<flavour>.onnx` beside each other, and `quantize.json`, which says of each whether it is kept. One
calibration, through the very input that the device feeds, serves every INT8 flavour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from benchmarks.bench import Plan, compare_files, measure_file
from benchmarks.latency import LatencyRatio
from benchmarks.report import ap, p50
from compress.config import BenchConfig, QuantizeConfig, Settings
from compress.data import Dataset
from compress.flavours import FLAVOURS, REFERENCE
from compress.graph.builder import publish
from compress.graph.calibration import calibrate
from compress.graph.metadata import read_card, write_card
from compress.graph.safe_load import read_model
from compress.graph.session import open_session
from compress.inputs import SHIPPED, dataset_of, plan_of
from compress.log import Log
from compress.stages import Figures, Stage, cpu_and_runtime
from runtime.card import ModelCard
from runtime.errors import InputError
from runtime.files import sha256, write_json
from runtime.image import letterbox, read_image

SANITY_IMAGES = 8
SANITY_SHARE = 0.1
"""A flavour whose best score stays below this share of FP32's on every sanity image has collapsed."""


RATIO_KEYS = ("ratio", "low", "high", "rounds")
GATE_SAMPLES = 100
"""A median needs no more."""


class Config(Settings):
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()


class Inputs(NamedTuple):
    model: Path
    data: Dataset


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write every flavour and `quantize.json` into `out`. Raises the errors of `quantize`."""
    plan = plan_of(config.bench, inputs.data)
    plan = replace(plan, samples=min(plan.samples, GATE_SAMPLES))
    files = quantize(
        config.quantize,
        model=inputs.model,
        images=[sample.image for sample in inputs.data.splits["train"].samples],
        out=out,
        measure=partial(measured, plan=plan),
        compare=partial(compare_files, inputs.model, plan=plan),
        log=log,
    )
    write_json(out / "quantize.json", [file.to_json() for file in files])
    return {"kept": ", ".join(file.name for file in files if file.kept)}


class Measured(NamedTuple):
    """Accuracy of one file, and its median latency of a frame in milliseconds on this machine."""

    map50_95: float
    p50_ms: float


def measured(path: Path, plan: Plan) -> Measured:
    row = measure_file(path, plan)
    accuracy, latency = ap(row), p50(row)
    assert accuracy is not None, "the plan has a ground truth"
    assert latency is not None, "BenchConfig takes enough samples for a median"
    return Measured(accuracy, latency)


@dataclass(frozen=True)
class JudgedFile:
    """A file of one precision, and whether its gate keeps it.

    `drop` is the mAP50-95 lost against FP32; `calibration` has the number of images and their digest; `latency` is
    compared with FP32's where the flavour is made for this CPU.
    """

    name: str
    path: Path
    measured: Measured
    drop: float
    kept: bool
    reason: str
    calibration: Mapping[str, Any]
    latency: LatencyRatio | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "file": self.path.name,
            "sha256": sha256(self.path),
            "map50_95": self.measured.map50_95,
            "p50_ms": self.measured.p50_ms,
            "drop": self.drop,
            "kept": self.kept,
            "reason": self.reason,
            "calibration": dict(self.calibration),
            "latency_ratio": self.latency and {key: getattr(self.latency, key) for key in RATIO_KEYS},
        }


def quantize(
    config: QuantizeConfig,
    *,
    model: Path,
    images: Sequence[Path],
    out: Path,
    measure: Callable[[Path], Measured],
    compare: Callable[[Path], LatencyRatio],
    log: Log = print,
) -> tuple[JudgedFile, ...]:
    """All flavours of `config`, after the FP32 reference itself. Files are written into the folder `out`.

    `images` come from the training split; `config.calibration_images` of them are used, spread evenly. `compare` gives
    a file's latency over that of `model`, both measured in turns; it is asked for flavours for this CPU. Raises
    `InputError` when `model` is not a graph that `export` wrote, or when INT8 is asked for without images.
    """
    source = read_model(model)
    card = _boxes_card(source, model.name)
    chosen = spread(images, config.calibration_images)
    calibration = {**_digest(chosen), "method": config.method}
    ranges = cache(lambda: calibrate(source, (_input(path, card) for path in chosen), config.method))
    reference = measure(model)
    log(f"{REFERENCE}: mAP50-95 {reference.map50_95:.4f}, p50 {reference.p50_ms:.2f} ms")
    files = [JudgedFile(REFERENCE, model, reference, 0.0, True, "the reference", {})]
    for name in config.flavours:
        row = FLAVOURS[name]
        made = row.make(source, ranges()) if row.calibrated else row.make(source)
        path = _publish(made, replace(card, precision=name), out / f"model.{name}.onnx")
        found, latency = measure(path), compare(path) if row.for_this_cpu else None
        drop = reference.map50_95 - found.map50_95
        kept, reason = verdict(config, drop, _collapse(name, source, path, chosen, card), latency)
        used = calibration if row.calibrated else {}
        files.append(JudgedFile(name, path, found, drop, kept, reason, used, latency))
        log(describe(files[-1]))
    return tuple(files)


def spread(images: Sequence[Path], count: int) -> list[Path]:
    """At most `count` images, evenly over the sequence: neighbours in a folder are often frames of one scene."""
    if len(images) <= count:
        return list(images)
    return [images[index * len(images) // count] for index in range(count)]


def describe(file: JudgedFile) -> str:
    """One line: accuracy, drop, latency, and the verdict."""
    against = f", {file.latency} times FP32's in turns" if file.latency else ""
    return (
        f"{file.name}: mAP50-95 {file.measured.map50_95:.4f} (drop {file.drop:+.4f}), "
        f"p50 {file.measured.p50_ms:.2f} ms{against}; {'kept' if file.kept else 'left out'}: {file.reason}"
    )


def verdict(
    config: QuantizeConfig, drop: float, collapse: str = "", latency: LatencyRatio | None = None
) -> tuple[bool, str]:
    """Whether a flavour is kept, and why: its accuracy, its outputs, and where it is for this CPU its latency."""
    within = drop <= config.max_map_drop  # False for NaN
    loss = f"loses {drop:.4f} mAP50-95, {'within' if within else 'more than'} {config.max_map_drop:g}"
    slow = slowness(config.max_latency_ratio, latency) if latency else ""
    return within and not collapse and not slow, collapse or "; ".join(filter(None, (loss, slow)))


def slowness(limit: float, latency: LatencyRatio) -> str:
    """Why a flavour for this CPU is not worth its loss of accuracy, or nothing. A gain in speed must be shown: where
    the rounds scatter around the limit, the flavour is left out.
    """
    return {
        "faster": "",
        "slower": f"its latency is above {limit:g} times FP32's: {latency}",
        "inconclusive": f"inconclusive whether its latency is below {limit:g} times FP32's: {latency}",
    }[latency.verdict(limit)]


def _boxes_card(model: onnx.ModelProto, name: str) -> ModelCard:
    card = read_card(model, name)
    if card.input == "tensor" or card.output != "boxes" or card.precision != REFERENCE:
        raise InputError(
            f"{name} is {card.precision} with input {card.input!r} and output {card.output!r}; "
            "quantising starts from FP32 frames or canvases to boxes",
            "give the model.onnx that `edgestill export` wrote",
        )
    return card


def _input(path: Path, card: ModelCard) -> np.ndarray:
    """uint8 (1,H,W,3), exactly what the graph's input takes on the device."""
    frame = read_image(path)
    target = card.frame_hw if card.input == "frame" and card.frame_hw else card.size_hw
    return letterbox(frame, target).image[None]


def _digest(chosen: Sequence[Path]) -> dict[str, Any]:
    """Number of images, and a digest over their contents in order."""
    hashes = [sha256(path) for path in chosen]
    return {"n": len(chosen), "sha256": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()}


def _publish(model: onnx.ModelProto, card: ModelCard, path: Path) -> Path:
    write_card(model, card)
    return publish(model, path)


def _collapse(name: str, source: onnx.ModelProto, path: Path, chosen: Sequence[Path], card: ModelCard) -> str:
    """Why the outputs of a flavour are unusable, or nothing: overflow, values that are not finite, dead scores."""
    probes = [_input(image, card) for image in spread(chosen, SANITY_IMAGES)]
    if not probes:
        return ""
    before, after = (_outputs(model, probes) for model in (source, onnx.load(path)))
    if not np.isfinite(after).all():
        return "its outputs are not finite"
    if after[..., 4].max() < SANITY_SHARE * before[..., 4].max():
        return f"its best score is {after[..., 4].max():.3g} where FP32 has {before[..., 4].max():.3g}"
    return FLAVOURS[name].fault(source, probes)


def _outputs(model: onnx.ModelProto, probes: Sequence[np.ndarray]) -> np.ndarray:
    """All detections. Without graph optimisation: fusing FP16 with Q/DQ makes errors that are not the file's."""
    session = open_session(model, optimise=False)
    return np.concatenate([session.run(None, {model.graph.input[0].name: probe})[0] for probe in probes])


STAGE = Stage(
    "quantize",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(folders["export"] / SHIPPED, dataset_of(recipe, folders)),
    run=run,
    after=("data", "export"),
    facts={"machine": cpu_and_runtime},
)
