"""The report of a run, put together from what its stages left; nothing is measured here."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.report import Report, make_report
from compress.config import DistillConfig, LossChoice, Recipe
from compress.losses.distill import LOSSES
from compress.pipeline.inputs import read_json
from compress.store import MANIFEST
from compress.validate import fitness

CURVES = {
    "train/box_loss": "box",
    "train/obj_loss": "obj",
    "train/cls_loss": "cls",
    "metrics/mAP_0.5": "map50",
    "metrics/mAP_0.5:0.95": "map50_95",
}
"""Columns of results.csv -> names in the report."""


def assemble(recipe: Recipe, inputs: Mapping[str, Path]) -> Report:
    """A checked report from the stage folders `inputs`."""
    bench, exported = read_json(inputs["bench"] / "bench.json"), read_json(inputs["export"] / "export.json")
    return make_report(
        recipe.name,
        machine=bench["machine"],
        settings=_settings(recipe),
        dataset=_dataset(recipe, inputs["data"]),
        models=bench["models"],
        torch=bench["torch"],
        training=[row for role, stage in ROLES.items() if (row := _training(role, inputs[stage]))],
        distillation=_distillation(recipe.distill, inputs["distill"]),
        export=_export(recipe, exported),
        calibration=_calibration(inputs["quantize"]),
        engines=[_engine(plan) for plan in read_json(inputs["build"] / "build.json")],
        stages=[_stage(name, folder) for name, folder in inputs.items()],
    )


ROLES = {"teacher": "teacher", "student": "distill"}


def _settings(recipe: Recipe) -> dict[str, Any]:
    return {
        "conf": recipe.export.conf,
        "iou": recipe.export.iou,
        "max_det": recipe.export.max_det,
        "imgsz": recipe.imgsz,
        "batch": 1,
        "accuracy_conf": recipe.bench.accuracy_conf,
        "latency_samples": recipe.bench.latency_samples,
        "warmup_ms": recipe.bench.warmup_ms,
        "interval_ms": None,
        "device": "cpu",
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _dataset(recipe: Recipe, folder: Path) -> dict[str, Any]:
    data = read_json(folder / "data.json")
    return {
        "name": recipe.data.parent.name,
        "split": "val",
        "images": data["splits"]["val"]["images"],
        "instances": data["splits"]["val"]["boxes"],
        "sha256": data["digest"],
        "names": data["names"],
    }


def _training(role: str, folder: Path) -> dict[str, Any] | None:
    """The curves of a training; None where the teacher was used as it is."""
    table = folder / "training" / "results.csv"
    if not table.is_file():
        return None
    with table.open(newline="") as file:
        rows = [{key.strip(): value.strip() for key, value in row.items()} for row in csv.DictReader(file)]
    curves = [_point(row) for row in rows]
    measured = [point for point in curves if point.get("map50_95") is not None]
    best = max(measured, key=lambda point: fitness(point["map50"], point["map50_95"]), default=None)
    return {
        "name": role,
        "epochs": len(curves),
        "best_epoch": best and best["epoch"],
        "seconds": read_json(folder / MANIFEST)["seconds"],
        "curves": curves,
    }


def _point(row: Mapping[str, str]) -> dict[str, Any]:
    """One epoch, counted from 1 as in the log (the table counts from 0); a cell is empty where it was not validated."""
    values = {name: float(row[column]) for column, name in CURVES.items() if row.get(column)}
    return {"epoch": int(float(row["epoch"])) + 1, **values}


def _distillation(config: DistillConfig, folder: Path) -> dict[str, Any]:
    checks = read_json(folder / "training" / "checks.json")

    def about(name: str) -> list[dict[str, Any]]:
        others = [f"{other} " for other in config.losses if other != name]
        return [check for check in checks if not check["name"].startswith(tuple(others))]

    return {
        "losses": [
            {"name": name, "weight": choice.weight, "settings": _loss_settings(name, choice), "checks": about(name)}
            for name, choice in config.losses.items()
            if choice.weight
        ],
        "decay_to": config.decay_to,
    }


def _loss_settings(name: str, choice: LossChoice) -> dict[str, Any]:
    """The loss's own settings, defaults included."""
    return LOSSES[name].read_settings(choice.settings).model_dump(mode="json")


def _export(recipe: Recipe, document: Mapping[str, Any]) -> dict[str, Any]:
    agreement = document["agreement"]["model.onnx"]
    return {
        "max_box_error_px": agreement["max_box_error_px"],
        "max_score_error": agreement["max_score_error"],
        "box_limit_px": recipe.export.max_box_error,
        "score_limit": recipe.export.max_score_error,
        "images": agreement["images"],
        "candidates": document["candidates"],
        "nms_iterations": recipe.export.nms_iterations,
    }


def _calibration(folder: Path) -> dict[str, Any] | None:
    used = [entry["calibration"] for entry in read_json(folder / "quantize.json") if entry["calibration"]]
    if not used:
        return None
    return {"images": used[0]["n"], "sha256": used[0]["sha256"], "method": used[0]["method"], "split": "train"}


def _engine(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "file": plan["file"] or f"{plan['precision']} plan",
        "precision": plan["precision"],
        "backend": next(iter(plan["versions"]), "none"),
        "targets": plan["targets"],
        "bytes": plan["bytes"],
        "seconds": plan["seconds"],
        "ran": False,
        "note": plan["skipped"] or "built ahead of time; not run on the machine that made this report",
    }


def _stage(name: str, folder: Path) -> dict[str, Any]:
    return {"name": name, "seconds": read_json(folder / MANIFEST)["seconds"], "skipped": False}
