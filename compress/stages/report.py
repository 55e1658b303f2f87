"""Report: combine the results of the earlier stages on one page; nothing is measured here.

In: the folders of earlier stages. Out: `report.json` and its renderings `.html`, `.md`, `.csv`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import wording
from benchmarks.render import write
from benchmarks.report import Report, make_report
from benchmarks.rows import Row, ratio
from compress.config import DistillConfig, ExportConfig, LossChoice, Recipe, Settings, StudentConfig
from compress.data import Dataset
from compress.evaluate import fitness
from compress.gain import gain_of, read_study, study_of, training_of
from compress.inputs import SHIPPED, calibrated_entries, dataset_of, flavour_entries, trained_entries, tried_steps
from compress.log import Log
from compress.losses.distill import LOSSES, reference_of
from compress.stages import Figures, Stage
from compress.store import MANIFEST, Folders
from compress.training.curves import gradient_of, share_column
from runtime.card import ModelCard
from runtime.errors import InputError
from runtime.files import read_json
from runtime.identity import SHOWN
from runtime.layers import facts_of, read_layers

RESULTS = "results.csv"
ROLES = {"teacher": "teacher", "student": "distill"}

CURVES = {
    "train/box_loss": "box",
    "train/obj_loss": "obj",
    "train/cls_loss": "cls",
    "metrics/mAP_0.5": "map50",
    "metrics/mAP_0.5:0.95": "map50_95",
}
"""Columns of results.csv -> names in the report."""


class Config(Settings):
    name: str = "run"
    export: ExportConfig = ExportConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()


class Inputs(NamedTuple):
    folders: Folders
    data: Dataset
    study: Path | None
    """study.json, where there is one."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write the report into `out`."""
    report = assemble(config, inputs)
    write(report, out)
    for sentence in (*wording.weak_student(report.data["models"]), *report.data["notes"]):
        log(f"report: {sentence}")
    headline = report.data["headline"] or {}
    return {key: headline[key] for key in ("file", "map50_95", "p50_ms", "speedup") if headline.get(key) is not None}


def assemble(config: Config, inputs: Inputs) -> Report:
    """A checked report from the folders of the stages. Raises InputError when they are of several models."""
    folders = inputs.folders
    bench, exported = read_json(folders["bench"] / "bench.json"), read_json(folders["export"] / "export.json")
    require_one_model(bench["models"], ModelCard.load(folders["build"]))
    return make_report(
        config.name,
        argv=[Path(sys.argv[0]).name, *sys.argv[1:]],
        **bench,
        training=[row for role, stage in ROLES.items() if (row := _training(role, folders[stage]))],
        distillation=_distillation(
            config.distill, folders["distill"], has_labels=inputs.data.splits["train"].boxes > 0
        ),
        gain=_gain(config, inputs),
        export=_export(config.export, exported),
        calibration=_calibration(folders),
        quantisation=_quantisation(folders),
        engines=[_engine(plan, folders["build"]) for plan in read_json(folders["build"] / "build.json")],
        stages=[_stage(name, folder) for name, folder in folders.items()],
        notes=[
            *not_made(folders),
            *trained_for_int8(folders),
            *teacher_left_out(bench["models"]),
            *shared_images(inputs.data),
        ],
    )


def _gain(config: Config, inputs: Inputs) -> dict[str, Any]:
    """The gain over the same student on labels alone that the study measured, or why it is not known."""
    if inputs.study is None:
        missing = "`edgestill study` with this recipe measures it"
        return {"study": None, "split": None, "arm": None, "over": [], "missing": missing}
    study = read_study(inputs.study)
    training = training_of(config.student, config.distill)
    teacher = read_json(inputs.folders["teacher"] / MANIFEST)["fingerprint"]
    found = gain_of(study, training, teacher=teacher, data=inputs.data.sha256)
    return {"study": inputs.study.parent.name, "split": study["split"], **found}


def not_made(folders: Folders) -> Iterator[str]:
    """One sentence for each flavour that has no file, and therefore no row."""
    for entry, _ in flavour_entries(folders):
        if entry["file"] is None:
            yield f"{entry['name']} was not made: {entry['reason']}."


def trained_for_int8(folders: Folders) -> Iterator[str]:
    """One sentence for each flavour that quantisation-aware distillation trained: what it gained."""
    calibrated = calibrated_entries(folders)
    for name, entry in trained_entries(folders).items():
        after = tried_steps(entry)
        count = after[-1]["float_layers"] if after else 0
        before = [step["drop"] for step in tried_steps(calibrated[name]) if step["float_layers"] == count]
        if not (before and after):
            continue
        verdict = "so it replaces the calibrated file" if entry["replaces"] else "and the calibrated file stays"
        yield (
            f"{name} was trained for INT8: by calibration alone it lost {min(before):.4f} mAP50-95 with {count} layers "
            f"in float, now {after[-1]['drop']:.4f}, {verdict}."
        )


def teacher_left_out(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence where no file of the teacher was measured."""
    if all(row["role"] != "teacher" for row in rows):
        yield "The teacher's file is not measured beside the student's: its classes are not the data's."


def shared_images(data: Dataset) -> Iterator[str]:
    """A sentence where accuracy is measured on images of the training."""
    train, val = data.splits["train"], data.splits["val"]
    if shared := val.count_in(train):
        yield (
            f"{shared} of the {len(val.samples)} images that accuracy is measured on are training images too, "
            "so it says little about new images."
        )


def require_one_model(rows: Sequence[Row], card: ModelCard) -> None:
    """Raises InputError when a measured file of the student is of another model than the `card` of its plans."""
    for row in rows:
        if row["role"] == "student" and row["identity"] != card.identity:
            raise InputError(
                f"{row['file']} is of model {row['identity'][:SHOWN]}, the plans are of {card.identity[:SHOWN]}",
                "Run again with --force build and --force bench",
            )


def _training(role: str, folder: Path) -> dict[str, Any] | None:
    """The curves of a training; None if the teacher was used as it is."""
    if not (folder / RESULTS).is_file():
        return None
    curves = [_point(row) for row in _epochs(folder)]
    measured = [point for point in curves if point.get("map50_95") is not None]
    best = max(measured, key=lambda point: fitness(point["map50"], point["map50_95"]), default=None)
    return {
        "name": role,
        "epochs": len(curves),
        "best_epoch": best and best["epoch"],
        "seconds": read_json(folder / MANIFEST)["seconds"],
        "curves": curves,
    }


def _epochs(folder: Path) -> list[dict[str, str]]:
    """The rows of a training's table."""
    with (folder / RESULTS).open(newline="") as file:
        return list(csv.DictReader(file))


def _point(row: Mapping[str, str]) -> dict[str, Any]:
    """One epoch, counted from 1 as in the log (the table counts from 0); a cell is empty if it was not validated."""
    values = {name: float(row[column]) for column, name in CURVES.items() if row.get(column)}
    return {"epoch": int(row["epoch"]) + 1, **values}


def reference_of_run(config: DistillConfig, *, has_labels: bool) -> str | None:
    """The loss whose gradient the shares are parts of; None where that is the label loss, as some label is known."""
    if has_labels and config.uses_train_split:
        return None
    return reference_of({name: LOSSES[name] for name in config.used_losses}) if config.used_losses else None


def _distillation(config: DistillConfig, folder: Path, *, has_labels: bool) -> dict[str, Any]:
    checks = read_json(folder / "checks.json") if config.losses else []
    epochs = _epochs(folder)

    def about(name: str) -> list[dict[str, Any]]:
        others = [f"{other} " for other in config.losses if other != name]
        return [check for check in checks if not check["name"].startswith(tuple(others))]

    return {
        "losses": [
            {
                "name": name,
                "weight": choice.weight,
                "share": _share(epochs, name),
                "settings": _loss_settings(name, choice),
                "checks": about(name),
            }
            for name, choice in config.losses.items()
            if choice.is_used
        ],
        "shares_of": gradient_of(reference_of_run(config, has_labels=has_labels)),
        "inheritance": _inheritance(folder),
        "teacher": _beside_teacher(folder),
        "strategy": {
            "name": config.strategy,
            "label_weight": config.label_weight,
            "unlabelled_images": read_json(folder / MANIFEST)["figures"].get("unlabelled_images", 0),
        },
    }


def _beside_teacher(folder: Path) -> dict[str, float | None] | None:
    """mAP50-95 of the teacher, as the student saw it, and of the student, both on val; None without a teacher."""
    file = folder / "teacher.json"
    if not file.is_file():
        return None
    measured = read_json(file)
    teacher, student = measured["map50_95"], measured["student_map50_95"]
    return {"map50_95": teacher, "student_map50_95": student, "retained": ratio(student, teacher)}


def _inheritance(folder: Path) -> dict[str, Any] | None:
    """The weights that the student took over from a larger network; None where it started from scratch."""
    file = folder / "inheritance.json"
    return read_json(file) if file.is_file() else None


def _share(epochs: Sequence[Mapping[str, str]], name: str) -> float | None:
    """The loss's gradient as a share of the reference's, in the last epoch that has it above 0."""
    shares = [float(row[share_column(name)] or 0) for row in epochs]
    return next((share for share in reversed(shares) if share > 0), None)


def _loss_settings(name: str, choice: LossChoice) -> dict[str, Any]:
    """The loss's own settings, defaults included."""
    return LOSSES[name].read_settings(choice.settings).model_dump(mode="json")


def _export(config: ExportConfig, document: Mapping[str, Any]) -> dict[str, Any]:
    agreement = document["agreement"][SHIPPED]
    return {
        "max_box_error_px": agreement["max_box_error_px"],
        "max_score_error": agreement["max_score_error"],
        "box_limit_px": config.max_box_error,
        "score_limit": config.max_score_error,
        "images": agreement["images"],
        "candidates": document["candidates"],
        "nms_iterations": config.nms_iterations,
    }


def _calibration(folders: Folders) -> dict[str, Any] | None:
    used = [entry["calibration"] for entry in calibrated_entries(folders).values() if entry["calibration"]]
    if not used:
        return None
    methods = ", ".join(dict.fromkeys(calibration["method"] for calibration in used))
    return {"images": used[0]["n"], "sha256": used[0]["sha256"], "method": methods, "split": "train"}


def _quantisation(folders: Folders) -> list[dict[str, Any]]:
    """The INT8 flavours whose layers were ranked."""
    entries = [entry for entry, _ in flavour_entries(folders) if entry["layers"]]
    return [{"precision": entry["name"], "layers": entry["layers"], "steps": entry["steps"]} for entry in entries]


def _engine(plan: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    layers = read_layers(folder / plan["file"], plan["sha256"]) if plan["file"] else ()
    return {
        "file": plan["file"] or f"{plan['precision']} plan",
        "precision": plan["precision"],
        "backend": next(iter(plan["versions"]), "none"),
        "targets": plan["targets"],
        "bytes": plan["bytes"],
        "seconds": plan["seconds"],
        "ran": False,
        "note": plan["skipped"].removeprefix("skipped: ") or "a run measures on the CPU",
        **facts_of(layers),
    }


def _stage(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "seconds": read_json(folder / MANIFEST)["seconds"], "skipped": False}


def inputs_of(recipe: Recipe, folders: Folders) -> Inputs:
    return Inputs(folders, dataset_of(recipe, folders), study_of(recipe, folders["data"].parent))


STAGE = Stage(
    "report",
    settings=Config,
    inputs=inputs_of,
    run=run,
    after=("data", "teacher", "distill", "export", "quantize", "qad", "build", "bench"),
    beside={"study": study_of},
    version=2,
)
