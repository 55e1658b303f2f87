from __future__ import annotations

from typing import Any

import pytest

from benchmarks.compare import compare, parse_rule, to_html, to_markdown, violations
from benchmarks.report import Report
from runtime.errors import UsageError


def broken(rule: str, *reports: Report) -> list[str]:
    return violations([parse_rule(rule)], reports)


def changed(report: Report, **sections: dict[str, Any]) -> Report:
    return Report({**report.data, **{key: report.data[key] | value for key, value in sections.items()}})


def with_settings(report: Report, **settings: Any) -> Report:
    """The report as if all its files had been measured with these settings."""
    models = [row | {"settings": row["settings"] | settings} for row in report.data["models"]]
    return Report({**report.data, "models": models})


def test_equal_settings_are_compared_without_a_warning(sample: Report) -> None:
    found = compare([sample, sample])
    assert found.warnings == ()
    assert len(found.rows) == 2 * len(sample.data["models"])
    assert {name for name, _ in found.rows} == {"Conveyor, YOLOv5n to p (1)", "Conveyor, YOLOv5n to p (2)"}


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ({"dataset": {"sha256": "ef" * 32}}, "data"),
        ({"machine": {"cpu": "Other CPU"}}, "machine"),
    ],
)
def test_a_difference_that_matters_is_a_warning_and_rows_stay_apart(
    sample: Report, sections: dict[str, Any], word: str
) -> None:
    found = compare([sample, changed(sample, **sections)])
    assert [sentence.split()[0] for sentence in found.warnings] == [word]
    assert len(found.rows) == 2 * len(sample.data["models"])


@pytest.mark.parametrize(("backend", "library"), [("onnx", "onnxruntime"), ("openvino",) * 2, ("tensorrt",) * 2])
def test_another_version_of_a_library_that_ran_files_is_a_warning(sample: Report, backend: str, library: str) -> None:
    other = changed(sample, machine={"packages": sample.data["machine"]["packages"] | {library: "0.1"}})
    told = [sentence.split()[0] for sentence in compare([sample, other]).warnings]
    assert told == ([library] if backend == "onnx" else [])
    both = [
        Report({**report.data, "models": [row | {"backend": backend} for row in report.data["models"]]})
        for report in (sample, other)
    ]
    (warning,) = compare(both).warnings
    assert warning.startswith(f"{library} differs")
    assert "0.1 in" in warning


@pytest.mark.parametrize("settings", [{"conf": 0.5}, {"iou": 0.7}, {"max_det": 100}, {"imgsz": 640}])
def test_a_setting_that_differs_is_a_warning_and_rows_stay_apart(sample: Report, settings: dict[str, Any]) -> None:
    found = compare([sample, with_settings(sample, **settings)])
    assert [sentence.split()[0] for sentence in found.warnings] == list(settings)
    assert len(found.rows) == 2 * len(sample.data["models"])


def test_one_precision_computed_in_float_and_by_integer_kernels_is_a_warning(sample: Report) -> None:
    found = compare([sample, with_settings(sample, as_written=True)])
    assert any(sentence.startswith("as_written of int8-ort differs") for sentence in found.warnings)
    ways = {row["precision"]: {"as_written": row["precision"] == "int8-ort"} for row in sample.data["models"]}
    models = [row | {"settings": row["settings"] | ways[row["precision"]]} for row in sample.data["models"]]
    mixed = Report({**sample.data, "models": models})
    assert compare([mixed, mixed]).warnings == ()


def test_a_setting_that_differs_within_a_report_is_a_warning_with_all_its_values(sample: Report) -> None:
    models = [row | {"settings": row["settings"] | {"iou": 0.45}} for row in sample.data["models"][:1]]
    mixed = Report({**sample.data, "name": "mixed", "models": [*models, *sample.data["models"][1:]]})
    (warning,) = compare([sample, mixed]).warnings
    assert "0.45 and 0.6 in mixed" in warning
    assert len(compare([mixed, mixed]).warnings) == 1


def test_warnings_are_in_every_rendering(sample: Report) -> None:
    found = compare([sample, with_settings(sample, conf=0.5)])
    assert "**Warning:** conf differs" in to_markdown(found)
    assert "conf differs" in to_html(found)
    assert to_html(found) == to_html(found)
    assert to_markdown(found).count("model.fp16.onnx") == 2


def test_rows_of_two_models_say_which_is_which(sample: Report) -> None:
    mine, other = (
        Report({**sample.data, "models": [row | {"identity": digit * 64} for row in sample.data["models"]]})
        for digit in "ab"
    )
    text = to_markdown(compare([mine, other]))
    assert "| Model |" in text
    assert text.count("a" * 12) == text.count("b" * 12) == len(sample.data["models"])


def test_nothing_to_compare_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="no report"):
        compare([])


@pytest.mark.parametrize(
    ("rule", "files"),
    [
        ("map50_95<0.30", []),
        ("map50_95<0.55", ["model.int8-ort.onnx"]),
        ("map50_95 <= 0.5500", ["model.fp16.onnx", "model.int8-ort.onnx"]),
        ("int8-ort.map50_95<0.55", ["model.int8-ort.onnx"]),
        ("p50_ms>12.0", ["model.onnx", "model.fp16.onnx"]),
        ("bytes>2e6", ["model.onnx"]),
        ("speedup<3", []),
        ("speedup<4", ["model.int8-ort.onnx"]),
        ("retained<0.95", ["model.int8-ort.onnx"]),
    ],
)
def test_a_rule_names_the_files_that_break_it(sample: Report, rule: str, files: list[str]) -> None:
    assert [violation.split(": ")[1].split(" has ")[0] for violation in broken(rule, sample)] == files


def test_refused_files_and_the_teacher_break_no_rule(sample: Report) -> None:
    assert broken("map50_95<0.53", sample) == []
    assert broken("p50_ms>20", sample) == []


def test_what_was_not_measured_breaks_the_rule(sample: Report) -> None:
    assert any("not measured" in violation for violation in broken("p99_ms>1000", sample))
    assert broken("int4.map50_95<0.3", sample) == ["int4.map50_95<0.3: no int4 file"]


@pytest.mark.parametrize(
    "rule",
    ["", "map50_95", "map50_95=0.3", "map50_95<abc", "banana<1", "imgsz<320", "__import__('os')<1", "fp16.speedup<1"],
)
def test_a_rule_that_cannot_be_read_is_a_usage_error(rule: str) -> None:
    with pytest.raises(UsageError):
        parse_rule(rule)


def test_of_several_reports_the_one_that_breaks_a_rule_is_named(sample: Report) -> None:
    better = Report({**sample.data, "name": "better", "headline": sample.data["headline"] | {"retained": 1.0}})
    assert [sentence.split(":")[0] for sentence in broken("retained<0.95", better, sample)] == [sample.data["name"]]
