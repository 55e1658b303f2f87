"""The HTML page of a report: plain values for the template. A pure function of the JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import charts, formats, wording
from benchmarks.packages import optional
from benchmarks.report import schema
from benchmarks.rows import SPANS, TITLED, Column, Row, ap, has_rounds, is_kept, p50, shared_settings

TEMPLATES = Path(__file__).parent
FILTERS: Mapping[str, Callable[..., str]] = {
    "ms": formats.milliseconds,
    "percentile": formats.percentile,
    "ap": formats.accuracy,
    "short_ap": formats.fraction,
    "size": formats.size,
    "times": formats.times,
    "percent": formats.percent,
    "count": formats.count,
    "number": formats.number,
    "duration": formats.duration,
    "error": formats.error,
    "moment": formats.moment,
}
PRECISIONS = {"fp32": "fp32", "fp16": "fp16", "bf16": "fp16", "int8": "int8", "fp8": "int8"}
"""Precision (its part before "-") -> CSS class of the colour."""
ON_PAGE = tuple(column for column in TITLED if column.on_page)
CELL_CSS = {formats.TOO_FEW: "r small", "kept": "kept", "refused": "refused"}
"""Text -> CSS class, if it is not its column's."""
NOT_MEASURED = {"accuracy": "not measured", "latency": "not timed"}
NOT_DRAWN = ("epoch", "lr", "seconds", "momentum")
"""Prefixes of those columns of the training curves that say nothing about the result."""
CURVES = {
    "map50_95": "mAP50-95",
    "map50": "mAP50",
    "box": "box loss",
    "obj": "objectness loss",
    "cls": "class loss",
}
"""Columns of the curves -> titles, in the order of the page; any other is a loss of its name."""


def render(data: Mapping[str, Any]) -> str:
    """One self-contained page."""
    return environment().get_template("report.html").render(view(data)).strip() + "\n"


@lru_cache(maxsize=1)
def environment() -> Any:
    """jinja2 with escaping on and the number formats as filters."""
    jinja2 = optional("jinja2")
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(FILTERS)
    return made


def view(data: Mapping[str, Any]) -> dict[str, Any]:
    """All values that the template names."""
    data = with_all_keys(data)
    rows, best = data["models"], headline_row(data)
    return {
        "report": data,
        "machine_name": wording.machine_name(data["machine"]),
        "machine": flat(data["machine"]),
        "settings": flat(shared_settings(rows) | {"argv": data["argv"] or []}),
        "summary": wording.summary(data),
        "span": wording.timed_span(rows),
        "findings": wording.findings(data),
        "best": best,
        "gain": wording.first_gain(data["gain"]),
        "inherited": wording.inherited((data["distillation"] or {}).get("inheritance")),
        "best_latency": best["latency"]["end_to_end"] if best and best["latency"] else None,
        "compared": any(row["role"] == "teacher" for row in (*rows, *data["torch"])),
        "has_turns": any(map(has_rounds, rows)),
        "columns": ON_PAGE,
        "rows": [dict(row, kind=kind_of(row), kept=is_kept(row), cells=list(cells_of(row))) for row in rows],
        "pareto": charts.pareto(pareto_points(rows), wording.short_span(rows)),
        "span_bars": span_bars(rows),
        "classes": class_bars(data, best),
        "curves": [training_view(training) for training in data["training"]],
        "quantisation": [dict(entry, svg=charts.layers(layer_bars(entry))) for entry in data["quantisation"]],
        "pipeline": pipeline_bars(data["stages"]),
    }


class Cell(NamedTuple):
    """A cell of the table of files. `css` is its class, `span` the number of columns that it takes."""

    text: str
    css: str
    detail: str = ""
    span: int = 1


def cells_of(row: Row) -> Iterator[Cell]:
    """The row's cells; the columns of a part that was not measured are one cell."""
    for section, group in groupby(ON_PAGE, key=lambda column: column.section):
        columns = list(group)
        if section and row[section] is None:
            yield Cell(NOT_MEASURED[section], "r small", span=len(columns))
        else:
            yield from (_cell(row, column) for column in columns)


def _cell(row: Row, column: Column) -> Cell:
    text = column.cell(row)
    css = CELL_CSS.get(text, "r" if column.is_number else "")
    return Cell(text, css, (column.detail and column.detail(row)) or "")


def with_all_keys(data: Mapping[str, Any]) -> dict[str, Any]:
    """The report with None for every key that the schema leaves to choice, so that the template may name them all."""
    parts = schema()["properties"]
    lists = {key: part["items"]["$ref"] for key, part in parts.items() if "$ref" in part.get("items", {})}
    single = {key: part["anyOf"][0]["$ref"] for key, part in parts.items() if "anyOf" in part and data.get(key)}
    return {
        **dict.fromkeys(parts),
        **data,
        **{key: [_complete(row, kind) for row in data.get(key, ())] for key, kind in lists.items()},
        **{key: _complete(data[key], kind) for key, kind in single.items()},
        "notes": data.get("notes", []),
    }


def _complete(row: Row, reference: str) -> Row:
    return dict.fromkeys(schema()["$defs"][reference.rpartition("/")[2]]["properties"]) | row


def headline_row(data: Mapping[str, Any]) -> Row | None:
    """The row of the file that the headline is about."""
    headline = data["headline"]
    return next((row for row in data["models"] if headline and row["file"] == headline["file"]), None)


def kind_of(row: Row) -> str:
    """CSS class of a row's precision."""
    return PRECISIONS.get(row["precision"].partition("-")[0], "other")


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (name, text) pairs; empty ones are left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs += flat(value, f"{name} · ")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, Mapping) for item in value):
            for item in value:
                pairs += flat(item, f"{name} · ")
        elif isinstance(value, (list, tuple)):
            pairs += [(name, " ".join(map(str, value)))] if value else []
        elif value not in (None, ""):
            pairs.append((name, formats.size(value) if key.endswith("bytes") else formats.number(value)))
    return pairs


def pareto_points(rows: Sequence[Row]) -> list[charts.Point]:
    """The rows that have both figures; the whisker ends at the highest percentile that n allows."""
    measured = [row for row in rows if p50(row) is not None and ap(row) is not None]
    return [
        charts.Point(
            label=wording.label(row, measured),
            x=row["latency"]["end_to_end"]["p50"],
            x_high=_tail(row["latency"]["end_to_end"]),
            y=row["accuracy"]["map50_95"],
            kind=kind_of(row),
            teacher=row["role"] == "teacher",
            kept=is_kept(row),
        )
        for row in measured
    ]


def _tail(latency: Row) -> float:
    return next(latency[p] for p in ("p99", "p95", "p90", "p50") if latency[p] is not None)


def span_bars(rows: Sequence[Row]) -> list[Row]:
    """Means of the three spans (means add up, percentiles do not), all bars on one scale."""
    timed = [row for row in rows if row["latency"]]
    longest = max((row["latency"]["end_to_end"]["mean"] for row in timed), default=1.0)
    return [
        {
            "label": wording.label(row, rows),
            "latency": row["latency"],
            "spans": [(span, 100 * row["latency"][span]["mean"] / longest) for span in SPANS],
        }
        for row in timed
    ]


def class_bars(data: Mapping[str, Any], best: Row | None) -> list[Row]:
    """AP of every class, best first, with the teacher's beside it if it is known."""
    if best is None or not best["accuracy"]:
        return []
    teachers = [row for row in (*data["models"], *data["torch"]) if row["role"] == "teacher" and row["accuracy"]]
    teacher = teachers[0]["accuracy"]["per_class"] if teachers else {}
    classes = sorted(best["accuracy"]["per_class"].items(), key=lambda item: (-item[1], item[0]))
    return [{"name": name, "ap": value, "teacher": teacher.get(name)} for name, value in classes]


def training_view(training: Row) -> Row:
    """One small chart for each column of the curves, mAP first."""
    known = sorted({key for epoch in training["curves"] for key in epoch if not key.startswith(NOT_DRAWN)})
    columns = [*(column for column in CURVES if column in known), *(column for column in known if column not in CURVES)]
    drawn = [(column, _points(training["curves"], column)) for column in columns]
    return dict(training, charts=[_chart(name, points, training["best_epoch"]) for name, points in drawn if points])


def _points(curves: Sequence[Row], column: str) -> list[tuple[float, float]]:
    return [(epoch["epoch"], epoch[column]) for epoch in curves if epoch.get(column) is not None]


def _chart(name: str, points: Sequence[tuple[float, float]], best_epoch: int | None) -> Row:
    is_map = name.startswith("map")
    values = [value for _, value in points]
    title = CURVES.get(name, f"{name} loss")
    svg = charts.curve(points, "good" if is_map else "inference", title, best_epoch if is_map else None)
    return {"name": title, "svg": svg, "first": values[0], "last": values[-1], "best": max(values) if is_map else None}


def layer_bars(entry: Row) -> list[charts.Bar]:
    """The layers of an INT8 flavour, worst first, as shares of the whole squared error."""
    total = sum(layer["error"] ** 2 for layer in entry["layers"]) or 1.0
    return [charts.Bar(layer["name"], layer["error"] ** 2 / total, not layer["is_float"]) for layer in entry["layers"]]


def pipeline_bars(stages: Sequence[Row]) -> list[Row]:
    longest = max((stage["seconds"] for stage in stages), default=0.0) or 1.0
    return [dict(stage, share=100 * stage["seconds"] / longest) for stage in stages]
