"""Quantise: `model.onnx` becomes FP16 and INT8 flavours, each judged by its own measured accuracy.

In: the shipped FP32 graph, training images to calibrate on, and a function that measures a file.
Out: `model.<flavour>.onnx` beside each other, and for each whether it is kept. One calibration, through the very
input that the device feeds, serves both INT8 flavours.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx

from compress.config import QuantizeConfig
from compress.flavours import FLAVOURS, REFERENCE
from compress.graph.builder import publish
from compress.graph.calibration import calibrate
from compress.graph.metadata import read_card, write_card
from compress.graph.safe_load import read_model
from compress.graph.session import open_session
from compress.log import Log
from runtime.card import ModelCard
from runtime.errors import InputError
from runtime.files import sha256
from runtime.image import letterbox, read_image

SANITY_IMAGES = 8
SANITY_SHARE = 0.1
"""A flavour whose best score stays below this share of FP32's on every sanity image has collapsed."""


class Measured(NamedTuple):
    """Of one file: accuracy, and the median latency of a frame in milliseconds on this machine."""

    map50_95: float
    p50_ms: float


@dataclass(frozen=True)
class JudgedFile:
    """A file of one precision, and whether its gate keeps it.

    `drop` is the mAP50-95 lost against FP32; `calibration` has the number of images and their digest.
    """

    name: str
    path: Path
    measured: Measured
    drop: float
    kept: bool
    reason: str
    calibration: Mapping[str, Any]

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
        }


def quantize(
    config: QuantizeConfig,
    *,
    model: Path,
    images: Sequence[Path],
    out: Path,
    evaluate: Callable[[Path], Measured],
    log: Log = print,
) -> tuple[JudgedFile, ...]:
    """All flavours of `config`, after the FP32 reference itself. Files are written into the folder `out`.

    `images` come from the training split; `config.calibration_images` of them are used, spread evenly. Raises
    `InputError` when `model` is not a graph that `export` wrote, or when INT8 is asked for without images.
    """
    source = read_model(model)
    card = _boxes_card(source, model.name)
    chosen = spread(images, config.calibration_images)
    calibration = {**_digest(chosen), "method": config.method}
    ranges = cache(lambda: calibrate(source, (_input(path, card) for path in chosen), config.method))
    reference = evaluate(model)
    log(f"{REFERENCE}: mAP50-95 {reference.map50_95:.4f}, p50 {reference.p50_ms:.2f} ms")
    flavours = [JudgedFile(REFERENCE, model, reference, 0.0, True, "the reference", {})]
    for name in config.flavours:
        row = FLAVOURS[name]
        made = row.make(source, ranges()) if row.calibrated else row.make(source)
        path = _publish(made, replace(card, precision=name), out / f"model.{name}.onnx")
        used = calibration if row.calibrated else {}
        flavour = _judge(
            config, name, path, evaluate(path), reference, _collapse(name, source, path, chosen, card), used
        )
        flavours.append(flavour)
        log(describe(flavour, reference))
    return tuple(flavours)


def spread(images: Sequence[Path], count: int) -> list[Path]:
    """At most `count` images, evenly over the sequence: neighbours in a folder are often frames of one scene."""
    if len(images) <= count:
        return list(images)
    return [images[index * len(images) // count] for index in range(count)]


def describe(flavour: JudgedFile, reference: Measured) -> str:
    """One line: accuracy, drop, latency against FP32 in the same run, and the verdict."""
    ratio = flavour.measured.p50_ms / reference.p50_ms if reference.p50_ms else float("nan")
    speed = "not faster than FP32 here" if ratio >= 1 else "faster than FP32 here"
    return (
        f"{flavour.name}: mAP50-95 {flavour.measured.map50_95:.4f} (drop {flavour.drop:+.4f}), "
        f"p50 {flavour.measured.p50_ms:.2f} ms ({ratio:.2f}x, {speed}); "
        f"{'kept' if flavour.kept else 'left out'}: {flavour.reason}"
    )


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


def _judge(
    config: QuantizeConfig,
    name: str,
    path: Path,
    measured: Measured,
    reference: Measured,
    collapse: str,
    calibration: Mapping[str, Any],
) -> JudgedFile:
    drop = reference.map50_95 - measured.map50_95
    within = drop <= config.max_map_drop  # False for NaN
    verdict = f"loses {drop:.4f} mAP50-95, {'within' if within else 'more than'} {config.max_map_drop:g}"
    slow = _slowness(config, measured, reference) if FLAVOURS[name].for_this_cpu else ""
    reason = collapse or (f"{verdict}; {slow}" if slow else verdict)
    return JudgedFile(name, path, measured, drop, within and not collapse and not slow, reason, calibration)


def _slowness(config: QuantizeConfig, measured: Measured, reference: Measured) -> str:
    """Why a flavour for this CPU is not worth shipping, or nothing."""
    limit = config.max_latency_ratio * reference.p50_ms
    if measured.p50_ms <= limit:
        return ""
    return f"p50 {measured.p50_ms:.2f} ms is above {config.max_latency_ratio:g} times FP32's {reference.p50_ms:.2f} ms"
