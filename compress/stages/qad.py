"""QAD: an INT8 flavour that loses too much by calibration is trained until its weights and scales suit the rounding.

In: the shipped FP32 graph, the student that it was exported from, the data set, what `quantize` reached, and the
teacher where it is to help. Out: `qad.json`, what each trained flavour reached and whether it replaces the calibrated
one; `model.<flavour>.onnx` of those that do; and `<flavour>/`, the files of each training. The student in float is the
teacher, so labels are not needed; the file is judged by the same gate as the calibrated one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from compress.config import IMGSZ, BenchConfig, ExportConfig, QadConfig, QuantizeConfig, Recipe, Settings, Side
from compress.data import Dataset
from compress.data.unlabelled import open_unlabelled, unlabelled_digest
from compress.flavours import FILES, FLAVOURS, Flavour
from compress.gate import (
    FileGate,
    Gate,
    JudgedFile,
    Origin,
    boxes_card,
    choices,
    describe,
    flavour_of,
    judge,
    origin_of,
)
from compress.graph.untrusted_onnx import read_model
from compress.inputs import (
    QAD,
    SHIPPED,
    STUDENT,
    TEACHER,
    calibrated_entries,
    dataset_of,
    plan_of,
    refuse_another_model,
    tried_steps,
)
from compress.log import Log
from compress.losses.distill import check_losses
from compress.models import network_digest
from compress.models.checkpoint import load
from compress.stages import Figures, Stage, cpu_and_runtime, weights_digest
from compress.store import Folders
from compress.training.qad import Learned, Start, train_for_int8
from compress.training.teacher import load_sources
from runtime.card import ModelCard
from runtime.errors import InputError, UsageError
from runtime.files import sha256, write_json


class Config(Settings):
    qad: QadConfig = QadConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    bench: BenchConfig = BenchConfig()
    device: str = "auto"


class AloneConfig(Config):
    """Settings of `edgestill distill --quantize`, which exports the student first."""

    export: ExportConfig = ExportConfig()
    imgsz: Side = IMGSZ


class Inputs(NamedTuple):
    model: Path
    student: Path
    data: Dataset
    teachers: Sequence[Path] = ()
    calibrated: Mapping[str, Mapping[str, Any]] = {}
    """The entries of `quantize`, by flavour; without them every INT8 flavour is trained."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write `qad.json` and what it tells of into `out`. Raises the errors of `qad`."""
    gate = FileGate(plan_of(config.bench, inputs.data))
    entries = qad(config, inputs, out=out, gate=gate, log=log)
    write_json(out / QAD, entries)
    return {"trained": len(entries), "kept": ", ".join(entry["name"] for entry in entries if entry["replaces"])}


def qad(config: Config, inputs: Inputs, *, out: Path, gate: Gate, log: Log) -> list[dict[str, Any]]:
    """Train and judge every flavour that needs it.

    Raises `InputError` when the student is not the network of the graph, `OccupiedError` when `out` holds files of
    another model, and the errors of `compress.gate.origin_of` and of a distillation.
    """
    names = wanted(config, inputs.calibrated)
    if not names:
        return []
    source = read_model(inputs.model)
    card = boxes_card(source, inputs.model.name)
    refuse_another_model(out, card, [FILES[name] for name in names])
    _require_same_network(inputs, card)
    teachers = (*inputs.teachers, *config.qad.teachers)
    # before the layers are ranked, which takes minutes, so that a file that cannot be used is refused at once
    load_sources((inputs.student, *teachers), inputs.data.names, config.qad, config.device)
    unlabelled = open_unlabelled(config.qad, out, log)
    images = [sample.image for sample in inputs.data.splits["train"].samples]
    settings = config.quantize.model_copy(update={"flavours": names, "method": "mse"})
    origin = origin_of(settings, source, model=inputs.model, images=images, gate=gate)
    entries = []
    for name in names:
        flavour = flavour_of(settings, name)
        start = _start(origin, inputs.student, flavour)
        log(f"qad: {name}, layers in float: {', '.join(start.float_layers) or 'none'}")
        learned = train_for_int8(
            config.qad, start, data=inputs.data, teachers=teachers,
            unlabelled=unlabelled, out=out / name, device=config.device, log=log,
        )  # fmt: skip
        judged = _judged(origin, start, learned, flavour, out / FILES[name])
        before = inputs.calibrated.get(name)
        replaces = before is None or is_better(judged, before)
        entries.append({**judged.to_json(), "replaces": replaces, "training": learned.training.figures})
        if not replaces:
            (out / FILES[name]).unlink(missing_ok=True)
        log(f"qad: {describe(judged)}{'' if replaces else '; the calibrated file stays'}")
    return entries


def _start(origin: Origin, student: Path, flavour: Flavour) -> Start:
    """As few layers stay in float as calibration tries first."""
    assert flavour.scheme
    choice = next(choices(origin, flavour))
    return Start(student, origin.source, origin.ranges(choice.method), flavour.scheme, choice.float_layers)


def _judged(origin: Origin, start: Start, learned: Learned, flavour: Flavour, path: Path) -> JudgedFile:
    """The file with the learned weights and scales, and the verdict."""
    card = replace(origin.card, provenance={**origin.card.provenance, "qad": sha256(learned.training.best)})
    config = origin.config.model_copy(update={"float_layers": start.float_layers or 0})
    trained = replace(origin, config=config, source=learned.model, ranges=lambda _: learned.ranges, card=card)
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        return judge(trained, flavour, path, Path(folder))


def wanted(config: Config, calibrated: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """The flavours to train."""
    names = tuple(name for name in config.quantize.flavours if FLAVOURS[name].scheme)
    when = config.qad.when
    if when == "never":
        return ()
    if when == "always" or not calibrated:
        return names
    return tuple(name for name in names if _misses(calibrated[name], config.quantize.max_map_drop))


def _misses(entry: Mapping[str, Any], limit: float) -> bool:
    """Whether no calibrated file passes its gate, though one might that loses less with the fewest layers in float."""
    tried = tried_steps(entry)
    fewest = min((step["float_layers"] for step in tried), default=0)
    drops = [step["drop"] for step in tried if step["float_layers"] == fewest]
    return not entry["kept"] and bool(drops) and all(drop > limit for drop in drops)


def is_better(judged: JudgedFile, calibrated: Mapping[str, Any]) -> bool:
    """Whether the trained file takes the place of the calibrated one: it passes its gate, and the other does not, has
    more layers in float, or as many and loses more.
    """
    if not calibrated["kept"] or judged.loss is None or not judged.kept:
        return judged.kept
    layers = sum(layer["is_float"] for layer in calibrated["layers"])
    return (len(judged.float_layers), judged.loss.drop) < (layers, calibrated["loss"]["drop"])


def _require_same_network(inputs: Inputs, card: ModelCard) -> None:
    checkpoint = load(inputs.student)
    if network_digest(checkpoint.architecture, checkpoint.state_dict) != card.weights:
        raise InputError(
            f"{inputs.student} is not the network of {inputs.model}", "Export it first, or give the network's own file"
        )


def check(config: Config) -> None:
    """Raises UsageError when a loss or a strategy does not serve this distillation."""
    check_losses(config.qad)
    if config.qad.rules.trains_teacher:
        raise UsageError(
            f"qad.strategy {config.qad.strategy} trains the teacher, which is the student in float",
            "Leave it out, or take label_free",
        )


def inputs_of(recipe: Recipe, folders: Folders) -> Inputs:
    teachers = (folders["teacher"] / TEACHER,) if recipe.qad.with_teacher else ()
    return Inputs(
        folders["export"] / SHIPPED, folders["distill"] / STUDENT, dataset_of(recipe, folders), teachers,
        calibrated_entries(folders),
    )  # fmt: skip


STAGE = Stage(
    "qad",
    settings=Config,
    inputs=inputs_of,
    run=run,
    after=("data", "teacher", "distill", "export", "quantize"),
    check=check,
    digests={
        "teachers": lambda recipe: " ".join(map(weights_digest, recipe.qad.teachers)) or "none",
        "unlabelled": lambda recipe: unlabelled_digest(recipe.qad.unlabelled),
    },
    facts={"machine": cpu_and_runtime},
    version=4,
)
