from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare import parse_rule, violations
from benchmarks.render import to_html
from benchmarks.report import REPORT_FILE, SCHEMA_VERSION, Report, headline, make_report, schema
from benchmarks.wording import findings
from runtime.errors import InputError
from tests.benchmarks.conftest import SETTINGS, make_row


def test_the_headline_is_the_file_to_take_of_those_that_were_kept(sample: Report) -> None:
    found = sample.data["headline"]
    assert found["file"] == "model.int8-ort.onnx"
    assert found["teacher_file"] == "teacher.onnx"
    teacher, best = sample.data["models"][0], sample.data["models"][3]
    assert found["speedup"] == teacher["latency"]["ratio"]["ratio"] / best["latency"]["ratio"]["ratio"]
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


def test_the_best_of_several_models_is_no_headline(sample: Report) -> None:
    """Each is measured and shown; the fastest of one says nothing about the mAP of another."""
    models = [row | {"identity": "ab"[index % 2] * 64} for index, row in enumerate(sample.data["models"])]
    assert headline(models) is None
    assert headline([row | {"identity": "a" * 64} for row in models]) is not None
    report = make_report("two", machine={}, models=models)
    assert any("are 2 models" in sentence and "b" * 12 in sentence for sentence in findings(report.data))
    assert "speed-up" not in to_html(report).lower()
    assert violations([parse_rule("speedup<1")], [report]) == ["speedup<1: the report has no best file"]


def test_two_teachers_are_no_headline(sample: Report) -> None:
    teacher, *students = sample.data["models"]
    assert headline([teacher | {"identity": "a" * 64}, teacher | {"identity": "b" * 64}, *students]) is None


def test_a_flavour_is_not_held_against_the_fp32_of_another_model(sample: Report) -> None:
    _, full, half, *_ = sample.data["models"]
    other = [full | {"identity": "a" * 64}, half | {"identity": "b" * 64}]
    assert not [sentence for sentence in findings({**sample.data, "models": other}) if "faster than fp32" in sentence]
    same = [row | {"identity": "a" * 64} for row in (full, half)]
    assert [sentence for sentence in findings({**sample.data, "models": same}) if "faster than fp32" in sentence]


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
        Report({**sample.data, "schema_version": SCHEMA_VERSION + 1})


def test_an_older_report_asks_for_a_new_measurement(sample: Report) -> None:
    with pytest.raises(InputError, match="Measure again"):
        Report({**sample.data, "schema_version": SCHEMA_VERSION - 1})


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", '{"schema_version": 1}'])
def test_a_file_that_is_no_report_is_an_input_error(tmp_path: Path, text: str) -> None:
    (tmp_path / REPORT_FILE).write_text(text)
    with pytest.raises(InputError, match=REPORT_FILE):
        Report.load(tmp_path)


def test_an_absent_report_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        Report.load(tmp_path / "nothing")


def test_the_moment_is_written_in_utc() -> None:
    report = make_report("x", machine={}, models=[], created=datetime(2026, 1, 2, tzinfo=timezone.utc))
    assert report.data["created"] == "2026-01-02T00:00:00Z"


def test_a_file_for_other_hardware_is_neither_the_fastest_nor_called_faster(sample: Report) -> None:
    models = [
        row | {"settings": row["settings"] | {"as_written": row["precision"] != "fp32"}}
        for row in sample.data["models"]
    ]
    found = headline(models)
    assert found is not None
    assert found["precision"] == "fp32"
    data = {**sample.data, "models": models}
    assert not any("fp32 on this machine" in sentence for sentence in findings(data))
