from __future__ import annotations

import csv
import io

from benchmarks import wording
from benchmarks.render import to_csv, to_html, to_markdown
from benchmarks.report import Report
from tests.benchmarks.conftest import SETTINGS, with_models


def test_int8_that_is_not_faster_is_said_in_words(sample: Report) -> None:
    assert any(s.startswith("int8-trt is not faster than fp32") for s in wording.findings(sample.data))
    assert any(s.startswith("int8-ort is faster than fp32") for s in wording.findings(sample.data))


def test_a_hair_is_not_faster(sample: Report) -> None:
    slow = next(row["latency"] for row in sample.data["models"] if row["file"] == "model.onnx")
    near = slow | {"end_to_end": slow["end_to_end"] | {"p50": 0.97 * slow["end_to_end"]["p50"]}}
    sentences = wording.findings(with_models(sample, int8_ort={"latency": near}).data)
    assert any(s.startswith("int8-ort is not faster than fp32") for s in sentences)


def test_a_refused_file_stands_there_with_its_reason(sample: Report) -> None:
    reason = "mAP50-95 0.51210 is more than 0.02 below 0.55020 of fp32"
    assert f"model.int8-trt.onnx was refused by its gate: {reason}." in to_html(sample)
    assert "refused" in to_markdown(sample)


def test_engines_that_did_not_run_say_why(sample: Report) -> None:
    assert "model.fp16.plan was built for sm86, sm89, sm120 and not run on this machine: no GPU." in to_html(sample)


def test_an_unsteady_latency_is_said_in_words(sample: Report) -> None:
    latency = sample.data["models"][1]["latency"] | {"steady": False}
    sentences = wording.findings(with_models(sample, fp16={"latency": latency}).data)
    assert "The latency of model.fp16.onnx drifted while it was measured: repeat it on a quiet machine." in sentences


def test_files_measured_with_different_settings_are_told_apart(sample: Report) -> None:
    other = SETTINGS | {"iou": 0.45}
    found = with_models(sample, fp16={"settings": other})
    (sentence,) = (s for s in wording.findings(found.data) if s.startswith("iou differs"))
    others = "teacher.onnx, model.onnx, model.int8-ort.onnx, model.int8-trt.onnx"
    assert sentence.endswith(f": 0.6 for {others}; 0.45 for model.fp16.onnx.")
    assert "iou 0.6" not in " ".join(wording.summary(found.data))
    assert "iou 0.6" in " ".join(wording.summary(sample.data))
    ious = [row["iou"] for row in csv.DictReader(io.StringIO(to_csv(found)))]
    assert ious == ["0.6", "0.6", "0.45", "0.6", "0.6"]


def test_few_images_are_said_in_words(sample: Report) -> None:
    figures = sample.data["models"][1]["accuracy"] | {"images": 4}
    assert any("4 images" in s for s in wording.findings(with_models(sample, fp16={"accuracy": figures}).data))


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
