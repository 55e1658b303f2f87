"""The report: one JSON that a schema checks, and HTML, Markdown and CSV that are pure functions of it.

In: rows of measured files and whatever else the run knows. Out: `report.json`, and pages that show no number which is
not in it. Figures that compare rows (`headline`) are therefore computed when the report is made, not when it is drawn.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Accuracy
from benchmarks.latency import Latency
from runtime.errors import InputError, UnavailableError
from runtime.files import atomic_write, read_json, sha256, write_json

SCHEMA_VERSION = 2
SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
REPORT_FILE = "report.json"
MAX_REPORT_BYTES = 256 << 20
LISTS = ("argv", "torch", "training", "engines", "stages", "notes")
OPTIONAL = ("distillation", "export", "calibration")

Row = dict[str, Any]


@dataclass(frozen=True)
class Report:
    """A report whose `data` follow report.schema.json."""

    data: Mapping[str, Any]

    def __post_init__(self) -> None:
        _validate(self.data, "report")

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """From a file, or from the folder that holds `report.json`. Errors: InputError."""
        path = Path(path)
        path = path / REPORT_FILE if path.is_dir() else path
        data = read_json(path, most_bytes=MAX_REPORT_BYTES, hint="Give a report.json or its folder")
        _validate(data, str(path))
        return cls(data)

    def save(self, path: str | Path) -> None:
        write_json(path, self.data)

    def write(self, folder: str | Path) -> tuple[Path, ...]:
        """`report.json`, `.html`, `.md` and `.csv` in `folder`; gives their paths."""
        paths = tuple(Path(folder) / f"report.{suffix}" for suffix in ("json", "html", "md", "csv"))
        self.save(paths[0])
        for path, render in zip(paths[1:], (render_html, render_markdown, render_csv), strict=True):
            with atomic_write(path) as temporary:
                temporary.write_text(render(self), encoding="utf-8", newline="")
        return paths


def make_report(
    name: str,
    *,
    machine: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    dataset: Mapping[str, Any] | None = None,
    created: datetime | None = None,
    **sections: Any,
) -> Report:
    """A checked report. `models` are `model_row`s; `sections` are argv, torch, training, distillation, export,
    calibration, engines, stages and notes as the schema describes them. Raises InputError that names a wrong key.
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


def model_row(
    path: str | Path,
    *,
    precision: str,
    backend: str,
    device: str,
    settings: Mapping[str, Any],
    role: str = "student",
    latency: Latency | None = None,
    accuracy: Accuracy | None = None,
    kept: bool | None = None,
    reason: str = "",
    **more: Any,
) -> Row:
    """The row of one file, with its digest and size. `kept` is its gate's answer, None where there was no gate.

    `settings` say how the file was measured. `more`: parameters, gflops, note.
    """
    path = Path(path)
    return {
        "file": path.name,
        "role": role,
        "sha256": sha256(path),
        "bytes": path.stat().st_size,
        "precision": precision,
        "backend": backend,
        "device": device,
        "settings": plain(settings),
        "latency": plain(latency),
        "accuracy": plain(accuracy),
        "gate": None if kept is None else {"kept": kept, "reason": reason},
        **more,
    }


def plain(value: Any) -> Any:
    """JSON values of dataclasses, named tuples, mappings and sequences, all the way down."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") else value


# ------------------------------------------------------------------------------------------------------ what it says


def headline(models: Sequence[Row], torch: Sequence[Row] = ()) -> Row | None:
    """The fastest student file that passed its gate, against the teacher's file; None where nothing was kept.

    A speed-up compares files on one device: a student on the GPU says nothing about a teacher on the CPU.
    """
    students = [row for row in models if row["role"] == "student" and is_kept(row)]
    if not students:
        return None
    best = min(students, key=lambda row: (p50(row) is None, p50(row) or 0.0, -(ap(row) or 0.0)))
    teachers = [row for row in models if row["role"] == "teacher"]
    beside = next((row for row in teachers if row.get("device") == best.get("device")), None)
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
        "speedup": ratio(p50(beside), p50(best)) if beside else None,
        "size_ratio": ratio(teacher.get("bytes"), best["bytes"]),
        "parameter_ratio": ratio(_first("parameters", known), _parameters(best, torch)),
        "retained": ratio(ap(best), next(filter(None, map(ap, known)), None)),
    }


def _parameters(row: Row, torch: Sequence[Row]) -> int | None:
    return _first("parameters", [row, *(entry for entry in torch if entry["role"] == "student")])


def _first(key: str, rows: Sequence[Row]) -> Any:
    return next((row[key] for row in rows if row.get(key)), None)


def shared_settings(rows: Sequence[Row]) -> Row:
    """The settings that all rows have in common."""
    first = rows[0]["settings"] if rows else {}
    return {key: value for key, value in first.items() if all(row["settings"][key] == value for row in rows)}


def is_kept(row: Row) -> bool:
    return row["gate"] is None or row["gate"]["kept"]


def p50(row: Row) -> float | None:
    """Median milliseconds end to end, where the row has it."""
    return row["latency"]["end_to_end"]["p50"] if row.get("latency") else None


def ap(row: Row) -> float | None:
    """mAP50-95, where the row has it."""
    return row["accuracy"]["map50_95"] if row.get("accuracy") else None


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


# --------------------------------------------------------------------------------------------------------- renderings


def render_html(report: Report) -> str:
    """One self-contained page; the same report gives the same bytes."""
    from benchmarks.page import render

    return render(report.data)


MARKDOWN_COLUMNS = ("File", "Precision", "Backend", "Size", "mAP50-95", "mAP50", "p50", "p90", "p99", "n", "Gate")


def render_markdown(report: Report) -> str:
    """A table to paste, below what a reader must know to compare it."""
    from benchmarks import wording

    data = report.data
    lines = [f"# {data['name']}", "", *(f"- {item}" for item in wording.summary(data)), ""]
    lines += markdown_table(MARKDOWN_COLUMNS, [wording.model_cells(row) for row in data["models"]])
    lines += ["", *(f"- {sentence}" for sentence in wording.findings(data))]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]


SETTING_COLUMNS = ("imgsz", "batch", "conf", "iou", "max_det")
SPAN_COLUMNS = ("n", "mean", "std", "min", "p50", "p90", "p95", "p99", "max")
STAGES = ("preprocess", "inference", "postprocess")
ACCURACY_COLUMNS = ("map50_95", "map50", "map75", "small", "medium", "large", "recall", "images", "instances")
MODEL_COLUMNS = ("file", "role", "precision", "backend", "device", "sha256", "bytes", "parameters", "gflops")
CSV_COLUMNS = (
    *("name", "created"),
    *MODEL_COLUMNS,
    *SETTING_COLUMNS,
    *(f"{column}_ms" if column != "n" else column for column in SPAN_COLUMNS),
    *(f"{stage}_mean_ms" for stage in STAGES),
    *("steady",),
    *ACCURACY_COLUMNS,
    *("kept", "reason"),
)


def render_csv(report: Report) -> str:
    """One row for each measured file; what was not measured is an empty cell. Times are milliseconds."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_row(report.data, row) for row in report.data["models"])
    return text.getvalue()


def _csv_row(data: Mapping[str, Any], row: Row) -> list[Any]:
    latency, accuracy, gate = row["latency"] or {}, row["accuracy"] or {}, row["gate"] or {}
    return [
        *(data["name"], data["created"]),
        *(row.get(column) for column in MODEL_COLUMNS),
        *(row["settings"][column] for column in SETTING_COLUMNS),
        *(latency.get("end_to_end", {}).get(column) for column in SPAN_COLUMNS),
        *(latency.get(stage, {}).get("mean") for stage in STAGES),
        latency.get("steady"),
        *(accuracy.get(column) for column in ACCURACY_COLUMNS),
        *(gate.get("kept"), gate.get("reason")),
    ]


# ------------------------------------------------------------------------------------------------------------- schema


@lru_cache(maxsize=1)
def _validator() -> Any:
    try:
        from jsonschema import Draft202012Validator
    except ImportError as error:
        raise UnavailableError("Package jsonschema is not installed", "pip install 'edgestill[bench]'") from error
    return Draft202012Validator(schema())


@lru_cache(maxsize=1)
def schema() -> Row:
    """report.schema.json: what may stand in a report, and in which unit."""
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
