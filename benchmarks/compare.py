"""Several reports beside each other, and thresholds that turn a report into an exit code.

Rows are shown side by side and never merged; differences that make them incomparable are listed above the table.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import charts, page, wording
from benchmarks.render import markdown_table
from benchmarks.report import Report
from benchmarks.rows import COLUMNS, TITLED, Row, cells, is_kept
from runtime.backends import BACKENDS
from runtime.errors import UsageError

COMPARED_SETTINGS = (
    *("imgsz", "batch", "conf", "iou", "max_det", "accuracy_conf", "accuracy_max_det"),
    *("interval_ms", "threads"),
)


class Comparison(NamedTuple):
    """`rows` are (report's name, model row); `warnings` are reasons not to compare them."""

    rows: tuple[tuple[str, Row], ...]
    warnings: tuple[str, ...]


def compare(reports: Sequence[Report]) -> Comparison:
    """Raises UsageError when there is no report."""
    if not reports:
        raise UsageError("There is no report to compare", "Give report.json files or their folders")
    names = distinct([report.data["name"] for report in reports])
    rows = tuple((name, row) for name, report in zip(names, reports, strict=True) for row in report.data["models"])
    return Comparison(rows, tuple(warnings(names, [report.data for report in reports])))


def distinct(names: Sequence[str]) -> list[str]:
    """Equal names get a number."""
    return [
        f"{name} ({names[: index + 1].count(name)})" if names.count(name) > 1 else name
        for index, name in enumerate(names)
    ]


def warnings(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """One sentence for each fact that must be equal and is not, with every value."""
    facts = [comparable(report) for report in reports]
    found = [_difference(what, names, [fact[what] for fact in facts]) for what in facts[0]]
    return [sentence for sentence in (*found, *_as_written(names, reports)) if sentence]


def _as_written(names: Sequence[str], reports: Sequence[Mapping[str, Any]]) -> list[str]:
    """Sentences on the precisions of which one report was computed in float and another by integer kernels."""
    ways: dict[str, dict[str, list[Any]]] = {}
    for name, data in zip(names, reports, strict=True):
        for row in data["models"]:
            way = row["settings"].get("as_written")
            if way is not None and way not in ways.setdefault(row["precision"], {}).setdefault(name, []):
                ways[row["precision"]][name].append(way)
    return [_difference(f"as_written of {key}", list(own), list(own.values())) for key, own in ways.items()]


def comparable(data: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The facts that must be equal before figures may be compared, each with every value that the report has for it.

    The versions of the libraries that ran its files are among them: TensorRT 10 and 11, for example, choose different
    kernels.
    """
    packages, used = data["machine"].get("packages", {}), {row["backend"] for row in data["models"]}
    return {
        **{key: list(dict.fromkeys(row["settings"][key] for row in data["models"])) for key in COMPARED_SETTINGS},
        **{spec.library: [packages.get(spec.library)] if name in used else [] for name, spec in BACKENDS.items()},
        "machine": [wording.machine_name(data["machine"])],
        "data": [(data["dataset"] or {}).get("sha256")],
    }


def _difference(what: str, names: Sequence[str], values: Sequence[list[Any]]) -> str:
    if len({value for own in values for value in own}) <= 1:
        return ""
    each = (f"{' and '.join(map(_short, own))} in {name}" for name, own in zip(names, values, strict=True) if own)
    return f"{what} differs, so the figures are not directly comparable: {', '.join(each)}"


def _short(value: Any) -> str:
    return "none" if value is None else f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else str(value)


def to_markdown(found: Comparison) -> str:
    lines = [f"> **Warning:** {sentence}" for sentence in found.warnings]
    lines += [""] if lines else []
    lines += markdown_table(
        ["Report", *(column.title for column in TITLED)], [[name, *cells(row)] for name, row in found.rows]
    )
    return "\n".join(lines) + "\n"


def to_html(found: Comparison) -> str:
    """One self-contained page: the chart of all rows, and the table by report. Reports are A, B, C ... in labels."""
    names = list(dict.fromkeys(name for name, _ in found.rows))
    groups: list[dict[str, Any]] = [
        {"letter": letter, "name": name, "rows": [row for owner, row in found.rows if owner == name]}
        for letter, name in zip(map(letters, range(len(names))), names, strict=True)
    ]
    points = [
        point._replace(label=f"{group['letter']} {point.label}")
        for group in groups
        for point in page.pareto_points(group["rows"])
    ]
    tables = [group | {"cells": list(map(cells, group["rows"]))} for group in groups]
    template = page.environment().get_template("compare.html")
    chart = charts.pareto(points, wording.short_span([row for _, row in found.rows]))
    return template.render(columns=TITLED, groups=tables, warnings=found.warnings, pareto=chart)


def letters(index: int) -> str:
    """A to Z, then A1, B1 ..."""
    return chr(ord("A") + index % 26) + (str(index // 26) if index >= 26 else "")


# --------------------------------------------------------------------------------------------------------- thresholds

OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
METRICS = {column.name: column.read for column in COLUMNS if column.is_number}
RATIOS = ("speedup", "size_ratio", "parameter_ratio", "retained")
"""Figures of the report's headline."""
RULE = re.compile(r"\s*(?:(?P<precision>[\w-]+)\.)?(?P<metric>\w+)\s*(?P<sign><=|>=|<|>)\s*(?P<limit>[-+.\deE]+)\s*")


class Rule(NamedTuple):
    """A condition that must not hold, for the student's files of one precision, or of all that were kept."""

    metric: str
    sign: str
    limit: float
    precision: str | None
    text: str


def parse_rule(text: str) -> Rule:
    """From "map50_95<0.30" or "int8-ort.p50_ms>20". Raises UsageError that lists the known figures."""
    found = RULE.fullmatch(text)
    known = (*METRICS, *RATIOS)
    if not found or not _is_number(found["limit"]):
        raise UsageError(f"{text!r} is not a rule", "Write, for example, map50_95<0.30 or int8-ort.p50_ms>20")
    if found["metric"] not in known:
        raise UsageError(f"{text!r} names no known figure", f"Known are {', '.join(known)}")
    if found["precision"] and found["metric"] in RATIOS:
        raise UsageError(
            f"{text!r}: {found['metric']} is that of the report's best file", f"Leave {found['precision']} out"
        )
    return Rule(found["metric"], found["sign"], float(found["limit"]), found["precision"], text.strip())


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def violations(rules: Sequence[Rule], reports: Sequence[Report]) -> list[str]:
    """One sentence for each student file (kept by its gate) for which a rule holds; empty when all is well.

    A figure that was not measured is a violation too: a threshold that was not checked must not pass.
    """
    names = distinct([report.data["name"] for report in reports])
    starts = [f"{name}: " if len(reports) > 1 else "" for name in names]
    return [
        f"{start}{rule.text}: {found}"
        for rule in rules
        for start, report in zip(starts, reports, strict=True)
        for found in _violations(rule, report.data)
    ]


def _violations(rule: Rule, data: Mapping[str, Any]) -> list[str]:
    values = _values(rule, data)
    if not values:
        return ["the report has no best file" if rule.metric in RATIOS else f"no {rule.precision or 'student'} file"]
    holds = OPERATORS[rule.sign]
    return [
        f"{file} has {rule.metric} {'not measured' if value is None else f'{value:.5g}'}"
        for file, value in values
        if value is None or holds(value, rule.limit)
    ]


def _values(rule: Rule, data: Mapping[str, Any]) -> list[tuple[str, float | None]]:
    if rule.metric in RATIOS:
        headline = data["headline"]
        return [(headline["file"], headline[rule.metric])] if headline else []
    rows = [row for row in data["models"] if row["role"] == "student" and is_kept(row)]
    return [(row["file"], METRICS[rule.metric](row)) for row in rows if rule.precision in (None, row["precision"])]
