"""Files of a run, measured by `benchmarks.bench` on the validation images, and the gate that judges a flavour."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.accuracy import detector_accuracy
from benchmarks.bench import Plan, compare_files, measure_file
from benchmarks.latency import LatencyRatio
from benchmarks.report import Row, make_report, plain
from compress.config import BenchConfig
from compress.data import DataConfig, load_data
from compress.data.index import index_split
from compress.flavours import FLAVOURS
from compress.graph.candidates import Validation
from compress.log import Log
from compress.models import complexity, load_model
from compress.pipeline.inputs import Candidate, validation_of
from compress.validate import validate
from runtime.machine import facts

Document = dict[str, Any]

GATE_SAMPLES = 200
"""Timed calls of each file, ten in each of twenty rounds."""
NOTES = {name: flavour.note for name, flavour in FLAVOURS.items()}


def plan_of(data: Validation, config: BenchConfig, device: str = "cpu") -> Plan:
    return Plan(
        data.images[: config.max_images or None],
        data.ground_truth,
        samples=config.latency_samples,
        warmup_ms=config.warmup_ms,
        accuracy_conf=config.accuracy_conf,
        device=device,
    )


@dataclass(frozen=True)
class FileGate:
    """Judges a flavour by its own mAP on the plan's images, and by its latency in turns with FP32."""

    plan: Plan

    def accuracy(self, path: Path) -> float:
        plan = self.plan
        assert plan.ground_truth is not None, "a validation has one"
        with plan.detector(path) as detector:
            found = detector_accuracy(
                detector, plan.images, plan.ground_truth, conf=plan.accuracy_conf, max_det=plan.accuracy_max_det
            )
        return found.map50_95

    def latency(self, reference: Path, candidate: Path) -> LatencyRatio:
        return compare_files(reference, candidate, self.plan)


def gate(data: Validation, config: BenchConfig) -> FileGate:
    plan = plan_of(data, config)
    return FileGate(replace(plan, samples=min(plan.samples, GATE_SAMPLES)))


def measure_rows(files: Sequence[Candidate], data: Validation, config: BenchConfig, log: Log) -> list[Row]:
    """Rows of the report, one for each file, all measured in this run on the CPU."""
    plan, rows = plan_of(data, config), []
    for file in files:
        note = NOTES.get(file.precision, "")
        row = measure_file(
            file.path,
            plan,
            role=file.role,
            precision=file.precision,
            kept=file.kept,
            reason=file.reason,
            note=note,
        )
        rows.append(row)
        log(_line(row))
    return rows


def _line(row: Row) -> str:
    latency = row["latency"]["end_to_end"]
    return (
        f"{row['role']} {row['precision']}: mAP50-95 {row['accuracy']['map50_95']:.4f}, "
        f"p50 {latency['p50']:.2f} ms end to end (n {latency['n']})"
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
    plan, rows = plan_of(validation, config, device="auto"), []
    for path in paths:
        rows.append(measure_file(path, plan))
        log(_line(rows[-1]))
    dataset = {
        "name": data.path.parent.name,
        "split": "val",
        "images": len(validation.images),
        "instances": len(validation.ground_truth["annotations"]),
        "sha256": None,
        "names": data.names,
    }
    result = make_report(
        out.name, machine=facts(), argv=[Path(sys.argv[0]).name, *sys.argv[1:]], dataset=dataset, models=rows
    )
    result.write(out)
    return dict(result.data)
