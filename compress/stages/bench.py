"""Bench: latency and mAP of every file, measured in one run on one machine, so that they may be compared.

In: files, and the data set whose val split they are measured on. Out: `bench.json`, the rows of the report.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench import Entry, Plan, measure_files
from benchmarks.render import write
from benchmarks.report import Report, make_report
from benchmarks.rows import Row, plain, time_text
from compress.config import IMGSZ, BenchConfig, ExportConfig, Recipe, Settings, Side
from compress.data import Dataset, Sample, SplitIndex
from compress.evaluate import evaluate
from compress.inputs import STUDENT, MeasuredFile, dataset_of, measured_files, measured_teacher, plan_of, suited
from compress.log import Log
from compress.models import complexity, load_model
from compress.stages import Figures, Stage, cpu_and_runtime
from compress.store import Folders
from runtime.files import read_json, write_json
from runtime.machine import facts


class Config(Settings):
    bench: BenchConfig = BenchConfig()
    imgsz: Side = IMGSZ
    """Side of the images on which the torch networks are measured."""
    export: ExportConfig = ExportConfig()
    """Its `imgsz` is the shape of the files, of which the networks' multiplications are counted."""


class Inputs(NamedTuple):
    """`networks` are checkpoints by role, measured in torch beside the files."""

    files: Sequence[MeasuredFile]
    data: Dataset
    networks: Mapping[str, Path] = {}
    device: str = "cpu"
    """A run measures on the CPU, as the gates of the flavours did; a command may name another device."""
    backend: str = "auto"
    """Runs the files; auto takes for each flavour the library that it is made for."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Measure all files in turns and write `bench.json` into `out`. Raises the errors of `measure_files`."""
    data = inputs.data
    plan = replace(plan_of(config.bench, data, inputs.device), backend=inputs.backend)
    measured = measured_images(config.bench, data)
    entries = [_entry(file, plan) for file in inputs.files]
    log(f"timing {len(entries)} files in turns" if len(entries) > 1 else f"timing {entries[0].path.name}")
    rows = measure_files(entries)
    for row in rows:
        log(_told(row))
    size_hw = config.export.imgsz or (config.imgsz, config.imgsz)
    torch = [
        torch_row(role, file, measured.samples, config.imgsz, size_hw, log) for role, file in inputs.networks.items()
    ]
    document = {"models": rows, "torch": torch, "dataset": dataset_row(data, measured), "machine": facts()}
    write_json(out / "bench.json", document)
    return {"files": len(rows)}


def measured_images(config: BenchConfig, data: Dataset) -> SplitIndex:
    """The validation images that are used: all, or the first `max_images`."""
    val = data.splits["val"]
    return replace(val, samples=val.samples[: config.max_images or None])


def dataset_row(data: Dataset, measured: SplitIndex) -> Row:
    """The report's data entry, with a digest of the images and labels that were measured."""
    return {
        "name": data.path.parent.name,
        "split": "val",
        "images": len(measured.samples),
        "instances": measured.boxes,
        "sha256": measured.sha256,
        "names": data.names,
    }


def _entry(file: MeasuredFile, plan: Plan) -> Entry:
    own, note = suited(plan, file.path)
    more = {"role": file.role, "kept": file.kept, "reason": file.reason, "loss": file.loss, "note": note}
    return Entry(file.path, own, precision=file.precision, more=more)


def _told(row: Row) -> str:
    """One line on a measured file."""
    accuracy, n = row["accuracy"]["map50_95"], row["latency"]["end_to_end"]["n"]
    return f"{row['role']} {row['precision']}: mAP50-95 {accuracy:.4f}, {time_text(row)} (end to end, n {n})"


def torch_row(role: str, file: Path, samples: Sequence[Sample], imgsz: int, size_hw: tuple[int, int], log: Log) -> Row:
    """The network before export, by YOLOv5's way of validating: rectangular batches, several labels per box.

    `imgsz` is the longer side of the images; `gflops` are those of one image of `size_hw`, the shape of the files.
    """
    model = load_model(file)
    found = evaluate(model, samples, imgsz=imgsz, batch=32, rect=True)
    assert found.coco is not None
    log(f"{role} in torch: mAP50-95 {found.coco.map50_95:.4f}, mAP50 {found.coco.map50:.4f}")
    cost = complexity(model.arch, size_hw)
    return {
        "name": role,
        "role": role,
        "scale": model.arch.scale or "custom",
        "parameters": cost.parameters,
        "gflops": 2e-9 * cost.macs,
        "bytes": file.stat().st_size,
        "accuracy": plain(found.coco),
        "note": f"rectangular batches of 32 at {imgsz} pixels, multi-label",
    }


def write_report(out: Path) -> Report:
    """The report of one measurement alone: `report.json` and its renderings beside the `bench.json` in `out`."""
    argv = [Path(sys.argv[0]).name, *sys.argv[1:]]
    report = make_report(out.name, argv=argv, **read_json(out / "bench.json"))
    write(report, out)
    return report


def inputs_of(recipe: Recipe, folders: Folders) -> Inputs:
    networks = {"teacher": measured_teacher(recipe, folders), "student": folders["distill"] / STUDENT}
    measured = {role: file for role, file in networks.items() if file}
    return Inputs(measured_files(folders), dataset_of(recipe, folders), measured)


STAGE = Stage(
    "bench",
    settings=Config,
    inputs=inputs_of,
    run=run,
    after=("data", "teacher", "distill", "export", "quantize", "qad"),
    facts={"machine": cpu_and_runtime},
    version=3,
)
