"""Quantise: `model.onnx` becomes FP16 and INT8 flavours, each judged by its own measured accuracy.

In: the shipped FP32 graph, training images to calibrate on, validation images to measure on.
Out: `model.<flavour>.onnx` beside each other, and `quantize.json`, which says of each whether it is kept. One
calibration, through the input that the device feeds, serves every INT8 flavour.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx

from benchmarks.bench import Plan, compare_files, file_accuracy
from benchmarks.latency import LatencyRatio
from compress.config import BenchConfig, QuantizeConfig, Settings
from compress.data import Dataset
from compress.flavours import FILES, FLAVOURS, REFERENCE, Flavour
from compress.graph.batches import filled_batches
from compress.graph.builder import write_model
from compress.graph.calibration import calibrate
from compress.graph.metadata import read_card, write_card
from compress.graph.session import open_session
from compress.graph.untrusted_onnx import read_model
from compress.inputs import SHIPPED, dataset_of, plan_of, refuse_another_model
from compress.log import Log
from compress.stages import Figures, Stage, cpu_and_runtime
from runtime.card import ModelCard
from runtime.errors import EdgestillError, InputError
from runtime.files import sha256, write_json
from runtime.image import letterbox, read_image

SANITY_IMAGES = 8
SANITY_SHARE = 0.1
"""A flavour has failed if on every sanity image its best score is below this share of FP32's."""
GATE_SAMPLES = 200
"""Timed calls of each file, ten in each of twenty rounds."""
SPEED = {
    "faster": "below the limit",
    "slower": "above the limit",
    "inconclusive": "inconclusive as the rounds disagree; the limit is",
}


class Config(Settings):
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()


class Inputs(NamedTuple):
    model: Path
    data: Dataset


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write every flavour and `quantize.json` into `out`. Raises the errors of `quantize`."""
    plan = plan_of(config.bench, inputs.data)
    judged = quantize(
        config.quantize,
        model=inputs.model,
        images=[sample.image for sample in inputs.data.splits["train"].samples],
        out=out,
        gate=FileGate(replace(plan, samples=min(plan.samples, GATE_SAMPLES))),
        log=log,
    )
    write_json(out / "quantize.json", [file.to_json() for file in judged])
    return {"kept": ", ".join(file.name for file in judged if file.kept)}


class Gate(Protocol):
    """The two measurements that judge a flavour."""

    def accuracy(self, path: Path) -> float:
        """mAP50-95 of a file."""
        ...

    def latency(self, reference: Path, other: Path) -> LatencyRatio:
        """Time of `other` over time of `reference`, taken in turns on this machine."""
        ...


@dataclass(frozen=True)
class FileGate:
    """Measures the files themselves: accuracy on the plan's images, latency in turns with FP32."""

    plan: Plan

    def accuracy(self, path: Path) -> float:
        return file_accuracy(path, self.plan).map50_95

    def latency(self, reference: Path, other: Path) -> LatencyRatio:
        return compare_files(reference, other, self.plan)


@dataclass(frozen=True)
class JudgedFile:
    """A file of one precision, and whether its gate keeps it; `path` is None if the file could not be made.

    `drop` is the mAP50-95 lost against FP32; `calibration` has the number of images and their digest; `latency` is
    against FP32, measured only if it counts.
    """

    name: str
    path: Path | None
    kept: bool
    reason: str
    map50_95: float | None = None
    drop: float | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    latency: LatencyRatio | None = None

    def to_json(self) -> dict[str, Any]:
        ratio = self.latency
        return {
            "name": self.name,
            "file": self.path and self.path.name,
            "sha256": self.path and sha256(self.path),
            "map50_95": self.map50_95,
            "drop": self.drop,
            "latency": ratio and {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds},
            "kept": self.kept,
            "reason": self.reason,
            "calibration": dict(self.calibration),
        }


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
    `InputError` when `model` is not a graph that `export` wrote, `OccupiedError` when `out` holds files of another
    model, and `EdgestillError` when a flavour that is calibrated has no images.
    """
    source = read_model(model)
    card = _boxes_card(source, model.name)
    refuse_another_model(out, card, [FILES[name] for name in config.flavours])
    chosen = spread(images, config.calibration_images)
    calibration = {**_digest(chosen), "method": config.method}
    ranges = cache(lambda: calibrate(source, _inputs(chosen, card), config.method))
    reference = gate.accuracy(model)
    log(f"{REFERENCE}: mAP50-95 {reference:.4f}")
    judged = [JudgedFile(REFERENCE, model, True, "the reference", reference, 0.0)]
    for flavour in (FLAVOURS[name] for name in config.flavours):
        path = out / FILES[flavour.name]
        measured = (ranges(),) if flavour.calibrated else ()
        try:
            made = flavour.make(source, *measured)
        except EdgestillError as error:
            path.unlink(missing_ok=True)  # of an earlier calibration
            judged.append(JudgedFile(flavour.name, None, False, f"it cannot be made: {error.message}"))
        else:
            write_card(made, replace(card, precision=flavour.name))
            write_model(made, path)
            fault = _fault(flavour, source, path, list(_inputs(spread(chosen, SANITY_IMAGES), card)))
            found = _judge(config, flavour, path, fault, gate, (model, reference))
            judged.append(replace(found, calibration=calibration if flavour.calibrated else {}))
        log(describe(judged[-1]))
    return tuple(judged)


def spread(images: Sequence[Path], count: int) -> list[Path]:
    """At most `count` images, evenly over the sequence: neighbours in a folder are often frames of one scene."""
    if len(images) <= count:
        return list(images)
    return [images[index * len(images) // count] for index in range(count)]


def describe(judged: JudgedFile) -> str:
    """One line: accuracy, drop against FP32, and the verdict."""
    figures = "" if judged.path is None else f"mAP50-95 {judged.map50_95:.4f} (drop {judged.drop:+.4f}); "
    return f"{judged.name}: {figures}{'kept' if judged.kept else 'left out'}: {judged.reason}"


def _boxes_card(model: onnx.ModelProto, name: str) -> ModelCard:
    card = read_card(model, name)
    if card.input == "tensor" or card.output != "boxes" or card.precision != REFERENCE:
        raise InputError(
            f"{name} is {card.precision} with input {card.input!r} and output {card.output!r}; "
            "quantising starts from FP32 frames or canvases to boxes",
            "Give the model.onnx that `edgestill export` wrote",
        )
    return card


def _inputs(paths: Iterable[Path], card: ModelCard) -> Iterator[np.ndarray]:
    """uint8 (B,H,W,3), exactly what the graph's input takes on the device."""
    target = card.frame_hw if card.input == "frame" and card.frame_hw else card.size_hw
    images = (letterbox(read_image(path), target).image[None] for path in paths)
    return (batch for batch, _ in filled_batches(images, card.input_shape[0]))


def _digest(chosen: Sequence[Path]) -> dict[str, Any]:
    """Number of images, and a digest over their contents in order."""
    hashes = [sha256(path) for path in chosen]
    return {"n": len(chosen), "sha256": hashlib.sha256(json.dumps(hashes).encode()).hexdigest()}


def _fault(flavour: Flavour, source: onnx.ModelProto, path: Path, canvases: Sequence[np.ndarray]) -> str:
    """The reason why a flavour's outputs are unusable, or empty: values that are not finite, dead scores, overflow."""
    if not canvases:
        return ""
    before, after = (_outputs(model, canvases) for model in (source, onnx.load(path)))
    if not np.isfinite(after).all():
        return "its outputs are not finite"
    if after[..., 4].max() < SANITY_SHARE * before[..., 4].max():
        return f"its best score is {after[..., 4].max():.3g}, while FP32 has {before[..., 4].max():.3g}"
    return flavour.fault(source, canvases)


def _outputs(model: onnx.ModelProto, canvases: Sequence[np.ndarray]) -> np.ndarray:
    """All detections. Without graph optimisation: fusing FP16 with Q/DQ makes errors that are not the file's."""
    session = open_session(model, optimise=False)
    return np.concatenate([session.run(None, {model.graph.input[0].name: canvas})[0] for canvas in canvases])


def _judge(
    config: QuantizeConfig, flavour: Flavour, path: Path, fault: str, gate: Gate, fp32: tuple[Path, float]
) -> JudgedFile:
    """Kept without a fault, within the drop of mAP, and not slower than the limit if latency here counts.

    `fp32` is the reference and its mAP50-95.
    """
    reference, expected = fp32
    found = gate.accuracy(path)
    within, loss = _accuracy_verdict(found, expected, config.max_map_drop)
    judged = JudgedFile(flavour.name, path, within and not fault, fault or loss, found, expected - found)
    if not judged.kept or not flavour.for_this_cpu:
        return judged
    latency = gate.latency(reference, path)
    verdict = latency.verdict(config.max_latency_ratio)
    reason = f"{loss}; latency against FP32 {latency}, {SPEED[verdict]} {config.max_latency_ratio:g}"
    return replace(judged, kept=verdict != "slower", reason=reason, latency=latency)


def _accuracy_verdict(found: float, reference: float, max_drop: float) -> tuple[bool, str]:
    """Whether mAP50-95 `found` passes against that of FP32, and why. A file that finds nothing passes no limit below 1.

    Otherwise every flavour of a network that learnt nothing would pass, with a loss of 0 out of 0.
    """
    drop = reference - found
    if max_drop < 1 and not reference > 0:
        return False, f"FP32 itself has mAP50-95 {reference:.4f}, so no loss can be measured"
    if max_drop < 1 and found == 0:
        return False, "its mAP50-95 is 0"
    within = drop <= max_drop  # False for NaN
    return within, f"loses {max(drop, 0.0):.4f} mAP50-95, {'within' if within else 'more than'} {max_drop:g}"


STAGE = Stage(
    "quantize",
    settings=Config,
    inputs=lambda recipe, folders: Inputs(folders["export"] / SHIPPED, dataset_of(recipe, folders)),
    run=run,
    after=("data", "export"),
    facts={"machine": cpu_and_runtime},
)
