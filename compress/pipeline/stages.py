"""What each stage does, told in terms of the rooms that do it.

Every function takes the recipe and its `Work` (inputs to read, `out` to write, `log` for a line) and returns the
figures that its manifest keeps.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.render import write
from compress.build import build
from compress.compute.numerics import flush_denormals
from compress.config import Recipe, TeacherConfig
from compress.data import DataConfig, load_data
from compress.data.class_names import class_conflict
from compress.data.coco import to_coco
from compress.data.index import Index, index_split
from compress.data.labels import label_path
from compress.distill import distill
from compress.export import SHIPPED, export
from compress.models import checkpoint
from compress.pipeline.bundle import bundle
from compress.pipeline.inputs import (
    TEACHER,
    kept_files,
    measured_files,
    require_frames,
    training_images,
    validation_of,
)
from compress.pipeline.measure import gate, measure_rows, torch_row
from compress.pipeline.reporting import assemble
from compress.quantize import REFERENCE, quantize
from compress.store import Work
from compress.train import TrainResult, train
from runtime.bundle import card_of
from runtime.detector import Detector
from runtime.errors import InputError, UsageError
from runtime.files import sha256, write_json
from runtime.machine import facts

Figures = Mapping[str, Any]


# --- data ------------------------------------------------------------------------------------------------------------


def run_data(recipe: Recipe, work: Work) -> Figures:
    """Out: `data.json` (counts and problems of each split) and `val.json` (COCO ground truth)."""
    config = load_data(recipe.data)
    splits = {split: index_split(config, split) for split in ("train", "val")}
    for split, index in splits.items():
        for problem in index.problems:
            work.log(f"{split}: skipped {problem}")
    counts = {split: _counts(index) for split, index in splits.items()}
    write_json(work.out / "data.json", {"names": config.names, "digest": data_digest(recipe), "splits": counts})
    write_json(work.out / "val.json", to_coco(splits["val"].samples, config.names))
    return {"classes": len(config.names)} | {f"{split}_images": counts[split]["images"] for split in counts}


def _counts(index: Index) -> dict[str, Any]:
    return {
        "images": len(index.samples),
        "boxes": sum(len(sample.labels) for sample in index.samples),
        "problems": [str(problem) for problem in index.problems],
    }


def data_digest(recipe: Recipe) -> str:
    """sha256 over data.yaml's content, every label's content, and every image's path, size and time of change."""
    config = load_data(recipe.data)
    digest = hashlib.sha256(repr((config.names, config.notices)).encode())
    for split, images in sorted(config.splits.items()):
        for image in images:
            digest.update(f"{split} {image} {_state(image)} ".encode())
            label = label_path(image)
            digest.update(label.read_bytes() if label.is_file() else b"background")
    return digest.hexdigest()


def _state(file: Path) -> str:
    try:
        status = file.stat()
    except OSError:
        return "absent"
    return f"{status.st_size} {status.st_mtime_ns}"


# --- teacher and student ---------------------------------------------------------------------------------------------


def run_teacher(recipe: Recipe, work: Work) -> Figures:
    """Out: `teacher.safetensors`, and the training's folder `training/` where one was needed."""
    flush_denormals()
    config, data = recipe.teacher, load_data(recipe.data)
    goal = work.out / "teacher.safetensors"
    if config.weights and _usable_as_it_is(config, data):
        work.log(f"teacher: {config.weights.name} knows these classes and is used as it is")
        checkpoint.save_model(checkpoint.load_model(config.weights), goal, {"origin": config.weights.name})
        return {"trained": "no"}
    result = train(
        config,
        data=data,
        out=work.out / "training",
        weights=config.weights,
        scale=None if config.weights else config.scale,
        device=recipe.device,
        resume=_is_begun(work.out / "training"),
        log=work.log,
    )
    return _keep_best(result, goal)


def _usable_as_it_is(config: TeacherConfig, data: DataConfig) -> bool:
    """Errors: UsageError where a teacher of other classes may not be fine-tuned."""
    assert config.weights is not None
    names = checkpoint.load(config.weights).architecture.names
    same = names == data.names
    if config.finetune == "never" and not same:
        raise UsageError(
            class_conflict(f"teacher {config.weights.name}", names, "the data", data.names),
            "Set teacher.finetune to auto, or give a teacher of these classes",
        )
    return same and config.finetune != "always"


def run_distill(recipe: Recipe, work: Work) -> Figures:
    """Out: `student.safetensors` and the training's folder `training/`."""
    result = distill(
        recipe.distill,
        data=load_data(recipe.data),
        out=work.out / "training",
        teacher=work.inputs["teacher"] / "teacher.safetensors",
        weights=recipe.student.weights,
        scale=recipe.student.scale,
        device=recipe.device,
        resume=_is_begun(work.out / "training"),
        log=work.log,
    )
    return _keep_best(result, work.out / "student.safetensors")


def _is_begun(training: Path) -> bool:
    return (training / "state.pt").is_file()


def _keep_best(result: TrainResult, goal: Path) -> Figures:
    """The best weights are the result of the stage; its folder `training/` tells how they came about."""
    shutil.copyfile(result.best, goal)
    metrics = result.metrics
    return {
        "epochs": result.epochs,
        "map50": metrics["metrics/mAP_0.5"],
        "map50_95": metrics["metrics/mAP_0.5:0.95"],
    }


# --- files -----------------------------------------------------------------------------------------------------------


def run_export(recipe: Recipe, work: Work) -> Figures:
    """Out: `model.onnx`, `model.yolov5.onnx`, `export.json`, and `teacher.onnx` to measure against."""
    validation = validation_of(load_data(recipe.data))
    if recipe.export.frame:
        require_frames(validation, recipe.export.frame)
    student = work.inputs["distill"] / "student.safetensors"
    result = export(recipe.export, model=student, out=work.out, imgsz=recipe.imgsz, data=validation, log=work.log)
    alike = recipe.export.model_copy(update={"candidates": result.card.candidates})
    teacher = work.inputs["teacher"] / "teacher.safetensors"
    work.log("the teacher, exported alike for comparison:")
    measured = export(alike, model=teacher, out=work.out / "teacher", imgsz=recipe.imgsz, log=work.log)
    measured.model_onnx.rename(work.out / TEACHER)
    shutil.rmtree(work.out / "teacher")
    write_json(work.out / "export.json", result.to_json())
    return {
        "candidates": result.card.candidates,
        "max_box_error_px": result.boxes.max_box_error_px,
        "max_score_error": result.boxes.max_score_error,
    }


def run_quantize(recipe: Recipe, work: Work) -> Figures:
    """Out: `model.<flavour>.onnx` and `quantize.json` with every flavour's verdict."""
    data = load_data(recipe.data)
    flavours = quantize(
        recipe.quantize,
        model=work.inputs["export"] / SHIPPED,
        images=training_images(data),
        out=work.out,
        evaluate=gate(validation_of(data), recipe.bench),
        log=work.log,
    )
    write_json(work.out / "quantize.json", [flavour.to_json() for flavour in flavours])
    return {"kept": ", ".join(flavour.name for flavour in flavours if flavour.kept)}


def run_build(recipe: Recipe, work: Work) -> Figures:
    """Out: the plans, `model.json` for them, and `build.json`."""
    models = kept_files(work.inputs)
    card = card_of(models[REFERENCE])
    plans = build(recipe.build, models=models, out=work.out, card=card, log=work.log)
    write_json(work.out / "build.json", [plan.to_json() for plan in plans])
    return {"plans": sum(plan.artifact is not None for plan in plans)}


# --- figures and bundle ----------------------------------------------------------------------------------------------


def run_bench(recipe: Recipe, work: Work) -> Figures:
    """Out: `bench.json`, the rows of the report: each file's latency and mAP, taken in this one run."""
    data = load_data(recipe.data)
    rows = measure_rows(measured_files(work.inputs), validation_of(data), recipe.bench, work.log)
    networks = {"teacher": work.inputs["teacher"], "student": work.inputs["distill"]}
    torch = [
        torch_row(role, folder / f"{role}.safetensors", data, recipe.imgsz, work.log)
        for role, folder in networks.items()
    ]
    write_json(work.out / "bench.json", {"models": rows, "torch": torch, "machine": facts()})
    return {"files": len(rows)}


def run_report(recipe: Recipe, work: Work) -> Figures:
    """Out: `report.json` and its renderings `.html`, `.md`, `.csv`."""
    report = assemble(recipe, work.inputs)
    write(report, work.out)
    headline = report.data["headline"] or {}
    return {key: headline[key] for key in ("file", "map50_95", "p50_ms", "speedup") if headline.get(key) is not None}


def run_bundle(_: Recipe, work: Work) -> Figures:
    """Out: what to copy to the device, loadable by `runtime.Detector.load`."""
    card = bundle(work.inputs, work.out)
    with Detector.load(work.out, device="cpu") as detector:
        runs = detector.artifact.file if detector.artifact else ""
        work.log(f"bundle: {len(card.artifacts)} files; this machine runs {runs}")
    return {"files": len(card.artifacts)}


RUNNERS: Mapping[str, Callable[[Recipe, Work], Figures]] = {
    "data": run_data,
    "teacher": run_teacher,
    "distill": run_distill,
    "export": run_export,
    "quantize": run_quantize,
    "build": run_build,
    "bench": run_bench,
    "report": run_report,
    "bundle": run_bundle,
}


DIGESTS: Mapping[str, Callable[[Recipe], str]] = {
    "data": data_digest,
    "teacher_weights": lambda recipe: _digest(recipe.teacher.weights),
    "student_weights": lambda recipe: _digest(recipe.student.weights),
}
"""What stands for files of the user in a fingerprint."""


def _digest(file: Path | None) -> str:
    if file is None:
        return "none"
    if not file.is_file():
        raise InputError(f"{file}: no such checkpoint", "Correct the weights in the recipe")
    return sha256(file)


FACTS: Mapping[str, Callable[[], str]] = {
    "tensorrt": lambda: _packages("tensorrt", "tensorrt_rtx"),
    "machine": lambda: " ".join([facts()["cpu"], str(facts()["gpus"]), _packages("onnxruntime")]),
}
"""What of the machine changes a stage's result: a new TensorRT rebuilds engines and does not retrain."""


def _packages(*names: str) -> str:
    return " ".join(f"{name} {facts()['packages'].get(name, 'absent')}" for name in names)
