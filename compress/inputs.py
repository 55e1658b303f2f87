"""Inputs of the stages: the data set with its ground truth, and the files that earlier stages left."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.bench import Plan
from benchmarks.environment import CPU, device_name
from compress.config import BenchConfig, Recipe
from compress.data import INDEX, Dataset, load_data
from compress.data.coco import to_coco
from compress.flavours import FILES, FLAVOURS, REFERENCE, Flavour
from compress.graph.candidates import Validation
from compress.models.checkpoint import load
from compress.store import Folders
from runtime.backends import BACKENDS
from runtime.bundle import card_inside, card_of
from runtime.card import CARD_FILE, ModelCard
from runtime.errors import InputError, UnavailableError
from runtime.files import read_json
from runtime.identity import IN_A_FOLDER, ROWS_SETTINGS, SETTINGS, OccupiedError, require_same

TEACHER, STUDENT = "teacher.safetensors", "student.safetensors"
SHIPPED, CONVENTIONAL = "model.onnx", "model.yolov5.onnx"
CALIBRATED, QAD = "quantize.json", "qad.json"
"""Files about the flavours: each as calibration left it, and those that quantisation-aware distillation trained."""
TEACHER_ONNX = "teacher.onnx"
"""The teacher, exported like the student and measured in the same way; it is beside the student's files."""


def dataset_of(recipe: Recipe, folders: Folders) -> Dataset:
    """The data set as the data stage indexed it; no image is opened."""
    return Dataset.load(folders["data"] / INDEX, load_data(recipe.data).root)


def validation_of(dataset: Dataset) -> Validation:
    """The usable images of the val split, numbered from 1, with their labels as COCO ground truth."""
    samples = dataset.splits["val"].samples
    images = [(image_id, sample.image) for image_id, sample in enumerate(samples, 1)]
    return Validation(images, to_coco(samples, dataset.names))


def plan_of(config: BenchConfig, dataset: Dataset, device: str = "cpu") -> Plan:
    """How files are measured, both accuracy and latency, on the val split."""
    data = validation_of(dataset)
    return Plan(
        data.images[: config.max_images or None],
        data.ground_truth,
        samples=config.latency_samples,
        batch=config.batch,
        warmup_ms=config.warmup_ms,
        accuracy_conf=config.accuracy_conf,
        device=device,
    )


def own_plan(plan: Plan, flavour: Flavour) -> Plan:
    """The plan that measures a flavour in the library that it is made for, or as it is written where that is not here.

    Integer kernels that it is not made for would say nothing about it.
    """
    return replace(plan, backend=flavour.backend if flavour.is_run_here else "onnx", as_written=not flavour.is_run_here)


def suited(plan: Plan, path: Path) -> tuple[Plan, str]:
    """The plan that suits a file or bundle, and the note that belongs beside its figures.

    On a CPU a flavour is measured by its `own_plan`, unless the plan names a backend, or the file was converted for
    another one. Raises the errors of `Detector.load`.
    """
    flavour = _flavour_on_cpu(plan, path)
    if flavour is None:
        return replace(plan, as_written=False), ""
    own = own_plan(plan, flavour)
    is_own = plan.backend == "auto" and (path.is_dir() or path.suffix.lower() in BACKENDS[own.backend].suffixes)
    chosen = own if is_own else replace(plan, as_written=False)
    return chosen, "" if chosen.backend == flavour.backend and not chosen.as_written else flavour.note


def _flavour_on_cpu(plan: Plan, path: Path) -> Flavour | None:
    """The flavour that a CPU would compute, also because the library or the GPU that it is made for is not here."""
    try:
        with plan.detector(path, spin=False) as detector:
            is_cpu = device_name(detector.providers) == CPU
            return FLAVOURS.get(detector.card.precision) if is_cpu else None
    except UnavailableError:
        card = None if path.is_dir() else card_inside(path)
        flavour = FLAVOURS.get(card.precision) if card else None
        if flavour is None or (plan.device, plan.backend) != ("auto", "auto"):
            raise
        return flavour


def measured_teacher(recipe: Recipe, folders: Folders) -> Path | None:
    """The teacher's checkpoint; None where its classes are not the data's, by which accuracy is measured."""
    file = folders["teacher"] / TEACHER
    return file if load(file).architecture.names == load_data(recipe.data).names else None


class MeasuredFile(NamedTuple):
    """A file to measure, and the result of its gate: `kept` is None if there was no gate.

    `role` is teacher or student; `precision` None is that of the file's card.
    """

    path: Path
    role: str = "student"
    precision: str | None = None
    kept: bool | None = None
    reason: str = ""
    loss: Mapping[str, float | None] | None = None
    """The gate's figures: drop, standard_error, image_error, draws."""


def measured_files(folders: Folders) -> list[MeasuredFile]:
    """The teacher's file where it was exported, the student's FP32 file, and every flavour that was made, refused ones
    included.
    """
    flavours = [
        MeasuredFile(file, "student", entry["name"], entry["kept"], entry["reason"], entry["loss"])
        for entry, file in _made_flavours(folders)
        if entry["name"] != REFERENCE
    ]
    student = MeasuredFile(folders["export"] / SHIPPED, "student", REFERENCE)
    teacher = MeasuredFile(folders["export"] / TEACHER_ONNX, "teacher", REFERENCE)
    return [*([teacher] if teacher.path.is_file() else []), student, *flavours]


def refuse_another_model(out: Path, card: ModelCard, writes: Collection[str]) -> None:
    """Raises OccupiedError when the folder `out`, which gets the files `writes`, holds another model than `card`.

    Also when one of them would replace a file that edgestill did not write, or that a `model.json` lists by its hash.
    """
    hint = "Choose another folder with --out"
    for path in (out / name for name in (CARD_FILE, SHIPPED, CONVENTIONAL, *FILES.values()) if (out / name).exists()):
        found = _card_at(path)
        if found is None:
            raise OccupiedError(f"{path} is no file that edgestill wrote, or is damaged", f"{hint}, or delete it")
        common = (*(ROWS_SETTINGS if found.output == "rows" else SETTINGS), *IN_A_FOLDER)
        require_same((found, path), (card, "the one to be written"), hint, settings=common, error=OccupiedError)
        if listed := sorted({artifact.file for artifact in found.artifacts} & set(writes)):
            raise OccupiedError(f"{path} lists {listed[0]} by its hash, so it would no longer load", hint)


def _card_at(path: Path) -> ModelCard | None:
    try:
        return ModelCard.load(path) if path.name == CARD_FILE else card_inside(path)
    except InputError:
        return None


def kept_files(folders: Folders) -> dict[str, Path]:
    """Precision -> ONNX file, of FP32 and every flavour that passed its gate."""
    return {entry["name"]: file for entry, file in _made_flavours(folders) if entry["kept"]}


def calibrated_entries(folders: Folders) -> dict[str, dict[str, Any]]:
    """The entries of calibration by the name of the flavour, FP32 first."""
    return {entry["name"]: entry for entry in read_json(folders["quantize"] / CALIBRATED)}


def trained_entries(folders: Folders) -> dict[str, dict[str, Any]]:
    """The entries of quantisation-aware distillation by the name of the flavour."""
    return {entry["name"]: entry for entry in read_json(folders["qad"] / QAD)}


def tried_steps(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The steps of a flavour's entry whose loss was measured, the file itself last; of others only the time was."""
    return [step for step in entry["steps"] if step["drop"] is not None]


def flavour_entries(folders: Folders) -> list[tuple[dict[str, Any], Path]]:
    """The entry of each flavour of a run, FP32 first, and the folder that its file is in."""
    calibrated = {name: (entry, folders["quantize"]) for name, entry in calibrated_entries(folders).items()}
    calibrated[REFERENCE] = (calibrated[REFERENCE][0], folders["export"])
    trained = {name: (entry, folders["qad"]) for name, entry in trained_entries(folders).items() if entry["replaces"]}
    return list({**calibrated, **trained}.values())


def _made_flavours(folders: Folders) -> list[tuple[dict[str, Any], Path]]:
    """Entries and files of a run, FP32 first. Raises InputError when one is of another model."""
    found = [(entry, folder / entry["file"]) for entry, folder in flavour_entries(folders) if entry["file"]]
    reference = folders["export"] / SHIPPED
    for _, file in found:
        hint = f"Run again with --force {file.parent.name}"
        require_same((card_of(file), file), (card_of(reference), reference), hint)
    return found
