from __future__ import annotations

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.page import FILTERS, flat
from benchmarks.render import to_csv, to_html, to_markdown, write
from benchmarks.report import REPORT_FILE, Report
from tests.benchmarks.conftest import minimal, with_models

NUMBER = re.compile(r"\d+(?:[.\u202f]\d+)*(?:e-?\d+)?")
WORDS = ("mAP50-95", "p90", "p99", "at 99 % confidence", "sha256")
"""Digits that are names, not figures."""


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        yield from (found for item in value.values() for found in numbers_in(item))
    elif isinstance(value, list):
        yield from (found for item in value for found in numbers_in(item))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def shown(page: str) -> str:
    """The text that a reader sees: no styles, no markup, no ticks of the axes."""
    page = re.sub(r"<svg.*?</svg>", lambda found: text_of(ElementTree.fromstring(found[0])), page, flags=re.DOTALL)
    return re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)


def text_of(element: ElementTree.Element) -> str:
    """All text of a chart but that of its axes."""
    if element.get("class") == "axis":
        return ""
    return " ".join([element.text or "", *map(text_of, element), element.tail or ""])


def test_the_same_report_renders_to_the_same_bytes(sample: Report, tmp_path: Path) -> None:
    sample.save(tmp_path / REPORT_FILE)
    assert to_html(sample) == to_html(Report.load(tmp_path))
    assert to_csv(sample) == to_csv(Report.load(tmp_path))


def test_every_number_on_the_page_stands_in_the_report(sample: Report) -> None:
    formats = [f for name, f in FILTERS.items() if name != "moment"]
    texts = [json.dumps(sample.data, ensure_ascii=False)]
    texts += [format_(value) for value in numbers_in(sample.data) for format_ in formats]
    known = set(NUMBER.findall(" ".join([*texts, *WORDS])))
    page = to_html(sample)
    assert set(NUMBER.findall(shown(page))) - known == set()
    assert set(NUMBER.findall(shown(page.replace("<footer>", "<footer>41.87 ")))) - known == {"41.87"}


def test_the_student_stands_beside_its_teacher(sample: Report) -> None:
    assert "it reached 88.8 % of its teacher: mAP50-95 0.550 against 0.620 on val" in " ".join(
        shown(to_html(sample)).split()
    )


def test_the_gradient_that_shares_are_parts_of_is_named(sample: Report) -> None:
    assert "at the neck as a share of the gradient of soft." in to_html(sample)


def test_the_page_loads_nothing_from_elsewhere(sample: Report) -> None:
    page = to_html(sample)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script|https?:", page)


def test_text_from_the_run_is_escaped(sample: Report) -> None:
    page = to_html(Report({**sample.data, "name": "<script>alert(1)</script>", "notes": ["a < b & c"]}))
    assert "<script>" not in page
    assert "a &lt; b &amp; c" in page
    row = sample.data["models"][0] | {"precision": "<i>"}
    assert "<i>" not in to_html(Report({**sample.data, "models": [row]}))


def test_a_report_with_nothing_optional_renders() -> None:
    page = to_html(minimal())
    assert "small" in page
    assert "Accuracy against latency" not in page
    assert to_markdown(minimal()).startswith("# small\n")


def test_a_row_without_figures_says_so(sample: Report) -> None:
    page = to_html(with_models(sample, fp16={"latency": None, "accuracy": None}))
    assert "not timed" in page
    assert "not measured" in page


def test_a_percentile_without_enough_samples_is_not_printed(sample: Report) -> None:
    table = to_markdown(sample).splitlines()
    fp32 = next(line for line in table if line.startswith("| model.onnx "))
    fp16 = next(line for line in table if line.startswith("| model.fp16.onnx "))
    assert "n too small" in fp32
    assert "n too small" not in fp16


def test_csv_has_one_row_a_file_with_the_settings_beside_the_figures(sample: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(sample))))
    assert [row["file"] for row in rows] == [row["file"] for row in sample.data["models"]]
    assert {(row["conf"], row["iou"], row["max_det"], row["imgsz"]) for row in rows} == {("0.25", "0.6", "300", "320")}
    assert float(rows[1]["p50_ms"]) == sample.data["models"][1]["latency"]["end_to_end"]["p50"]
    assert rows[1]["p99_ms"] == ""
    assert rows[4]["kept"] == "False"


def test_a_loss_stands_with_its_errors_and_draws(sample: Report) -> None:
    row = next(row for row in csv.DictReader(io.StringIO(to_csv(sample))) if row["precision"] == "int8-ort")
    figures = {key: float(row[key]) for key in ("drop", "drop_standard_error", "drop_image_error", "draws")}
    assert figures == {"drop": 0.0054, "drop_standard_error": 0.0007, "drop_image_error": 0.0031, "draws": 4}
    assert "± 0.00070 over 4 draws" in to_html(sample)


def test_the_layers_of_an_int8_file_are_drawn_with_what_each_step_costs(sample: Report) -> None:
    page = to_html(sample)
    assert "int8-ort, layer by layer" in page
    assert "4.m.3" in page
    assert "0.61" in page
    assert "layer by layer" not in to_html(Report({**sample.data, "quantisation": []}))


def test_all_four_files_are_written(sample: Report, tmp_path: Path) -> None:
    paths = write(sample, tmp_path / "bench")
    assert [path.name for path in paths] == ["report.json", "report.html", "report.md", "report.csv"]
    assert paths[1].read_text(encoding="utf-8") == to_html(sample)


def test_nested_facts_become_pairs() -> None:
    facts = {"a": 1, "b": {"c": "x"}, "gpus": [{"name": "T4"}], "none": None, "list": [], "ram_bytes": 2**30}
    pairs = [("a", "1"), ("b · c", "x"), ("gpus · name", "T4"), ("ram_bytes", "1.00 GiB")]
    assert flat(facts) == pairs


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"name": "offline", "label_weight": 1, "unlabelled_images": 0}, "Strategy offline."),
        ({"name": "label_free", "label_weight": 0, "unlabelled_images": 205},
         "Strategy label_free, labels of weight 0, 205 images without labels."),
    ],
)  # fmt: skip
def test_the_page_says_who_learned_from_what(sample: Report, strategy: dict[str, object], expected: str) -> None:
    assert expected in to_html(Report({**sample.data, "distillation": {"losses": [], "strategy": strategy}}))


def test_the_page_tells_that_a_latency_is_that_of_a_call_of_several_frames(sample: Report) -> None:
    assert "per call of" not in to_html(sample)
    models = [row | {"settings": row["settings"] | {"batch": 4}} for row in sample.data["models"]]
    page = to_html(Report({**sample.data, "models": models}))
    assert "per call of 4 frames" in page
    assert "Milliseconds from the decoded frames of a call" in page


def test_the_layers_of_an_engine_are_a_table_that_opens(sample: Report) -> None:
    page = to_html(sample)
    (table,) = re.findall(r"<details><summary>(.*?)</table>", page, flags=re.DOTALL)
    assert table.startswith("The layers of model.fp16.plan move 1000.00 KiB of activations a call; convolutions: ")
    assert "Half [1,8,160,160]" in table
    assert "1.conv, 1.act" in table
