from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks import wording
from benchmarks.page import FILTERS, flat
from benchmarks.report import (
    REPORT_FILE,
    Report,
    headline,
    make_report,
    model_row,
    plain,
    render_csv,
    render_html,
    render_markdown,
    schema,
)
from runtime.errors import InputError
from tests.benchmarks.conftest import SETTINGS, make_row

MEASURED = {"precision": "fp32", "backend": "onnx", "device": "cpu", "settings": SETTINGS}
NUMBER = re.compile(r"\d+(?:[.\u202f]\d+)*(?:e-?\d+)?")


def with_models(sample: Report, **changes: dict[str, Any]) -> Report:
    """The sample with some keys of some files changed."""
    models = [row | changes.get(row["precision"].replace("-", "_"), {}) for row in sample.data["models"]]
    return Report({**sample.data, "models": models})


def minimal(models: list[dict[str, Any]] | None = None) -> Report:
    return make_report("small", machine={}, models=models or [], created=datetime(2026, 1, 1))


def numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        yield from (found for item in value.values() for found in numbers_in(item))
    elif isinstance(value, list):
        yield from (found for item in value for found in numbers_in(item))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value


def shown(html: str) -> str:
    """What a reader sees: no styles, no markup, no ticks of the axes."""
    for hidden in (r"<style>.*?</style>", r'<g class="axis".*?</g>', r"<[^>]*>"):
        html = re.sub(hidden, " ", html, flags=re.DOTALL)
    return html


# ---------------------------------------------------------------------------------------------------------- rendering


def test_the_same_report_renders_to_the_same_bytes(sample: Report, tmp_path: Path) -> None:
    sample.save(tmp_path / REPORT_FILE)
    assert render_html(sample) == render_html(Report.load(tmp_path))
    assert render_csv(sample) == render_csv(Report.load(tmp_path))


def test_every_number_on_the_page_stands_in_the_report(sample: Report) -> None:
    formats = [f for name, f in FILTERS.items() if name not in ("gate", "moment")]
    texts = [json.dumps(sample.data, ensure_ascii=False)]
    texts += [format_(value) for value in numbers_in(sample.data) for format_ in formats]
    known = set(NUMBER.findall(" ".join([*texts, *WORDS])))
    html = render_html(sample)
    assert set(NUMBER.findall(shown(html))) - known == set()
    assert set(NUMBER.findall(shown(html.replace("<footer>", "<footer>41.87 ")))) - known == {"41.87"}


WORDS = ("mAP50-95", "p90", "p99", "at 99 % confidence", "sha256")
"""Digits that are names, not figures."""


def test_the_page_loads_nothing_from_elsewhere(sample: Report) -> None:
    html = render_html(sample)
    assert not re.search(r"(?:src|href)\s*=|url\(|@import|<script|https?:", html)


def test_text_from_the_run_is_escaped(sample: Report) -> None:
    html = render_html(Report({**sample.data, "name": "<script>alert(1)</script>", "notes": ["a < b & c"]}))
    assert "<script>" not in html
    assert "a &lt; b &amp; c" in html
    row = sample.data["models"][0] | {"precision": "<i>"}
    assert "<i>" not in render_html(Report({**sample.data, "models": [row]}))


def test_a_report_with_nothing_optional_renders() -> None:
    html = render_html(minimal())
    assert "small" in html
    assert "Accuracy against latency" not in html
    assert render_markdown(minimal()).startswith("# small\n")


def test_a_row_without_figures_says_so(sample: Report) -> None:
    html = render_html(with_models(sample, fp16={"latency": None, "accuracy": None}))
    assert "not timed" in html
    assert "not measured" in html


def test_a_percentile_without_enough_samples_is_not_printed(sample: Report) -> None:
    table = render_markdown(sample).splitlines()
    fp32 = next(line for line in table if line.startswith("| model.onnx "))
    fp16 = next(line for line in table if line.startswith("| model.fp16.onnx "))
    assert "n too small" in fp32
    assert "n too small" not in fp16


def test_csv_has_one_row_a_file_with_the_settings_beside_the_figures(sample: Report) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(sample))))
    assert [row["file"] for row in rows] == [row["file"] for row in sample.data["models"]]
    assert {(row["conf"], row["iou"], row["max_det"], row["imgsz"]) for row in rows} == {("0.25", "0.6", "300", "320")}
    assert float(rows[1]["p50_ms"]) == sample.data["models"][1]["latency"]["end_to_end"]["p50"]
    assert rows[1]["p99_ms"] == ""
    assert rows[4]["kept"] == "False"


def test_all_four_files_are_written(sample: Report, tmp_path: Path) -> None:
    paths = sample.write(tmp_path / "bench")
    assert [path.name for path in paths] == ["report.json", "report.html", "report.md", "report.csv"]
    assert paths[1].read_text(encoding="utf-8") == render_html(sample)


# ---------------------------------------------------------------------------------------------------------- sentences


def test_int8_that_is_not_faster_is_said_in_words(sample: Report) -> None:
    assert any(s.startswith("int8-trt is not faster than fp32") for s in wording.findings(sample.data))
    assert any(s.startswith("int8-cpu is faster than fp32") for s in wording.findings(sample.data))


def test_a_hair_is_not_faster(sample: Report) -> None:
    slow = next(row["latency"] for row in sample.data["models"] if row["file"] == "model.onnx")
    near = slow | {"end_to_end": slow["end_to_end"] | {"p50": 0.97 * slow["end_to_end"]["p50"]}}
    sentences = wording.findings(with_models(sample, int8_cpu={"latency": near}).data)
    assert any(s.startswith("int8-cpu is not faster than fp32") for s in sentences)


def test_a_refused_file_stands_there_with_its_reason(sample: Report) -> None:
    reason = "mAP50-95 0.51210 is more than 0.02 below 0.55020 of fp32"
    assert f"model.int8-trt.onnx was refused by its gate: {reason}." in render_html(sample)
    assert "refused" in render_markdown(sample)


def test_engines_that_did_not_run_say_why(sample: Report) -> None:
    assert "model.fp16.plan was built for sm86, sm89, sm120 and not run on this machine: no GPU." in render_html(sample)


def test_an_unsteady_latency_is_said_in_words(sample: Report) -> None:
    latency = sample.data["models"][1]["latency"] | {"steady": False}
    sentences = wording.findings(with_models(sample, fp16={"latency": latency}).data)
    assert "The latency of model.fp16.onnx drifted while it was measured: repeat it on a quiet machine." in sentences


def test_files_measured_with_different_settings_are_told_apart(sample: Report) -> None:
    other = SETTINGS | {"iou": 0.45}
    found = with_models(sample, fp16={"settings": other})
    (sentence,) = (s for s in wording.findings(found.data) if s.startswith("iou differs"))
    assert "0.45 for model.fp16.onnx" in sentence
    assert "0.6 for model.onnx" in sentence
    assert "iou 0.6" not in " ".join(wording.summary(found.data))
    assert "iou 0.6" in " ".join(wording.summary(sample.data))
    ious = [row["iou"] for row in csv.DictReader(io.StringIO(render_csv(found)))]
    assert ious == ["0.6", "0.6", "0.45", "0.6", "0.6"]


def test_few_images_are_said_in_words(sample: Report) -> None:
    figures = sample.data["models"][1]["accuracy"] | {"images": 4}
    assert any("4 images" in s for s in wording.findings(with_models(sample, fp16={"accuracy": figures}).data))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123"), (12345.6, "12346")],
)
def test_milliseconds_have_three_figures(value: float, text: str) -> None:
    assert wording.milliseconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "0.50 KiB"), (7_534_201, "7.19 MiB"), (2**33, "8.00 GiB")])
def test_sizes_take_the_unit_that_fits(value: int, text: str) -> None:
    assert wording.size(value) == text


def test_rows_are_named_as_shortly_as_they_can_be_told_apart() -> None:
    def row(precision: str, backend: str, file: str) -> dict[str, str]:
        return {"role": "student", "precision": precision, "backend": backend, "file": file}

    rows = [row("fp32", "onnx", "a"), row("fp16", "onnx", "b"), row("fp16", "tensorrt", "c"), row("int8", "onnx", "d")]
    rows += [row("int8", "onnx", "e")]
    assert [wording.label(r, rows) for r in rows] == [
        "student fp32",
        "student fp16 onnx",
        "student fp16 tensorrt",
        "d",
        "e",
    ]


def test_nested_facts_become_pairs() -> None:
    facts = {"a": 1, "b": {"c": "x"}, "gpus": [{"name": "T4"}], "none": None, "list": [], "ram_bytes": 2**30}
    pairs = [("a", "1"), ("b · c", "x"), ("gpus · name", "T4"), ("ram_bytes", "1.00 GiB")]
    assert flat(facts) == pairs


# ----------------------------------------------------------------------------------------------------------- headline


def test_the_headline_is_the_fastest_file_that_was_kept(sample: Report) -> None:
    found = sample.data["headline"]
    assert found["file"] == "model.int8-cpu.onnx"
    assert found["teacher_file"] == "teacher.onnx"
    teacher, best = sample.data["models"][0], sample.data["models"][3]
    assert found["speedup"] == teacher["latency"]["end_to_end"]["p50"] / best["latency"]["end_to_end"]["p50"]
    assert found["retained"] == 0.5448 / 0.6113
    assert found["parameter_ratio"] == 1_770_000 / 466_000


def test_without_a_timed_teacher_there_is_no_speed_up(sample: Report) -> None:
    students = [row for row in sample.data["models"] if row["role"] == "student"]
    found = headline(students, sample.data["torch"])
    assert found is not None
    assert found["speedup"] is None
    assert found["retained"] == pytest.approx(0.5448 / 0.6114)


def test_a_teacher_on_another_device_gives_no_speed_up(sample: Report) -> None:
    models = [row | ({"device": "T4"} if row["role"] == "student" else {}) for row in sample.data["models"]]
    found = headline(models)
    assert found is not None
    assert found["speedup"] is None
    assert found["size_ratio"] > 1


def test_without_a_kept_student_there_is_no_headline(sample: Report) -> None:
    assert headline([row for row in sample.data["models"] if row["role"] == "teacher"]) is None
    assert headline([row for row in sample.data["models"] if row["precision"] == "int8-trt"]) is None


# ------------------------------------------------------------------------------------------------------------- schema


def test_the_schema_itself_is_valid() -> None:
    from jsonschema import Draft202012Validator

    Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (
            {"models": [make_row("a.onnx", "fp32", 1, None, (), settings=SETTINGS | {"conf": "0.25"})]},
            "models/0/settings/conf",
        ),
        ({"models": [make_row("a.onnx", "fp32", 1, None, (), settings={"conf": 0.25})]}, "models/0/settings"),
        ({"surprise": 1}, "surprise"),
        ({"stages": [{"name": "train", "seconds": -1, "skipped": False}]}, "stages/0/seconds"),
    ],
)
def test_what_breaks_the_schema_is_refused_by_name(sample: Report, change: dict[str, Any], where: str) -> None:
    with pytest.raises(InputError, match=where):
        Report({**sample.data, **change})


def test_a_newer_report_asks_for_a_newer_edgestill(sample: Report) -> None:
    with pytest.raises(InputError, match="Update edgestill"):
        Report({**sample.data, "schema_version": 3})


def test_an_older_report_asks_for_a_new_measurement(sample: Report) -> None:
    with pytest.raises(InputError, match="Measure again"):
        Report({**sample.data, "schema_version": 1})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"schema_version": 1}'])
def test_a_file_that_is_no_report_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    with pytest.raises(InputError, match=REPORT_FILE):
        Report.load(tmp_path)


def test_an_absent_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Report.load(tmp_path / "nothing")


def test_a_row_carries_digest_and_size_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"abc")
    row = model_row(tmp_path / "m.onnx", **MEASURED, kept=False, reason="why", gflops=1.5)
    assert row["sha256"].startswith("ba7816bf")
    assert (row["bytes"], row["gate"], row["gflops"]) == (3, {"kept": False, "reason": "why"}, 1.5)
    assert minimal([row]).data["headline"] is None


def test_the_moment_is_written_in_utc() -> None:
    report = make_report("x", machine={}, models=[], created=datetime(2026, 1, 2, tzinfo=timezone.utc))
    assert report.data["created"] == "2026-01-02T00:00:00Z"


def test_plain_values_are_plain_all_the_way_down() -> None:
    from benchmarks.latency import Durations, Warmup

    value = plain({"a": (Warmup(1, 2.0, True), Path("x")), "b": Durations.of([1.0])})
    assert value["a"] == [{"calls": 1, "ms": 2.0, "settled": True}, "x"]
    assert value["b"]["samples"] == [1.0]
    json.dumps(value)
