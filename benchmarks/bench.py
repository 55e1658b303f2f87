"""Measure model files: latency and accuracy of the same file, in the same run.

In: an ONNX file, an engine or a bundle, and pictures, with or without COCO annotations. Out: rows of a report.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import ACCURACY_CONF, COCO_MAX_DET, detector_accuracy, restrict
from benchmarks.environment import device_name
from benchmarks.latency import measure
from benchmarks.report import Row, model_row
from runtime.bundle import ModelFile, model_files
from runtime.detector import Detector
from runtime.errors import InputError, UnavailableError
from runtime.files import read_json, sha256
from runtime.image import IMAGE_SUFFIXES, read_image

MAX_FRAMES = 64
"""Decoded frames held in memory for the timing; accuracy reads every picture."""
MAX_JSON_BYTES = 2 << 30


@dataclass(frozen=True)
class Plan:
    """What is measured, and how; the same for every file of a report."""

    images: tuple[Path, ...]
    ground_truth: Mapping[str, Any] | None = None
    """COCO annotations; None leaves accuracy out."""
    samples: int = 200
    warmup_ms: float = 200.0
    interval_ms: float | None = None
    conf: float | None = None
    """Score threshold while timing; None is the model's own."""
    accuracy_conf: float = ACCURACY_CONF
    accuracy_max_det: int = COCO_MAX_DET
    device: str = "auto"
    threads: int | None = None


def bench_file(path: Path, plan: Plan, *, variant: str | None = None, role: str = "student", **more: Any) -> Row:
    """The report's row of one file; `more` are the row's other keys: kept, reason, parameters, gflops, note.

    Errors: as `Detector.load`, and InputError where no picture is annotated.
    """
    chosen = model_files(path, variant)[0]
    with Detector.load(path, conf=plan.conf, device=plan.device, variant=variant, threads=plan.threads) as detector:
        frames = [read_image(image) for image in plan.images[:MAX_FRAMES]]
        latency = measure(
            detector, frames, samples=plan.samples, warmup_ms=plan.warmup_ms, interval_ms=plan.interval_ms
        )
        return model_row(
            chosen.path,
            precision=detector.card.precision,
            backend=chosen.spec.name,
            role=role,
            latency=latency,
            accuracy=_accuracy(detector, plan),
            device=device_name(detector.providers),
            **more,
        )


def _accuracy(detector: Detector, plan: Plan) -> Any:
    if plan.ground_truth is None:
        return None
    pairs = annotated(plan.images, plan.ground_truth)
    return detector_accuracy(detector, pairs, plan.ground_truth, conf=plan.accuracy_conf, max_det=plan.accuracy_max_det)


def bench(path: Path, plan: Plan, variant: str | None = None) -> tuple[list[Row], list[Row]]:
    """Every file that `path` offers: rows of those that ran, and engine entries of those that this machine cannot run.

    A single file that does not run is an error, not an entry.
    """
    offered = model_files(path, variant)
    if len(offered) == 1:
        return [bench_file(path, plan, variant=variant)], []
    rows, idle = [], []
    for candidate in offered:
        try:
            rows.append(bench_file(path, plan, variant=candidate.path.name))
        except UnavailableError as error:
            idle.append(engine_row(candidate, str(error)))
    if not rows:
        raise UnavailableError(f"{path}: none of its files runs here: {idle[0]['note']}")
    return rows, idle


def engine_row(candidate: ModelFile, note: str) -> Row:
    """The report's entry of an engine that did not run."""
    artifact = candidate.artifact
    return {
        "file": candidate.path.name,
        "precision": artifact.precision if artifact else "",
        "backend": candidate.spec.name,
        "targets": list(artifact.targets) if artifact else [],
        "bytes": artifact.bytes if artifact else None,
        "ran": False,
        "note": note,
    }


def settings_of(path: Path, plan: Plan, argv: Sequence[str] = ()) -> Row:
    """The report's settings: what the first file's card fixes, and what the plan adds."""
    with Detector.load(path, conf=plan.conf, device=plan.device) as detector:
        card, conf = detector.card, detector.conf
    return {
        "conf": conf,
        "iou": card.iou,
        "max_det": card.max_det,
        "imgsz": max(card.size_hw),
        "batch": 1,
        "accuracy_conf": plan.accuracy_conf,
        "accuracy_max_det": plan.accuracy_max_det,
        "latency_samples": plan.samples,
        "warmup_ms": plan.warmup_ms,
        "interval_ms": plan.interval_ms,
        "device": plan.device,
        "argv": list(argv),
    }


def pictures(folder: Path, most: int = 0) -> tuple[Path, ...]:
    """The folder's pictures by name, all or the first `most`. Errors: InputError where there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "Give a folder with pictures")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        raise InputError(f"{folder} holds no picture", f"Pictures are {', '.join(IMAGE_SUFFIXES)}")
    return tuple(found[:most] if most else found)


def read_coco(path: Path) -> Row:
    """COCO annotations from a JSON file. Errors: InputError."""
    hint = "Give COCO's instances JSON"
    data = read_json(path, most_bytes=MAX_JSON_BYTES, hint=hint)
    missing = [key for key in ("images", "annotations", "categories") if key not in data]
    if missing:
        raise InputError(f"{path} has no {missing[0]!r}", hint)
    return data


def annotated(images: Iterable[Path], ground_truth: Mapping[str, Any]) -> list[tuple[int, Path]]:
    """(image id, path) of the pictures that the annotations know by file name. Errors: InputError where none is."""
    ids = {Path(image["file_name"]).name: image["id"] for image in ground_truth["images"]}
    pairs = [(ids[path.name], path) for path in images if path.name in ids]
    if not pairs:
        raise InputError("The annotations know none of the pictures", "Their file names must agree")
    return pairs


def dataset_of(name: str, plan: Plan) -> Row:
    """The report's data entry, with a digest of every picture and of the annotations that count."""
    pairs = annotated(plan.images, plan.ground_truth) if plan.ground_truth is not None else None
    truth = restrict(plan.ground_truth, {image_id for image_id, _ in pairs}) if plan.ground_truth and pairs else None
    objects = None if truth is None else sum(not entry.get("iscrowd", 0) for entry in truth["annotations"])
    return {
        "name": name,
        "images": len(pairs or plan.images),
        "instances": objects,
        "sha256": digest(plan.images, truth),
    }


def digest(images: Iterable[Path], truth: Mapping[str, Any] | None = None) -> str:
    """Hex sha256 over names and contents of the pictures, and over the annotations."""
    whole = hashlib.sha256()
    for path in images:
        whole.update(f"{path.name}\0{sha256(path)}\n".encode())
    if truth is not None:
        whole.update(json.dumps(truth, sort_keys=True).encode())
    return whole.hexdigest()
