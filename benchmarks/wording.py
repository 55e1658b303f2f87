"""Numbers as text, and the sentences that a report says in words. Pure functions of the report's JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.report import Row, is_kept, p50, shared_settings

NOTHING = "–"
TOO_FEW = "n too small"
KIB = 1024
UNITS = ("bytes", "KiB", "MiB", "GiB")
FEW_IMAGES = 100
MAIN_SETTINGS = ("imgsz", "batch", "conf", "iou", "max_det")
SAME_TOLERANCE = 0.05


def milliseconds(value: float | None) -> str:
    """Three significant figures: 0.123, 1.23, 12.3, 123."""
    if value is None:
        return NOTHING
    whole_digits = len(str(int(value))) if value >= 1 else 0
    return f"{value:.{max(0, 3 - whole_digits)}f}"


def percentile(value: float | None) -> str:
    return TOO_FEW if value is None else milliseconds(value)


def accuracy(value: float | None) -> str:
    """Five figures, as COCO results are published."""
    return NOTHING if value is None else f"{value:.5f}"


def short_accuracy(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def size(value: float | None) -> str:
    """Bytes in the unit that leaves 1 to 1024 of it."""
    if value is None:
        return NOTHING
    power = 3 if value >= KIB**3 else 2 if value >= KIB**2 else 1
    return f"{value / KIB**power:.2f} {UNITS[power]}"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}×"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    """Thousands are grouped: 1 765 930."""
    return NOTHING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def number(value: Any) -> str:
    """A setting as it was given."""
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds:.1f} s"


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}"


def moment(created: str) -> str:
    """An ISO date and time in UTC, to the minute."""
    return f"{created[:16].replace('T', ' ')} UTC"


def gate(row: Row) -> str:
    return NOTHING if row["gate"] is None else "kept" if row["gate"]["kept"] else "refused"


def label(row: Row, rows: Sequence[Row] = ()) -> str:
    """Shortest name of a row: its role and precision, with backend or file where that is not enough."""
    options = (
        lambda other: f"{other['role']} {other['precision']}",
        lambda other: f"{other['role']} {other['precision']} {other['backend']}",
        lambda other: other["file"],
    )
    own = [name(row) for name in options]
    unique = (text for name, text in zip(options, own, strict=True) if [name(other) for other in rows].count(text) <= 1)
    return next(unique, own[-1])


def model_cells(row: Row) -> list[str]:
    """A row of the table, in the order of `report.MARKDOWN_COLUMNS`."""
    span = row["latency"]["end_to_end"] if row["latency"] else None
    figures = row["accuracy"] or {}
    tail = [percentile(span[p]) if span else NOTHING for p in ("p50", "p90", "p99")]
    return [
        *(row["file"], row["precision"], row["backend"], size(row["bytes"])),
        *(accuracy(figures.get(key)) for key in ("map50_95", "map50")),
        *tail,
        count(span["n"]) if span else NOTHING,
        gate(row),
    ]


def summary(data: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing the figures with others."""
    settings, dataset = shared_settings(data["models"]), data["dataset"]
    lines = [f"Measured {moment(data['created'])} on {machine_name(data['machine'])}"]
    if dataset:
        lines.append(f"Data: {dataset['name']}, {count(dataset['images'])} images{labelled(dataset)}")
    shared = [f"{key} {number(settings[key])}" for key in MAIN_SETTINGS if key in settings]
    lines += ["Settings: " + ", ".join(shared)] if shared else []
    return [*lines, "Latency is milliseconds from decoded frame to final boxes"]


def labelled(dataset: Mapping[str, Any]) -> str:
    return "" if dataset["instances"] is None else f", {count(dataset['instances'])} objects"


def machine_name(machine: Mapping[str, Any]) -> str:
    gpus = machine.get("gpus") or []
    named = [gpu["name"] if isinstance(gpu, Mapping) else str(gpu) for gpu in gpus]
    cpu = str(machine.get("cpu", "an unknown CPU"))
    return ", ".join([*named, cpu]) + (f" ({machine['cores']} cores)" if machine.get("cores") else "")


# ---------------------------------------------------------------------------------------------------------- sentences


def findings(data: Mapping[str, Any]) -> list[str]:
    """What the figures say, refusals and disappointments first of all."""
    rows = data["models"]
    parts = (_settings, _refusals, _quantised, _slower_students, _unsteady)
    sentences = [sentence for part in parts for sentence in part(rows)]
    return [*sentences, *_idle_engines(data.get("engines", ())), *_few_images(data), *data.get("notes", ())]


def _settings(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each setting in which the files differ."""
    shared = shared_settings(rows)
    for key in rows[0]["settings"] if rows else ():
        if key not in shared:
            each = ", ".join(f"{number(row['settings'][key])} for {row['file']}" for row in rows)
            yield f"{key} differs, so the files are not directly comparable: {each}."


def _refusals(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if not is_kept(row):
            yield f"{row['file']} was refused by its gate: {row['gate']['reason']}."


def _quantised(rows: Sequence[Row]) -> Iterator[str]:
    """Each reduced precision against FP32 of the same role, backend and device."""
    for row in rows:
        full = _full_precision(row, rows)
        if full is None or p50(row) is None or p50(full) is None:
            continue
        own, other = p50(row) or 0.0, p50(full) or 0.0
        figures = f"p50 {milliseconds(own)} ms against {milliseconds(other)} ms"
        answer = "is faster than" if own < (1 - SAME_TOLERANCE) * other else "is not faster than"
        yield f"{row['precision']} {answer} fp32 on this machine ({row['role']}, {row['backend']}): {figures}."


def _full_precision(row: Row, rows: Sequence[Row]) -> Row | None:
    same = [other for other in rows if all(other.get(k) == row.get(k) for k in ("role", "backend", "device"))]
    return next((r for r in same if r["precision"] == "fp32"), None) if row["precision"] != "fp32" else None


def _slower_students(rows: Sequence[Row]) -> Iterator[str]:
    for teacher in (row for row in rows if row["role"] == "teacher" and p50(row)):
        for row in rows:
            if row["role"] == "student" and (p50(row) or 0.0) >= (p50(teacher) or 0.0):
                yield f"{row['file']} is not faster than the teacher's {teacher['file']}."


def _unsteady(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row["latency"] and not (row["latency"]["steady"] and row["latency"]["warmup"]["settled"]):
            yield f"The latency of {row['file']} drifted while it was measured: repeat it on a quiet machine."


def _idle_engines(engines: Sequence[Row]) -> Iterator[str]:
    for engine in engines:
        if not engine["ran"]:
            note = engine.get("note") or "it does not match"
            yield f"{engine['file']} was built for {', '.join(engine['targets'])} and not run on this machine: {note}."


def _few_images(data: Mapping[str, Any]) -> Iterator[str]:
    images = [row["accuracy"]["images"] for row in data["models"] if row["accuracy"]]
    if images and min(images) < FEW_IMAGES:
        yield f"Accuracy stands on {min(images)} images: differences of a few points are noise."
