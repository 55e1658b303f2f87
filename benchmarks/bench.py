"""Measure model files: the latency and the accuracy of the same file, in the same run.

In: ONNX files, engines or bundles, and images, with or without COCO ground truth. Out: rows of a report, whose files
were timed in turns, and for two files the ratio of their latencies. Every other way to measure a file (`edgestill
bench`, the stages of a run, `python -m benchmarks`) calls this module.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accuracy import (
    ACCURACY_CONF,
    COCO_MAX_DET,
    Accuracy,
    Floats,
    detect_all,
    detector_accuracy,
    jackknife_maps,
    restrict,
)
from benchmarks.environment import device_name
from benchmarks.latency import ROUNDS, Frame, Latency, LatencyRatio, Subject, measure, require_rounds
from benchmarks.rows import FULL, Row, model_row, named_apart, time_over
from runtime.bundle import ModelFile, model_files
from runtime.detector import Detector
from runtime.errors import InputError, UnavailableError, UsageError
from runtime.files import sha256
from runtime.image import IMAGE_SUFFIXES, read_image
from runtime.layers import facts_of, read_layers
from runtime.sources import image_files

FRAMES = 64
"""Decoded images held in memory and timed in turn; accuracy reads all of them."""

NumberedImage = tuple[int, Path]
"""Id of the image in the ground truth, and its file."""


@dataclass(frozen=True)
class Plan:
    """How files are measured, and on which images; the same for every file of a report."""

    images: Sequence[NumberedImage]
    ground_truth: Mapping[str, Any] | None = None
    """COCO ground truth with the ids of `images`; None leaves the accuracy out."""
    samples: int = 200
    """Timed calls of each file."""
    batch: int = 1
    """Frames of a timed call, within what the file takes."""
    warmup_ms: float = 200.0
    interval_ms: float | None = None
    """Time between frames, as from a camera; None takes the next frame when the last one is done."""
    accuracy_conf: float = ACCURACY_CONF
    """Score threshold while accuracy is measured; latency is measured at the model's own."""
    device: str = "auto"
    backend: str = "auto"
    threads: int | None = None
    as_written: bool = False
    """Whether the quantised layers of an ONNX file are computed in float, because other kernels will run it."""

    def detector(self, path: Path, variant: str | None = None, *, spin: bool = True) -> Detector:
        return Detector.load(
            path, device=self.device, backend=self.backend, variant=variant, threads=self.threads, spin=spin,
            as_written=self.as_written,
        )  # fmt: skip

    def read_frames(self) -> list[Frame]:
        return [read_image(path) for _, path in self.images[:FRAMES]]


@dataclass(frozen=True)
class Entry:
    """A file or bundle to measure, how, and what its row says besides. Of a bundle it is the first file that runs here,
    or the `variant`.
    """

    path: Path
    plan: Plan
    """Files that are measured together may differ in `backend` and `as_written`, in nothing else."""
    variant: str | None = None
    precision: str | None = None
    """Instead of that of the card."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of `model_row`: role, kept, reason, loss, parameters, gflops, note."""

    def detector(self) -> Detector:
        return self.plan.detector(self.path, self.variant)


def measure_files(entries: Sequence[Entry]) -> list[Row]:
    """The report's rows of one or more files, which are loaded together and timed in turns.

    Settings, backend and device are those of the loaded detectors. Raises the errors of `Detector.load` and `measure`,
    InputError when no image or no object is labelled, and ValueError when the plans differ in more.
    """
    with ExitStack() as stack:
        return _rows([(entry, stack.enter_context(entry.detector())) for entry in entries])


def _rows(loaded: Sequence[tuple[Entry, Detector]]) -> list[Row]:
    plan = loaded[0][0].plan
    if any(replace(entry.plan, backend=plan.backend, as_written=plan.as_written) != plan for entry, _ in loaded):
        raise ValueError("The plans of one measurement differ in more than in what runs the files")
    frames = plan.read_frames()
    latencies = measure(
        [Subject(detector, frames, batch_of(detector, plan)) for _, detector in loaded],
        samples=plan.samples, warmup_ms=plan.warmup_ms, interval_ms=plan.interval_ms,
    )  # fmt: skip
    rows = [_row(*one, latency) for one, latency in zip(loaded, latencies, strict=True)]
    return _with_ratios(named_apart(rows, [entry.path for entry, _ in loaded]))


def _row(entry: Entry, detector: Detector, latency: Latency) -> Row:
    plan = entry.plan
    offered = model_files(entry.path, entry.variant, plan.backend)
    file = next(file for file in offered if file.artifact == detector.artifact)
    return model_row(
        file.path,
        precision=entry.precision or detector.card.precision,
        backend=file.spec.name,
        device=device_name(detector.providers),
        settings=_settings(detector, plan),
        identity=detector.card.identity,
        latency=latency,
        accuracy=_accuracy(detector, plan),
        **entry.more,
    )


def _with_ratios(rows: Sequence[Row]) -> list[Row]:
    """With the time of each over that of the student's FP32 file, or of the first one, on as many frames a call."""
    if len(rows) == 1:
        return list(rows)
    full = (row for row in rows if row["role"] == "student" and row["precision"] == FULL)
    reference = next(full, rows[0])

    def compared(row: Row) -> Row:
        if row["settings"]["batch"] != reference["settings"]["batch"]:
            return row
        ratio = {"of": reference["file"], **_ratio(row, reference)}
        return row | {"latency": row["latency"] | {"ratio": ratio}}

    return list(map(compared, rows))


def _ratio(row: Row, reference: Row) -> Row:
    """Without an interval where there are too few rounds."""
    if found := time_over(row, reference):
        return {"ratio": found.ratio, "low": found.low, "high": found.high}
    own, base = (float(np.median(one["latency"]["end_to_end"]["samples"])) for one in (row, reference))
    return {"ratio": own / base, "low": None, "high": None}


def batch_of(detector: Detector, plan: Plan) -> int:
    """Frames of a timed call: those of the plan, as far as the file takes them."""
    least, most = detector.card.batches
    return max(least, min(plan.batch, most or plan.batch))


def _size_text(size_hw: tuple[int, int]) -> int | str:
    """320, or "192x320" for height and width that differ."""
    height, width = size_hw
    return height if height == width else f"{height}x{width}"


def _settings(detector: Detector, plan: Plan) -> Row:
    return {
        "imgsz": _size_text(detector.card.size_hw),
        "batch": batch_of(detector, plan),
        "conf": detector.conf,
        "iou": detector.card.iou,
        "max_det": detector.card.max_det,
        "accuracy_conf": plan.accuracy_conf,
        "accuracy_max_det": COCO_MAX_DET,
        "latency_samples": plan.samples,
        "frames": min(FRAMES, len(plan.images)),
        "warmup_ms": plan.warmup_ms,
        "interval_ms": plan.interval_ms,
        "threads": plan.threads,
        "as_written": plan.as_written,
    }


def _accuracy(detector: Detector, plan: Plan) -> Accuracy | None:
    if plan.ground_truth is None:
        return None
    return detector_accuracy(detector, plan.images, plan.ground_truth, conf=plan.accuracy_conf)


def file_maps(path: Path, plan: Plan) -> Floats:
    """mAP50-95 of one file on all images, and with each group of images left out; see `jackknife_maps`.

    Raises UsageError when there is no ground truth.
    """
    if plan.ground_truth is None:
        raise UsageError("The plan has no ground truth, so there is no accuracy", "Give COCO annotations")
    truth = restrict(plan.ground_truth, {image_id for image_id, _ in plan.images})
    with plan.detector(path, spin=False) as detector:  # no latency is measured, and other work may have a core
        found = list(detect_all(detector, plan.images, truth, conf=plan.accuracy_conf))
    return jackknife_maps(truth, found)


def measure_all(path: Path, plan: Plan, variant: str | None = None) -> tuple[list[Row], list[Row]]:
    """Every file that `path` offers: rows of those that ran, engine entries of those that this machine cannot run.

    Raises UnavailableError when none runs; a single file raises its own error.
    """
    offered = model_files(path, variant, plan.backend)
    if len(offered) == 1:
        return measure_files([Entry(path, plan, variant)]), []
    with ExitStack() as stack:
        loaded, idle = [], []
        for file in offered:
            entry = Entry(path, plan, file.path.name)
            try:
                loaded.append((entry, stack.enter_context(entry.detector())))
            except UnavailableError as error:
                idle.append(engine_row(file, str(error)))
        if not loaded:
            raise UnavailableError(f"{path}: none of its files runs here: {idle[0]['note']}")
        return _rows(loaded), idle


def engine_row(file: ModelFile, note: str) -> Row:
    """The report's entry of an engine that did not run."""
    artifact = file.artifact
    return {
        "file": file.path.name,
        "precision": artifact.precision if artifact else "",
        "backend": file.spec.name,
        "targets": list(artifact.targets) if artifact else [],
        "bytes": artifact.bytes if artifact else None,
        "ran": False,
        "note": note,
        **facts_of(read_layers(file.path, artifact.sha256) if artifact else ()),
    }


def compare_files(
    reference: Path, other: Path, plan: Plan, rounds: int = ROUNDS, *, backend: str | None = None
) -> LatencyRatio:
    """The latency of `other` over that of `reference`, frame to boxes, both loaded once and timed in turns.

    `backend` runs the other, by default that of the plan. Both see the same frames in the same order. `plan.samples`
    calls of each are spread over the rounds, at least four in each. `LatencyRatio.verdict(limit)` judges. Raises the
    errors of `Detector.load`, and UsageError below ten rounds, and when a call of the one takes more frames than a call
    of the other.
    """
    samples = max(plan.samples, 4 * rounds)
    require_rounds(rounds, samples // max(rounds, 1))
    with (
        plan.detector(reference) as first,
        replace(plan, backend=backend or plan.backend).detector(other) as second,
    ):
        batches = batch_of(first, plan), batch_of(second, plan)
        if len(set(batches)) > 1:
            raise UsageError(
                f"A call of {reference.name} takes {batches[0]} frames, one of {other.name} {batches[1]}",
                "Compare files of one batch",
            )
        frames = plan.read_frames()
        subjects = [Subject(detector, frames, batches[0]) for detector in (first, second)]
        found = measure(subjects, samples=samples, rounds=rounds, warmup_ms=plan.warmup_ms)
    return LatencyRatio.of(*(latency.rounds for latency in found))


# --------------------------------------------------------------------------------------------------- images and labels


def list_images(folder: Path) -> list[Path]:
    """The images in `folder` and the folders below it, by path. Raises InputError when there is none."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder", "Give a folder with images")
    found = sorted(image_files(folder))
    if not found:
        raise InputError(f"{folder} holds no image", f"Images are {', '.join(IMAGE_SUFFIXES)}")
    return found


def numbered_images(folder: Path, ground_truth: Mapping[str, Any] | None = None, most: int = 0) -> list[NumberedImage]:
    """The images of `folder` with their ids, all or the first `most`; without ground truth they count from 1.

    With it, only those in it. Its `file_name` is a path relative to `folder` or to one of the folders above it,
    whichever finds images first. Raises InputError when there is no image, or none that the ground truth knows.
    """
    images = list_images(folder)[: most or None]
    if ground_truth is None:
        return list(enumerate(images, 1))
    for root in (folder, *folder.absolute().parents):
        ids = {root.absolute() / image["file_name"]: image["id"] for image in ground_truth["images"]}
        known = [(ids[path.absolute()], path) for path in images if path.absolute() in ids]
        if known:
            return known
    raise InputError(
        f"The annotations know none of the images in {folder}",
        "Give `file_name` as a path relative to the folder, or to one above it",
    )


def dataset_of(name: str, plan: Plan) -> Row:
    """The report's data entry, with a digest of every image and of the labels that count."""
    truth = restrict(plan.ground_truth, {image_id for image_id, _ in plan.images}) if plan.ground_truth else None
    objects = None if truth is None else sum(not entry.get("iscrowd", 0) for entry in truth["annotations"])
    return {
        "name": name,
        "images": len(plan.images),
        "instances": objects,
        "sha256": digest([path for _, path in plan.images], truth),
    }


def digest(images: Sequence[Path], truth: Mapping[str, Any] | None = None) -> str:
    """Hex sha256 over contents and names of the images, and over the labels.

    A name is the path below the deepest folder that holds all of them, so that it is the same on every machine.
    """
    root = os.path.commonpath([path.parent for path in images])
    whole = hashlib.sha256()
    for path in images:
        whole.update(os.fsencode(f"{path.relative_to(root).as_posix()}\0{sha256(path)}\n"))
    if truth is not None:
        whole.update(json.dumps(truth, sort_keys=True).encode())
    return whole.hexdigest()
