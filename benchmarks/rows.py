"""The row of a measured file, and the one table of its columns that every rendering reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accuracy import Accuracy
from benchmarks.formats import NOTHING, accuracy, count, digest_start, fraction, milliseconds, number, percentile, size
from benchmarks.latency import LEAST_ROUNDS, Latency, LatencyRatio
from runtime.files import sha256

Row = dict[str, Any]


def model_row(
    path: Path,
    *,
    precision: str,
    backend: str,
    device: str,
    settings: Mapping[str, Any],
    identity: str = "",
    role: str = "student",
    latency: Latency | None = None,
    accuracy: Accuracy | None = None,
    kept: bool | None = None,
    reason: str = "",
    loss: Mapping[str, float | None] | None = None,
    **more: Any,
) -> Row:
    """The row of one file, with its digest and size. `kept` is its gate's answer, None if there was no gate.
    `loss` is what the gate measured against FP32: drop, standard_error, image_error, draws.

    `settings` say how the file was measured. `identity` is that of its model, by default the file's digest, as a file
    that edgestill did not export is a model of its own. `more` are further values of one number or text: parameters,
    gflops, note.
    """
    digest = sha256(path)
    return {
        "file": path.name,
        "role": role,
        "identity": identity or digest,
        "sha256": digest,
        "bytes": path.stat().st_size,
        "precision": precision,
        "backend": backend,
        "device": device,
        "settings": plain(settings),
        "latency": plain(latency),
        "accuracy": plain(accuracy),
        "gate": None if kept is None else {"kept": kept, "reason": reason, **(loss or {})},
        **more,
    }


def plain(value: Any) -> Any:
    """JSON values of dataclasses, named tuples, mappings and sequences, nested to any depth."""
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


# ---------------------------------------------------------------------------------------------------------- accessors

Read = Callable[[Row], Any]


def nested_reader(*keys: str) -> Read:
    """A function that reads a nested value of a row; it gives None if a key on the way is absent."""

    def read(row: Row) -> Any:
        value: Any = row
        for key in keys:
            value = value.get(key) if value else None
        return value

    return read


p50 = nested_reader("latency", "end_to_end", "p50")
"""Milliseconds end to end that the median does not exceed, at 99 % confidence, if the row has them."""
ap = nested_reader("accuracy", "map50_95")
"""mAP50-95, if the row has it."""
latency_ratio = nested_reader("latency", "ratio", "ratio")
"""Time over that of one file of the measurement, round by round, by which files are compared. Where a machine is faster
in one minute than in the next, medians over all calls can contradict it. None: the file was measured alone, or a call
took another number of frames."""


def is_timed_here(row: Row) -> bool:
    """Whether the latency of a row may be compared: that of a file computed as written says nothing of its hardware."""
    return row["latency"] is not None and not row["settings"].get("as_written", False)


FULL = "fp32"
"""The precision that loses nothing."""
CLEAR = 0.95
"""A file that takes more than this share of another one's time is not clearly faster."""


def preference(row: Row) -> tuple[Any, ...]:
    """Sorts files of one measurement: first the one that a user of the measured machine should take.

    The fastest comes first; last come files that another library or device is made for. FP32 gives way only to files
    that are clearly faster, as it loses nothing.
    """
    ratio = counted_ratio(row)
    return not is_timed_here(row), ratio is None, ratio or 0.0, row["precision"] != FULL, -(ap(row) or 0.0)


def counted_ratio(row: Row) -> float | None:
    """The time over that of the measurement's reference, as it counts when files are ordered.

    FP32 counts for `CLEAR` of it. Another file counts for `CLEAR` of the upper end of its interval, if this is more
    than its ratio: so it comes before an FP32 reference only where `is_clearly_faster` says so. An upper end that is
    not known may be 1.
    """
    found = (row["latency"] or {}).get("ratio")
    if not found:
        return None
    high = 1.0 if found["high"] is None else found["high"]
    return CLEAR * found["ratio"] if row["precision"] == FULL else max(found["ratio"], CLEAR * high)


def has_rounds(row: Row) -> bool:
    """Whether the file took turns with others, often enough for an interval."""
    return row["latency"] is not None and len(row["latency"]["rounds"]) >= LEAST_ROUNDS


def time_over(row: Row, other: Row) -> LatencyRatio | None:
    """Time of one file over that of another, by their rounds.

    None where they had no ten rounds in turns, or where a call took another number of frames.
    """
    if not (has_rounds(row) and has_rounds(other)) or row["settings"]["batch"] != other["settings"]["batch"]:
        return None
    own, base = (one["latency"]["rounds"] for one in (row, other))
    return LatencyRatio.of(base, own) if len(own) == len(base) else None


def is_clearly_faster(found: LatencyRatio) -> bool:
    """Whether the ratio is below `CLEAR`, and the whole interval below 1."""
    return found.ratio < CLEAR and found.high < 1


def is_kept(row: Row) -> bool:
    return row["gate"] is None or row["gate"]["kept"]


def identities(rows: Sequence[Row]) -> list[str | None]:
    """The models that the rows are of, each once; None for rows of reports that were made before models had one."""
    return list(dict.fromkeys(row.get("identity") for row in rows))


def named_apart(rows: Sequence[Row], paths: Sequence[Path]) -> list[Row]:
    """The rows with as many folders before the name of their file as tell it from the others.

    `paths` are what was measured: files, or bundles that hold the file.
    """
    whole = [path / row["file"] if path.is_dir() else path for row, path in zip(rows, paths, strict=True)]
    return [row | {"file": _short_path(path, whole)} for row, path in zip(rows, whole, strict=True)]


def _short_path(path: Path, paths: Sequence[Path]) -> str:
    others = [other.parts for other in paths if other != path]
    counts = range(1, len(path.parts) + 1)
    unique = (n for n in counts if all(other[-n:] != path.parts[-n:] for other in others))
    return "/".join(path.parts[-next(unique, 1) :])


def ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def shared_settings(rows: Sequence[Row]) -> Row:
    """The settings that all rows have in common."""
    first = rows[0]["settings"] if rows else {}
    return {key: value for key, value in first.items() if all(row["settings"][key] == value for row in rows)}


# ------------------------------------------------------------------------------------------------------------ columns


class Column(NamedTuple):
    """One figure of a file. The CSV has all columns; HTML, Markdown and comparisons have those with a title."""

    name: str
    """Heading in the CSV, and the name of the figure in `--fail-on`."""
    read: Read
    title: str = ""
    text: Callable[[Any], str] = number
    section: str = ""
    """Key of the section of the row that holds the figure; a section that is None was not measured."""
    is_number: bool = True
    """False is text: aligned left, and no figure for `--fail-on`."""
    on_page: bool = True
    """Whether the HTML gives it a column of its own, if it has a title."""
    detail: Read | None = None
    """Small print below the cell in the HTML."""

    def cell(self, row: Row) -> str:
        return NOTHING if self.section and row[self.section] is None else self.text(self.read(row))


def _text_column(key: str, title: str = "", **more: Any) -> Column:
    return Column(key, nested_reader(key), title, is_number=False, **more)


def _setting(key: str) -> Column:
    return Column(key, nested_reader("settings", key))


def _accuracy(key: str, title: str = "") -> Column:
    return Column(key, nested_reader("accuracy", key), title, accuracy, "accuracy")


def _percentile(key: str, title: str = "", **more: Any) -> Column:
    return Column(f"{key}_ms", nested_reader("latency", "end_to_end", key), title, percentile, "latency", **more)


def _milliseconds(key: str, title: str = "", *, span: str = "end_to_end", name: str = "") -> Column:
    return Column(f"{name or key}_ms", nested_reader("latency", span, key), title, milliseconds, "latency")


def _about(row: Row) -> str:
    where = f"{row['backend']} on {row['device']}"
    return " · ".join(filter(None, (row["role"], row["precision"], where, row.get("note"))))


def gate(kept: bool | None) -> str:
    return NOTHING if kept is None else "kept" if kept else "refused"


def _gate(key: str, title: str = "", name: str = "", **more: Any) -> Column:
    return Column(name or key, nested_reader("gate", key), title, **more)


def spread(row: Row) -> str:
    """The errors of a loss, where several draws were measured."""
    found = row["gate"] or {}
    if not found.get("standard_error"):
        return ""
    return f"± {accuracy(found['standard_error'])} over {found['draws']} draws"


def ratio_text(row: Row) -> str:
    """0.918 [0.866, 0.999] of model.onnx; empty for that file and where there is no ratio."""
    found = (row["latency"] or {}).get("ratio")
    if not found or found["of"] == row["file"]:
        return ""
    interval = "" if found["low"] is None else f" [{fraction(found['low'])}, {fraction(found['high'])}]"
    return f"{fraction(found['ratio'])}{interval} of {found['of']}"


def time_text(row: Row) -> str:
    """p50 3.42 ms, time ratio 0.918 [0.866, 0.999] of model.onnx."""
    return ", time ratio ".join(filter(None, (f"p50 {milliseconds(p50(row))} ms", ratio_text(row))))


SPANS = ("preprocess", "inference", "postprocess")
COLUMNS: tuple[Column, ...] = (
    _text_column("file", "File", detail=_about),
    _text_column("role"),
    _text_column("precision", "Precision", on_page=False),
    _text_column("backend", "Backend", on_page=False),
    _text_column("device"),
    Column("identity", nested_reader("identity"), "Model", digest_start, is_number=False, on_page=False),
    _text_column("sha256"),
    Column("bytes", nested_reader("bytes"), "Size", size),
    Column("parameters", nested_reader("parameters")),
    Column("gflops", nested_reader("gflops")),
    Column("imgsz", nested_reader("settings", "imgsz"), is_number=False),
    *map(_setting, ("batch", "conf", "iou", "max_det", "accuracy_conf", "accuracy_max_det", "threads")),
    _accuracy("map50_95", "mAP50-95"),
    _accuracy("map50", "mAP50"),
    *map(_accuracy, ("map75", "small", "medium", "large", "recall")),
    Column("images", nested_reader("accuracy", "images"), section="accuracy"),
    Column("instances", nested_reader("accuracy", "instances"), section="accuracy"),
    _percentile("p50", "p50", detail=ratio_text),
    Column(
        "time_ratio", ratio_text, "Time ratio", lambda text: text or NOTHING, "latency", is_number=False, on_page=False
    ),
    *(
        Column(name, nested_reader("latency", "ratio", key), section="latency")
        for name, key in (("latency_ratio", "ratio"), ("latency_ratio_low", "low"), ("latency_ratio_high", "high"))
    ),
    _percentile("p90", "p90"),
    _percentile("p95"),
    _percentile("p99", "p99"),
    _milliseconds("max", "max"),
    Column("n", nested_reader("latency", "end_to_end", "n"), "n", count, "latency"),
    *map(_milliseconds, ("mean", "std", "min")),
    *(_milliseconds("mean", span=span, name=f"{span}_mean") for span in SPANS),
    Column("steady", nested_reader("latency", "steady"), section="latency"),
    _gate("drop", "Lost mAP", text=accuracy, detail=spread),
    _gate("standard_error", name="drop_standard_error"),
    _gate("image_error", name="drop_image_error"),
    _gate("draws"),
    Column(
        "kept", nested_reader("gate", "kept"), "Gate", gate, is_number=False, detail=nested_reader("gate", "reason")
    ),
    Column("reason", nested_reader("gate", "reason"), is_number=False),
)
TITLED = tuple(column for column in COLUMNS if column.title)
"""The columns of the Markdown table and of comparisons."""


def cells(row: Row) -> list[str]:
    """The row's texts, in the order of `TITLED`."""
    return [column.cell(row) for column in TITLED]
