"""Latency and mAP of a file, taken in one run on one machine, so that they may stand in one row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Accuracy, detector_accuracy
from benchmarks.latency import Latency, measure
from benchmarks.report import Row, make_report, model_row, plain
from compress.config import BenchConfig
from compress.data import DataConfig, load_data
from compress.data.index import index_split
from compress.flavours import FLAVOURS
from compress.graph.candidates import Validation
from compress.log import Log
from compress.models import complexity, load_model
from compress.pipeline.inputs import Candidate, validation_of
from compress.quantize import Measured
from compress.validate import validate
from runtime.detector import Detector
from runtime.image import read_image
from runtime.machine import facts

Document = dict[str, Any]

LATENCY_FRAMES = 32
"""Distinct frames that the latency run cycles through: real pictures, so that NMS has its real load."""

GATE_SAMPLES = 100
"""A median needs no more."""
NOTES = {name: flavour.note for name, flavour in FLAVOURS.items()}


@dataclass(frozen=True)
class Measurement:
    """Both figures of one file."""

    accuracy: Accuracy
    latency: Latency


def measure_file(path: Path, data: Validation, config: BenchConfig, *, device: str = "cpu") -> Measurement:
    """Load `path` once; take mAP over the validation images, then the latency of decoded frames."""
    images = list(data.images)[: config.max_images or None]
    with Detector.load(path, device=device) as detector:
        accuracy = detector_accuracy(detector, images, data.ground_truth, conf=config.accuracy_conf)
        frames = [read_image(image) for _, image in images[:LATENCY_FRAMES]]
        latency = measure(detector, frames, samples=config.latency_samples, warmup_ms=config.warmup_ms)
    return Measurement(accuracy, latency)


def gate(data: Validation, config: BenchConfig) -> Callable[[Path], Measured]:
    """What a flavour is judged by: its own mAP, and its own median latency end to end."""
    brief = config.model_copy(update={"latency_samples": min(config.latency_samples, GATE_SAMPLES)})

    def evaluate(path: Path) -> Measured:
        found = measure_file(path, data, brief)
        p50 = found.latency.end_to_end.p50
        assert p50 is not None, "BenchConfig takes enough samples for a median"
        return Measured(found.accuracy.map50_95, p50)

    return evaluate


def measure_rows(
    files: Sequence[Candidate], data: Validation, config: BenchConfig, log: Log, device: str = "cpu"
) -> list[Row]:
    """Rows of the report, one for each file, all measured in this run."""
    rows = []
    for file in files:
        found = measure_file(file.path, data, config, device=device)
        rows.append(
            model_row(
                file.path,
                precision=file.precision,
                backend="onnx",
                role=file.role,
                device=device,
                note=NOTES.get(file.precision, "") if device == "cpu" else "",
                latency=found.latency,
                accuracy=found.accuracy,
                kept=file.kept,
                reason=file.reason,
            )
        )
        log(_line(rows[-1]))
    return rows


def _line(row: Row) -> str:
    span = row["latency"]["end_to_end"]
    return (
        f"{row['role']} {row['precision']}: mAP50-95 {row['accuracy']['map50_95']:.4f}, "
        f"p50 {span['p50']:.2f} ms end to end (n {span['n']})"
    )


def torch_row(role: str, file: Path, data: DataConfig, imgsz: int, log: Log) -> Row:
    """The network before export, by YOLOv5's way of validating: rectangular batches, several labels a box."""
    model = load_model(file)
    found = validate(model, index_split(data, "val").samples, imgsz=imgsz, batch=32, rect=True)
    assert found.coco is not None
    log(f"{role} in torch: mAP50-95 {found.coco.map50_95:.4f}, mAP50 {found.coco.map50:.4f}")
    cost = complexity(model.arch, (imgsz, imgsz))
    return {
        "name": role,
        "role": role,
        "scale": model.arch.scale or "custom",
        "parameters": cost.parameters,
        "gflops": 2e-9 * cost.macs,
        "bytes": file.stat().st_size,
        "accuracy": plain(found.coco),
        "note": "rectangular batches of 32, multi-label",
    }


def bench_files(paths: Sequence[Path], data_yaml: Path, config: BenchConfig, out: Path, log: Log) -> Document:
    """Measure files and bundles on the val split of `data_yaml`; writes the report into `out` and returns its JSON."""
    data = load_data(data_yaml)
    validation = validation_of(data)
    rows = measure_rows([_candidate(path) for path in paths], validation, config, log, device="auto")
    with Detector.load(paths[0]) as first:
        card = first.card
    settings = {
        "conf": card.conf,
        "iou": card.iou,
        "max_det": card.max_det,
        "imgsz": max(card.size_hw),
        "batch": 1,
        "accuracy_conf": config.accuracy_conf,
        "latency_samples": config.latency_samples,
        "warmup_ms": config.warmup_ms,
    }
    dataset = {
        "name": data.path.parent.name,
        "split": "val",
        "images": len(validation.images),
        "instances": len(validation.ground_truth["annotations"]),
        "sha256": None,
        "names": data.names,
    }
    result = make_report(out.name, machine=facts(), settings=settings, dataset=dataset, models=rows)
    result.write(out)
    return dict(result.data)


def _candidate(path: Path) -> Candidate:
    """A file or bundle named by the user. What it is, its card knows; a conventional ONNX has none."""
    with Detector.load(path) as detector:
        file = path / detector.artifact.file if path.is_dir() and detector.artifact else path
        return Candidate(file, "student", detector.card.precision)
