from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import pytest

from benchmarks import compare, page, render, rows
from benchmarks.latency import Durations, Warmup
from benchmarks.render import to_csv, to_html, to_markdown
from benchmarks.report import Report
from benchmarks.rows import COLUMNS, TITLED, Column, model_row, named_apart, nested_reader, plain
from tests.benchmarks.conftest import SETTINGS, minimal

MEASURED = {"precision": "fp32", "backend": "onnx", "device": "cpu", "settings": SETTINGS}


def test_one_entry_of_the_table_is_a_column_of_every_rendering(sample: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    column = Column("watts", nested_reader("watts"), "Power", lambda value: f"{value} W")
    added = {"COLUMNS": (*COLUMNS, column), "TITLED": (*TITLED, column), "ON_PAGE": (*page.ON_PAGE, column)}
    for module in (rows, page, render, compare):
        for name, columns in added.items():
            if hasattr(module, name):
                monkeypatch.setattr(module, name, columns)
    report = Report({**sample.data, "models": [row | {"watts": 7.5} for row in sample.data["models"]]})
    both = compare.compare([report, report])
    for text in (to_html(report), to_markdown(report), compare.to_html(both), compare.to_markdown(both)):
        assert "Power" in text
        assert "7.5 W" in text
    assert [row["watts"] for row in csv.DictReader(io.StringIO(to_csv(report)))] == ["7.5"] * 5


def test_every_rendering_shows_the_titles_of_the_table(sample: Report) -> None:
    titles = [column.title for column in COLUMNS if column.title]
    assert {"File", "Size", "mAP50-95", "p50", "Gate"} < set(titles)
    assert "| " + " | ".join(titles) + " |" in to_markdown(sample)
    shown_titles = re.findall(
        r"<th(?: [^>]*)?>(.*?)</th>", to_html(sample).partition("Every file")[2].partition("</thead>")[0]
    )
    assert shown_titles == [title for title in titles if title not in ("Precision", "Backend", "Model", "Time ratio")]
    names = to_csv(sample).partition("\n")[0].split(",")
    assert names == ["name", "created", *(column.name for column in COLUMNS)]
    assert len(set(names)) == len(names)


def test_a_row_carries_digest_and_size_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"abc")
    row = model_row(tmp_path / "m.onnx", **MEASURED, kept=False, reason="why", gflops=1.5)
    assert row["sha256"].startswith("ba7816bf")
    assert (row["bytes"], row["gate"], row["gflops"]) == (3, {"kept": False, "reason": "why"}, 1.5)
    assert minimal([row]).data["headline"] is None


def test_a_file_without_an_identity_is_a_model_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"abc")
    row = model_row(tmp_path / "m.onnx", **MEASURED)
    assert row["identity"] == row["sha256"]
    assert model_row(tmp_path / "m.onnx", **MEASURED, identity="f" * 64)["identity"] == "f" * 64


def test_files_of_one_name_are_named_with_the_folder_that_tells_them_apart(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    paths = [Path("runs/a/model.onnx"), Path("runs/b/model.onnx"), Path("c.onnx"), bundle]
    measured = [{"file": "model.onnx"}, {"file": "model.onnx"}, {"file": "c.onnx"}, {"file": "model.onnx"}]
    named = [row["file"] for row in named_apart(measured, paths)]
    assert named == ["a/model.onnx", "b/model.onnx", "c.onnx", "bundle/model.onnx"]
    assert [row["file"] for row in named_apart(measured[:1] * 2, paths[:1] * 2)] == ["model.onnx"] * 2


def test_plain_values_are_plain_all_the_way_down() -> None:

    value = plain({"a": (Warmup(1, 2.0, True), Path("x")), "b": Durations.of([1.0])})
    assert value["a"] == [{"calls": 1, "ms": 2.0, "settled": True}, "x"]
    assert value["b"]["samples"] == [1.0]
    json.dumps(value)
