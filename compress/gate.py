"""The gate of a flavour: write its file, measure what it loses against FP32, and give the verdict.

Rounding is chaotic: one file is one draw, so a verdict is about the mean loss of several files that differ in nothing
else, and the layers that lose most return to float until it holds. The same gate judges what calibration alone reached
and what quantisation-aware distillation made of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import onnx

from benchmarks.accuracy import Floats
from benchmarks.bench import Plan, compare_files, file_maps
from benchmarks.latency import LatencyRatio
from benchmarks.statistics import jackknife_error, standard_error
from compress.config import QuantizeConfig
from compress.flavours import FLAVOURS, REFERENCE, Flavour
from compress.graph.batches import filled_batches
from compress.graph.builder import write_model
from compress.graph.metadata import opset_of, read_card, write_card
from compress.graph.parts import GraphParts
from compress.graph.placement import layers
from compress.graph.ranges import METHODS, Ranges, calibrate
from compress.graph.sensitivity import LayerError, number_form, rank_layers, remaining_error
from compress.graph.session import open_session
from compress.inputs import own_plan
from compress.schemes import Scheme, seven_bit_weights
from runtime.card import ModelCard
from runtime.errors import EdgestillError, InputError
from runtime.files import sha256
from runtime.image import letterbox, read_image

SANITY_IMAGES = 8
SANITY_SHARE = 0.1
"""A flavour has failed if on every sanity image its best score is below this share of FP32's."""
RANKING_IMAGES = 4
FLOAT_STEPS = (2, 4, 8, 16)
"""Layers in float that are tried one after the other. The worst two halve the loss of yolov5n in ONNX Runtime, and cost
7 % of FP32's time there (benchmarks/results/int8-ort-loss)."""
TWO_SIDED_95 = 1.96
GIVE_EXPORTED = "Give the model.onnx that `edgestill export` wrote"
SEVEN_BITS = 7
GATE_SAMPLES = 200
"""Timed calls of each file, ten in each of twenty rounds."""
SPEED = {
    "faster": "below the limit",
    "slower": "above the limit",
    "inconclusive": "inconclusive as the rounds disagree; the limit is",
}


class Gate(Protocol):
    """The two measurements that judge a flavour."""

    def maps(self, path: Path, flavour: Flavour | None = None) -> Floats:
        """mAP50-95 of a file on all images, and with each group of images left out; see `jackknife_maps`.

        A flavour is measured in its own library if that is here.
        """
        ...

    def latency(self, reference: Path, other: Path, flavour: Flavour) -> LatencyRatio:
        """Time of `other`, in the flavour's library, over time of `reference`, taken in turns on this machine."""
        ...


@dataclass(frozen=True)
class FileGate:
    """Measures the files themselves: accuracy on the plan's images, latency in turns with FP32."""

    plan: Plan

    def maps(self, path: Path, flavour: Flavour | None = None) -> Floats:
        return file_maps(path, own_plan(self.plan, flavour) if flavour else self.plan)

    def latency(self, reference: Path, other: Path, flavour: Flavour) -> LatencyRatio:
        plan = replace(self.plan, samples=min(self.plan.samples, GATE_SAMPLES))
        return compare_files(reference, other, plan, backend=flavour.backend)


@dataclass(frozen=True)
class Loss:
    """mAP50-95 lost against FP32: the mean over `draws` files that differ in nothing but the rounding.

    `standard_error` is that of the mean over the draws, 0 where all draws are alike; `image_error` is that of having
    measured these images and no others (a jackknife over groups of them). None where there are too few.
    """

    drop: float
    standard_error: float | None
    image_error: float | None
    draws: int

    @classmethod
    def of(cls, reference: Floats, maps: Sequence[Floats], *, is_drawn: bool = True) -> Loss:
        """From the `Gate.maps` of FP32 and of each draw; of a flavour that is not drawn there is one."""
        drops = reference - np.array(maps)
        mean = drops.mean(0)
        over_draws = standard_error(drops[:, 0]) if is_drawn else 0.0
        return cls(float(mean[0]), over_draws, jackknife_error(mean[1:]), len(maps))

    @property
    def error(self) -> float | None:
        """Both errors together; None where one of them is not known."""
        if self.standard_error is None or self.image_error is None:
            return None
        return math.hypot(self.standard_error, self.image_error)

    def is_resolved(self, limit: float) -> bool:
        """Whether the 95 % interval is known and lies on one side of the limit."""
        return self.error is not None and abs(self.drop - limit) > TWO_SIDED_95 * self.error

    @property
    def remedy(self) -> str:
        """The larger part of the error, "images" or "draws": more of them make it smaller. One that is not known is the
        larger one.
        """
        over_draws, over_images = (math.inf if e is None else e for e in (self.standard_error, self.image_error))
        return "draws" if over_draws > over_images else "images"

    def __str__(self) -> str:
        draws = f"{self.draws} draws" if self.draws > 1 else "1 draw"
        error = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.drop:+.4f}{error} mAP50-95 ({draws})"


class Choice(NamedTuple):
    """A way to calibrate a file: the method of its ranges, and the layers that stay in float."""

    method: str = ""
    float_layers: tuple[str, ...] = ()


NO_CHOICE = Choice()
"""For flavours that are not calibrated."""


@dataclass(frozen=True)
class Step:
    """A file of this choice: the error that the ranking predicts, the loss, and the time against FP32."""

    choice: Choice
    predicted_error: float | None = None
    loss: Loss | None = None
    latency: LatencyRatio | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "method": self.choice.method,
            "float_layers": len(self.choice.float_layers),
            "predicted_error": self.predicted_error,
            "drop": self.loss and self.loss.drop,
            "standard_error": self.loss and self.loss.standard_error,
            "latency_ratio": self.latency and self.latency.ratio,
        }


@dataclass(frozen=True)
class JudgedFile:
    """A file of one precision, and whether its gate keeps it; `path` is None if the file could not be made.

    `map50_95` is that of the file itself; `loss` is over its draws. `calibration` has the method, the number of images
    and their digest. `latency` is against FP32, measured only if it counts. `ranking` has the layers, worst first, and
    `steps` what was tried with how many of them in float, the last of which is the file.
    """

    name: str
    path: Path | None
    kept: bool
    reason: str
    map50_95: float | None = None
    loss: Loss | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)
    latency: LatencyRatio | None = None
    ranking: tuple[LayerError, ...] = ()
    steps: tuple[Step, ...] = ()

    @property
    def float_layers(self) -> tuple[str, ...]:
        return self.steps[-1].choice.float_layers if self.steps else ()

    def to_json(self) -> dict[str, Any]:
        ratio = self.latency
        return {
            "name": self.name,
            "file": self.path and self.path.name,
            "sha256": self.path and sha256(self.path),
            "map50_95": self.map50_95,
            "loss": self.loss and asdict(self.loss),
            "latency": ratio and {"ratio": ratio.ratio, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds},
            "kept": self.kept,
            "reason": self.reason,
            "calibration": dict(self.calibration),
            "layers": [
                {"name": layer.name, "error": layer.error, "is_float": layer.name in self.float_layers}
                for layer in self.ranking
            ],
            "steps": [step.to_json() for step in self.steps],
        }


@dataclass(frozen=True)
class Canvases:
    """Images as the graph's input takes them, uint8 (B,H,W,3), read anew each time: they need not fit in memory."""

    paths: Sequence[Path]
    card: ModelCard

    def __iter__(self) -> Iterator[np.ndarray]:
        return _inputs(self.paths, self.card)

    def some(self, count: int) -> list[np.ndarray]:
        """At most `count` of them, in memory."""
        return list(_inputs(spread(self.paths, count), self.card))


@dataclass(frozen=True)
class Origin:
    """The origin of every flavour of one model, and its judge; `reference` are the `Gate.maps` of FP32."""

    config: QuantizeConfig
    model: Path
    source: onnx.ModelProto
    card: ModelCard
    canvases: Canvases
    ranges: Callable[[str], Ranges]
    """The activations' ranges by a method, measured when they are wanted first."""
    rank: Callable[[str, Scheme], tuple[LayerError, ...]]
    """Ranks the layers by the ranges of a method and a number form."""
    gate: Gate
    reference: Floats

    def calibration(self, method: str) -> dict[str, Any]:
        return {**_digest(self.canvases.paths), "method": method}

    def ranking(self, flavour: Flavour, method: str) -> tuple[LayerError, ...]:
        """The layers of a flavour, worst first; empty where none is to stay in float."""
        if flavour.scheme is None or self.config.float_layers == 0:
            return ()
        return self.rank(method, number_form(flavour.scheme))

    def write(self, flavour: Flavour, path: Path, choice: Choice = NO_CHOICE, draw: int = 0) -> Path:
        """The flavour as a file, with its card."""
        made = (
            flavour.make(self.source, self.ranges(choice.method), float_layers=choice.float_layers, draw=draw)
            if flavour.scheme
            else flavour.make(self.source)
        )
        card = replace(
            self.card,
            precision=flavour.name,
            backend=flavour.backend,
            devices=flavour.devices,
            provenance={**self.card.provenance, "opset": opset_of(made)},
        )
        write_card(made, card)
        return write_model(made, path)


def origin_of(
    config: QuantizeConfig, source: onnx.ModelProto, *, model: Path, images: Sequence[Path], gate: Gate
) -> Origin:
    """Calibrate `source`, which is the FP32 file `model`, and measure the file.

    `images` come from the training split; `config.calibration_images` of them are used, spread evenly. Raises
    `InputError` when `model` is not a graph that `export` wrote or has no layer that `config.float_layers` names, and
    `EdgestillError` when a flavour that is calibrated has no images.
    """
    card = boxes_card(source, model.name)
    _require_layers(config, source, model.name)
    canvases = Canvases(spread(images, config.calibration_images), card)
    has_int8 = any(FLAVOURS[name].scheme for name in config.flavours)
    ranges = cache(lambda method: calibrate(source, canvases, method))
    rank = cache(lambda method, form: rank_layers(source, ranges(method), form, canvases.some(RANKING_IMAGES)))
    if has_int8:
        ranges(methods_of(config)[0])
    return Origin(config, model, source, card, canvases, ranges, rank, gate, gate.maps(model))


def flavour_of(config: QuantizeConfig, name: str) -> Flavour:
    """The row of the table, in the bits that the settings want."""
    flavour = FLAVOURS[name]
    if flavour.scheme is None or config.weight_bits != SEVEN_BITS:
        return flavour
    return replace(flavour, scheme=seven_bit_weights(flavour.scheme))


def judge(origin: Origin, flavour: Flavour, path: Path, folder: Path) -> JudgedFile:
    """The flavour as the file `path`, with as many layers in float as it needs; `folder` is for files to throw away."""
    steps: list[Step] = []
    for choice in choices(origin, flavour):
        try:
            origin.write(flavour, path, choice)
        except EdgestillError as error:
            path.unlink(missing_ok=True)  # of an earlier calibration
            return JudgedFile(flavour.name, None, False, f"it cannot be made: {error.message}")
        maps = [_draw_maps(origin, flavour, path, choice, draw, folder) for draw in _draws(origin.config, flavour)]
        loss = Loss.of(origin.reference, maps, is_drawn=flavour.scheme is not None)
        ranking = origin.ranking(flavour, choice.method)
        steps.append(Step(choice, _predicted(ranking, choice), loss))
        if loss.drop <= origin.config.max_map_drop:
            break
    found = float(maps[0][0])
    within, reason = _accuracy_verdict(
        loss, found, float(origin.reference[0]), origin.config.max_map_drop, flavour.judge
    )
    fault = _fault(flavour, origin.source, path, origin.canvases.some(SANITY_IMAGES))
    calibration = origin.calibration(choice.method) if flavour.scheme else {}
    judged = JudgedFile(
        flavour.name, path, within and not fault, fault or reason, found, loss, calibration, None, ranking, tuple(steps)
    )
    return _timed(origin, flavour, judged, path, folder) if judged.kept and flavour.is_run_here else judged


def choices(origin: Origin, flavour: Flavour) -> Iterator[Choice]:
    """The ways to calibrate a flavour, in the order in which they are tried until the loss is within its limit.

    Another method costs the device nothing, so all of them come before more layers stay in float.
    """
    if flavour.scheme is None:
        yield NO_CHOICE
        return
    seen = set()
    for wanted in _float_layers_tried(origin.config, flavour.scheme):
        for method in methods_of(origin.config):
            choice = Choice(method, _in_float(wanted, origin.ranking(flavour, method)))
            if choice not in seen:
                yield choice
            seen.add(choice)


def methods_of(config: QuantizeConfig) -> tuple[str, ...]:
    """The methods that are tried, the first one first."""
    return METHODS if config.method == "auto" else (config.method,)


def _float_layers_tried(config: QuantizeConfig, scheme: Scheme) -> Sequence[int | tuple[str, ...]]:
    """Numbers of the worst layers, or the names that the recipe has.

    Where every operator is an integer one, a layer in float costs its neighbours their kernels too: ONNX Runtime then
    dequantises, multiplies or concatenates in float, and transposes two to six times. So none is tried first.
    """
    if not isinstance(config.float_layers, str):
        return (config.float_layers,)
    return (0, *FLOAT_STEPS) if scheme.outputs else FLOAT_STEPS


def _in_float(wanted: int | tuple[str, ...], ranking: Sequence[LayerError]) -> tuple[str, ...]:
    """The names of that many of the worst layers, or those of the wanted that the flavour has."""
    known = tuple(layer.name for layer in ranking)
    return known[:wanted] if isinstance(wanted, int) else tuple(name for name in wanted if name in known)


def _predicted(ranking: Sequence[LayerError], choice: Choice) -> float | None:
    return remaining_error(ranking, choice.float_layers) if ranking else None


def _draws(config: QuantizeConfig, flavour: Flavour) -> range:
    return range(config.draws if flavour.scheme else 1)


def _draw_maps(origin: Origin, flavour: Flavour, path: Path, choice: Choice, draw: int, folder: Path) -> Floats:
    """Draw 0 is the file itself."""
    drawn = origin.write(flavour, folder / "draw.onnx", choice, draw) if draw else path
    return origin.gate.maps(drawn, flavour)


def _timed(origin: Origin, flavour: Flavour, judged: JudgedFile, path: Path, folder: Path) -> JudgedFile:
    """With the latency of the file, which counts, and that of the steps before it, which say what each costs."""
    latency = origin.gate.latency(origin.model, path, flavour)
    verdict = latency.verdict(origin.config.max_latency_ratio)
    limit = f"{SPEED[verdict]} {origin.config.max_latency_ratio:g}"
    reason = f"{judged.reason}; time over FP32's at the gate {latency}, {limit}"
    choice = judged.steps[-1].choice
    known = {len(choice.float_layers): latency}

    def timed(step: Step) -> Step:
        """With its latency, which does not depend on the method."""
        count = len(step.choice.float_layers)
        if count not in known:
            file = origin.write(flavour, folder / "step.onnx", step.choice)
            known[count] = origin.gate.latency(origin.model, file, flavour)
        return replace(step, latency=known[count])

    none = Choice(choice.method)
    first = (
        [Step(none, _predicted(judged.ranking, none))] if all(step.choice.float_layers for step in judged.steps) else []
    )
    steps = tuple(map(timed, (*first, *judged.steps)))
    return replace(judged, kept=verdict != "slower", reason=reason, latency=latency, steps=steps)


def spread(images: Sequence[Path], count: int) -> list[Path]:
    """At most `count` images, evenly over the sequence: neighbours in a folder are often frames of one scene."""
    if len(images) <= count:
        return list(images)
    return [images[index * len(images) // count] for index in range(count)]


def describe(judged: JudgedFile) -> str:
    """One line: accuracy, loss against FP32, and the verdict."""
    figures = "" if judged.path is None else f"mAP50-95 {judged.map50_95:.4f}; "
    layers = f"; in float: {', '.join(judged.float_layers)}" if judged.float_layers else ""
    return f"{judged.name}: {figures}{'kept' if judged.kept else 'left out'}: {judged.reason}{layers}"


def _require_layers(config: QuantizeConfig, source: onnx.ModelProto, name: str) -> None:
    """Raises `InputError` when `float_layers` names a layer that the graph does not have."""
    if not isinstance(config.float_layers, tuple):
        return
    known = layers(GraphParts(source.graph), Scheme())
    if unknown := [layer for layer in config.float_layers if layer not in known]:
        raise InputError(f"float_layers: {name} has no layer {unknown[0]!r}", f"Layers are {', '.join(known)}")


def boxes_card(model: onnx.ModelProto, name: str) -> ModelCard:
    """The card of a graph that `export` wrote. Raises InputError for any other, and where no network is in it."""
    card = read_card(model, name)
    if not GraphParts(model.graph).convs:
        raise InputError(f"{name} has no convolution, expected a network", GIVE_EXPORTED)
    if card.input == "tensor" or card.output != "boxes" or card.precision != REFERENCE:
        raise InputError(
            f"{name} is {card.precision} with input {card.input!r} and output {card.output!r}; "
            "quantising starts from FP32 frames or canvases to boxes",
            GIVE_EXPORTED,
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


def _accuracy_verdict(loss: Loss, found: float, reference: float, max_drop: float, judge: str) -> tuple[bool, str]:
    """Whether a file with mAP50-95 `found` passes against FP32's, and why. `judge` says what computed it.

    No limit below 1 passes every file: not one that finds nothing, and none where FP32 has no more than may be lost.
    """
    if max_drop < 1 and not reference > max_drop:
        return False, f"FP32 itself has mAP50-95 {reference:.4f}, so no loss of more than {max_drop:g} can be measured"
    if max_drop < 1 and found == 0:
        return False, "its mAP50-95 is 0"
    within = loss.drop <= max_drop  # False for NaN
    is_clear = max_drop >= 1 or loss.is_resolved(max_drop)
    unresolved = "" if is_clear else f", not resolved: too few {loss.remedy} for this limit"
    return within, f"loses {loss} {judge}, {'within' if within else 'more than'} {max_drop:g}{unresolved}"
