"""The report: one JSON that a schema checks.

In: rows of measured files and the other facts of a run. Out: a `Report`, from which `benchmarks.render` makes pages.
Every number of a page is in the report. Figures that compare rows (`headline`) are therefore computed here, when the
report is made, not when it is drawn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.packages import optional
from benchmarks.rows import Row, ap, identities, is_kept, latency_ratio, p50, plain, preference, ratio
from runtime.errors import InputError
from runtime.files import read_json, write_json

SCHEMA_VERSION = 3
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
REPORT_FILE = "report.json"
LISTS = ("argv", "torch", "training", "quantisation", "engines", "stages", "notes")
OPTIONAL = ("distillation", "gain", "export", "calibration")


@dataclass(frozen=True)
class Report:
    """A report whose `data` follow report.schema.json. Raises InputError when they do not."""

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        _validate(self.data, "report")

    @classmethod
    def load(cls, path: Path) -> Report:
        """From a file, or from the folder that holds `report.json`. Raises InputError when it is no report."""
        path = path / REPORT_FILE if path.is_dir() else path
        data = read_json(path, "Give a report.json or its folder")
        _validate(data, str(path))
        return cls(data)

    def save(self, path: Path) -> None:
        write_json(path, self.data)


def make_report(
    name: str,
    *,
    machine: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    dataset: Mapping[str, Any] | None = None,
    created: datetime | None = None,
    **sections: Any,
) -> Report:
    """A checked report. `models` are `model_row`s; `sections` are argv, torch, training, distillation, gain, export,
    calibration, quantisation, engines, stages and notes as the schema describes them. Raises InputError that names a
    wrong key.
    """
    moment = (created or datetime.now(timezone.utc)).astimezone(timezone.utc)
    body = dict.fromkeys(OPTIONAL) | {key: [] for key in LISTS} | sections
    return Report(
        plain(
            {
                "schema_version": SCHEMA_VERSION,
                "name": name,
                "created": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
                "machine": machine,
                "dataset": dataset,
                "headline": headline(plain(models), plain(body["torch"])),
                "models": models,
                **body,
            }
        )
    )


# ----------------------------------------------------------------------------------------------------------- headline


def headline(models: Sequence[Row], torch: Sequence[Row] = ()) -> Row | None:
    """The student file that passed its gate and comes first by `preference`, against the teacher's file; None if
    nothing was kept, or if the student's or the teacher's files are of several models: the best of one is no figure of
    another.

    A speed-up compares files on one device: a student on the GPU says nothing about a teacher on the CPU.
    """
    students = [row for row in models if row["role"] == "student" and is_kept(row)]
    teachers = [row for row in models if row["role"] == "teacher"]
    if not students or any(len(identities(rows)) > 1 for rows in (students, teachers)):
        return None
    best = min(students, key=preference)
    beside = next((row for row in teachers if row["device"] == best["device"]), None)
    teacher = beside or next(iter(teachers), {})
    known = [row for row in (teacher, *torch) if row and row["role"] == "teacher"]
    return {
        "file": best["file"],
        "precision": best["precision"],
        "map50_95": ap(best),
        "map50": (best["accuracy"] or {}).get("map50"),
        "bytes": best["bytes"],
        "p50_ms": p50(best),
        "teacher_file": teacher.get("file"),
        "speedup": ratio(latency_ratio(beside), latency_ratio(best)) if beside else None,
        "size_ratio": ratio(teacher.get("bytes"), best["bytes"]),
        "parameter_ratio": ratio(_first("parameters", known), _parameters(best, torch)),
        "retained": ratio(ap(best), next(filter(None, map(ap, known)), None)),
    }


def _parameters(row: Row, torch: Sequence[Row]) -> int | None:
    return _first("parameters", [row, *(entry for entry in torch if entry["role"] == "student")])


def _first(key: str, rows: Sequence[Row]) -> Any:
    return next((row[key] for row in rows if row.get(key)), None)


# ------------------------------------------------------------------------------------------------------------- schema


@lru_cache(maxsize=1)
def _validator() -> Any:
    return optional("jsonschema").Draft202012Validator(schema())


@lru_cache(maxsize=1)
def schema() -> Row:
    """report.schema.json: the keys of a report, their types and units."""
    return json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))


def _validate(data: Any, source: str) -> None:
    version = data.get("schema_version") if isinstance(data, Mapping) else None
    if isinstance(version, int) and version != SCHEMA_VERSION:
        remedy = "Update edgestill" if version > SCHEMA_VERSION else "Measure again"
        raise InputError(f"{source} has schema version {version}, expected {SCHEMA_VERSION}", remedy)
    error = next(iter(sorted(_validator().iter_errors(data), key=lambda found: list(map(str, found.path)))), None)
    if error is not None:
        where = "/".join(map(str, error.path)) or "the whole"
        raise InputError(f"{source}: {where} does not follow the schema: {error.message[:200]}")
