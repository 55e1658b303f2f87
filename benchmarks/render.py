"""HTML, Markdown and CSV of a report: pure functions of its JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import page, wording
from benchmarks.packages import optional
from benchmarks.report import REPORT_FILE, Report
from benchmarks.rows import COLUMNS, TITLED, cells
from runtime.files import write_text


def to_html(report: Report) -> str:
    """One self-contained page; the same report gives the same bytes."""
    return page.render(report.data)


def to_markdown(report: Report) -> str:
    """A table to paste, below the facts to know before comparing it."""
    data = report.data
    lines = [f"# {data['name']}", "", *(f"- {item}" for item in wording.summary(data)), ""]
    lines += markdown_table([column.title for column in TITLED], [cells(row) for row in data["models"]])
    lines += ["", *(f"- {sentence}" for sentence in wording.findings(data))]
    return "\n".join(lines).rstrip() + "\n"


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    body = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in body]


def to_csv(report: Report) -> str:
    """One line for each measured file; a figure that was not measured is an empty cell. Times are milliseconds."""
    data, text = report.data, io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", "created", *(column.name for column in COLUMNS)])
    for row in data["models"]:
        writer.writerow([data["name"], data["created"], *(column.read(row) for column in COLUMNS)])
    return text.getvalue()


PACKAGES = ("jinja2", "jsonschema", "matplotlib")


def require_packages() -> None:
    """Raises UnavailableError when `write` would, so that a caller knows before it measures for minutes."""
    for package in PACKAGES:
        optional(package)


RENDERERS: Mapping[str, Callable[[Report], str]] = {"html": to_html, "md": to_markdown, "csv": to_csv}


def write(report: Report, folder: Path) -> tuple[Path, ...]:
    """Write `report.json`, `.html`, `.md` and `.csv` into `folder` and return their paths."""
    first = folder / REPORT_FILE
    report.save(first)
    paths = [first.with_suffix(f".{suffix}") for suffix in RENDERERS]
    for path, render in zip(paths, RENDERERS.values(), strict=True):
        write_text(path, render(report))
    return first, *paths
