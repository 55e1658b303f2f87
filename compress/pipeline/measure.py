"""Files of a run, measured by `benchmarks.bench` on the validation images, and the gate that judges a flavour."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.bench import Plan, measure_file
from benchmarks.render import write
from benchmarks.report import make_report
from benchmarks.rows import Row, ap, p50, plain
from compress.config import BenchConfig
from compress.data import DataConfig, load_data
from compress.data.index import index_split
from compress.graph.study import Validation
from compress.log import Log
from compress.models import complexity, load_model
from compress.pipeline.inputs import Candidate, validation_of
from compress.quantize import Measured
from compress.validate import validate
from runtime.machine import facts

Document = dict[str, Any]

GATE_SAMPLES = 100
"""A median needs no more."""
NOTES = dict.fromkeys(("fp16", "int8-trt"), "made for TensorRT; its latency on a CPU says nothing about a GPU")


def plan_of(data: Validation, config: BenchConfig, device: str = "cpu") -> Plan:
    return Plan(
        data.images[: config.max_images or None],
        data.ground_truth,
        samples=config.latency_samples,
        warmup_ms=config.warmup_ms,
        accuracy_conf=config.accuracy_conf,
        device=device,
    )


def gate(data: Validation, config: BenchConfig) -> Callable[[Path], Measured]:
    """The figures by which a flavour is judged: its own mAP, and its own median latency end to end."""
    plan = plan_of(data, config)
    plan = replace(plan, samples=min(plan.samples, GATE_SAMPLES))

    def evaluate(path: Path) -> Measured:
        row = measure_file(path, plan)
        accuracy, latency = ap(row), p50(row)
        assert accuracy is not None, "the plan has a ground truth"
        assert latency is not None, "BenchConfig takes enough samples for a median"
        return Measured(accuracy, latency)

    return evaluate


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
    write(result, out)
    return dict(result.data)
