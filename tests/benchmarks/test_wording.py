from __future__ import annotations

import csv
import io
import itertools
import re
from typing import Any

import pytest

from benchmarks import wording
from benchmarks.formats import milliseconds
from benchmarks.render import to_csv, to_html, to_markdown
from benchmarks.report import Report, headline, make_report
from benchmarks.rows import is_kept, p50, preference
from tests.benchmarks.conftest import SETTINGS, in_turns, with_models


def test_int8_that_is_not_faster_is_said_in_words(sample: Report) -> None:
    assert any(s.startswith("int8-trt is not clearly faster than fp32") for s in wording.findings(sample.data))
    assert any(s.startswith("int8-ort is faster than fp32") for s in wording.findings(sample.data))


def test_the_file_to_take_is_named_with_the_reasons_against_the_others(sample: Report) -> None:
    written = SETTINGS | {"as_written": True}
    data = with_models(sample, fp16={"settings": written}).data
    first, second = wording.choice(data["models"])
    fp32, int8 = (milliseconds(p50(data["models"][index])) for index in (1, 3))
    ratio = data["models"][3]["latency"]["ratio"]
    interval = f"{ratio['ratio']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
    assert first == (
        f"Of the files that passed their gates take model.int8-ort.onnx here: on cpu in onnx it has p50 {int8} ms, "
        f"time ratio {interval} of model.onnx, a loss of 0.00540 mAP50-95 ± 0.00070 over 4 draws."
    )
    assert second == (
        f"Not the others: model.onnx is slower, with p50 {fp32} ms; model.fp16.onnx is made for another library or "
        "device, so its time here says nothing; model.int8-trt.onnx was refused by its gate."
    )
    assert wording.findings(data)[:2] == list(wording.choice(data["models"]))


def test_fp32_is_the_file_to_take_where_no_other_is_clearly_faster(sample: Report) -> None:
    report = with_models(sample, int8_ort=timed(sample, 0.97))
    first, second = wording.choice(report.data["models"])
    assert first.startswith("Of the files that passed their gates take model.onnx here: on cpu in onnx it has p50 ")
    assert first.endswith(" ms.")
    assert "model.int8-ort.onnx is not clearly faster, with p50 " in second
    assert "a loss of 0.00540 mAP50-95 ± 0.00070 over 4 draws" in second
    assert min(filter(is_kept, report.data["models"][1:]), key=preference)["file"] == "model.onnx"


def timed(sample: Report, *ratios: float) -> dict[str, Any]:
    """A latency of this much of FP32's, in the rounds one after the other."""
    fp32 = sample.data["models"][1]
    rounds = [ms * ratio for ms, ratio in zip(fp32["latency"]["rounds"], itertools.cycle(ratios), strict=False)]
    own = fp32 | {"latency": fp32["latency"] | {"rounds": rounds}}
    return {"latency": in_turns(own, fp32)["latency"]}


def test_the_choice_goes_by_the_rounds_where_medians_over_all_calls_contradict_them(sample: Report) -> None:
    quick, slow = (timed(sample, ratio) for ratio in (0.9, 1.1))
    for row, p50_ms in ((quick, 20.0), (slow, 2.0)):
        row["latency"]["end_to_end"] = row["latency"]["end_to_end"] | {"p50": p50_ms}
    data = with_models(sample, int8_ort=quick, fp16=slow).data
    first, second = wording.choice(data["models"])
    assert "take model.int8-ort.onnx here" in first
    assert "model.fp16.onnx is slower, with p50 2.00 ms, time ratio 1.100 " in second
    told = [sentence for sentence in wording.findings(data) if " than fp32 on this machine" in sentence]
    here = "than fp32 on this machine (student, onnx)"
    assert told[0].startswith(f"fp16 is not clearly faster {here}: p50 2.00 ms, time ratio 1.100 [")
    assert told[1].startswith(f"int8-ort is faster {here}: p50 20.0 ms, time ratio 0.900 [")
    assert headline(data["models"])["file"] == "model.int8-ort.onnx"


@pytest.mark.parametrize(
    ("ratios", "is_taken", "why"),
    [
        ([0.94], True, "model.onnx is slower"),
        ([0.96], False, "model.int8-ort.onnx is not clearly faster, with p50 "),
        ([0.70, 0.90, 1.30], False, "model.int8-ort.onnx is not clearly faster, with p50 "),
        ([1.05], False, "model.int8-ort.onnx is slower, with p50 "),
    ],
)
def test_fp32_gives_way_only_to_a_file_that_is_clearly_faster(
    sample: Report, ratios: list[float], is_taken: bool, why: str
) -> None:
    data = with_models(sample, int8_ort=timed(sample, *ratios)).data
    first, second = wording.choice(data["models"])
    assert ("take model.int8-ort.onnx here" in first) is is_taken
    assert why in second
    assert any(s.startswith("int8-ort is faster than fp32") for s in wording.findings(data)) is is_taken
    assert headline(data["models"])["file"] == ("model.int8-ort.onnx" if is_taken else "model.onnx")


def test_a_file_that_is_slower_by_a_hair_is_not_called_slower(sample: Report) -> None:
    almost = timed(sample, 0.599, 0.601, 0.602), timed(sample, 0.6)
    _, second = wording.choice(with_models(sample, fp16=almost[0], int8_ort=almost[1]).data["models"])
    assert "model.fp16.onnx is not clearly faster, with p50 " in second


def test_fp32_of_another_model_is_compared_round_by_round(sample: Report) -> None:
    """Both scatter against the reference, and not against each other."""
    full, int8 = timed(sample, 2.0, 1.0, 0.7), timed(sample, 1.6, 0.8, 0.56)
    rows = sample.data["models"]
    others = [
        row | latency | {"identity": "c" * 64, "file": f"b.{row['precision']}.onnx"}
        for row, latency in ((rows[1], full), (rows[3], int8))
    ]
    told = wording.findings({**sample.data, "models": [*rows[:3], *others]})
    assert any(s.startswith("int8-ort is faster than fp32 on this machine") for s in told)


@pytest.mark.parametrize("rounds", [0, 5])
def test_nothing_is_claimed_of_files_without_enough_rounds(sample: Report, rounds: int) -> None:
    rows = []
    for row in sample.data["models"]:
        ratio = row["latency"]["ratio"] | {"low": None, "high": None}
        rows.append(row | {"latency": row["latency"] | {"rounds": row["latency"]["rounds"][:rounds], "ratio": ratio}})
    data = {**sample.data, "models": rows}
    told = "\n".join([*wording.findings(data), *wording.summary(data)])
    assert "faster" not in told
    assert "take model" not in told
    assert "in turns" not in told
    assert headline(rows)["file"] == "model.onnx", "it loses nothing"


def test_the_speed_up_agrees_with_the_findings_on_the_teacher(sample: Report) -> None:
    rows = sample.data["models"]
    teacher = timed(sample, 0.9)["latency"]
    teacher["end_to_end"] = teacher["end_to_end"] | {"p50": 99.0}
    data = make_report("a", machine={}, models=[rows[0] | {"latency": teacher}, rows[1]]).data
    assert "model.onnx is not faster than the teacher's teacher.onnx." in wording.findings(data)
    assert data["headline"]["speedup"] == pytest.approx(0.9)


def test_no_file_is_recommended_where_none_was_gated_or_they_are_several_models(sample: Report) -> None:
    rows = sample.data["models"]
    assert list(wording.choice([row | {"gate": None} for row in rows])) == []
    assert list(wording.choice([row | {"identity": row["sha256"]} for row in rows])) == []
    assert list(wording.choice([row for row in rows if row["role"] == "teacher"])) == []


def test_a_flavour_in_another_library_is_compared_with_fp32_all_the_same(sample: Report) -> None:
    sentences = wording.findings(with_models(sample, int8_ort={"backend": "openvino"}).data)
    assert any(
        s.startswith("int8-ort is faster than fp32 on this machine (student, openvino against onnx)") for s in sentences
    )


def test_a_refused_file_stands_there_with_its_reason(sample: Report) -> None:
    reason = "mAP50-95 0.51210 is more than 0.02 below 0.55020 of fp32"
    assert f"model.int8-trt.onnx was refused by its gate: {reason}." in to_html(sample)
    assert "refused" in to_markdown(sample)


def test_engines_that_did_not_run_say_why(sample: Report) -> None:
    assert "model.fp16.plan was built for sm86, sm89, sm120 and not run on this machine: no GPU." in to_html(sample)


def test_an_engine_without_a_target_was_not_built(sample: Report) -> None:
    engine = sample.data["engines"][0] | {"targets": [], "bytes": None, "note": "the backend is none"}
    sentences = wording.findings({**sample.data, "engines": [engine]})
    assert "model.fp32.plan was not built: the backend is none." in sentences


def test_a_file_whose_library_is_absent_is_not_called_unbuilt(sample: Report) -> None:
    engine = sample.data["engines"][0] | {"file": "a.onnx", "targets": [], "note": "openvino is not installed"}
    assert "a.onnx was not run on this machine: openvino is not installed." in wording.findings(
        {**sample.data, "engines": [engine]}
    )


@pytest.mark.parametrize(
    "change", [{"device": "GPU 1"}, {"settings": SETTINGS | {"as_written": True}}, {"latency": None}, {}]
)
def test_only_latencies_of_one_device_that_say_something_call_a_student_slow(sample: Report, change: dict) -> None:
    slow = {"latency": sample.data["models"][0]["latency"]}
    sentences = wording.findings(with_models(sample, fp16=slow | change).data)
    assert any(s.startswith("model.fp16.onnx is not faster than the teacher's") for s in sentences) == (change == {})


def test_an_axis_says_what_a_latency_covers(sample: Report) -> None:
    four = SETTINGS | {"batch": 4}
    assert "frame to boxes (ms" in to_html(sample)
    assert "all frames of a call to boxes (ms" in to_html(with_models(sample, fp16={"settings": four}))


def test_unsteady_latencies_are_said_in_one_sentence(sample: Report) -> None:
    drifting = {"latency": sample.data["models"][1]["latency"] | {"steady": False}}

    def told(**changes: Any) -> list[str]:
        return [s for s in wording.findings(with_models(sample, **changes).data) if "drifted" in s]

    assert told() == []
    end = "drifted while it was measured: repeat it on a quiet machine."
    assert told(fp16=drifting) == [f"The latency of model.fp16.onnx {end}"]
    assert told(fp16=drifting, int8_ort=drifting) == [f"The latency of model.fp16.onnx, model.int8-ort.onnx {end}"]
    every = dict.fromkeys(("fp32", "fp16", "int8_ort", "int8_trt"), drifting)
    assert told(**every) == [f"The latency of all files {end}"]


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


def test_the_gain_stands_there_with_its_interval_and_its_study(sample: Report) -> None:
    sentences = [s for s in wording.findings(sample.data) if "labels alone" in s]
    assert sentences == [
        "+5.1 [3.9, 6.3] points of mAP50-95 over the same student trained on labels alone "
        "(scratch; 5 paired seeds, test split, study conveyor-study).",
        "+2.1 points of mAP50-95 over the same student trained on labels alone "
        "(inherit; a single pair, which has no interval, test split, study conveyor-study).",
    ]
    assert "+5.1 [3.9, 6.3] points over labels alone (scratch)" in to_html(sample)


def test_a_gain_that_nobody_measured_is_said_in_words(sample: Report) -> None:
    gain = {"study": None, "split": None, "arm": None, "over": [], "missing": "run a study"}
    unknown = Report({**sample.data, "gain": gain})
    assert any(s.startswith("Not measured: ") and s.endswith("; run a study.") for s in wording.findings(unknown.data))
    assert "points over labels alone" not in to_html(unknown)
    assert not any("labels alone" in s for s in wording.findings(Report({**sample.data, "gain": None}).data))


def test_a_student_that_finds_nothing_is_no_success(sample: Report) -> None:
    rows = [
        row | {"accuracy": row["accuracy"] | {"map50_95": 0.004}} if row["role"] == "student" else row
        for row in sample.data["models"]
    ]
    first = wording.findings({**sample.data, "models": rows})[0]
    assert first.startswith("The student finds next to nothing: model.onnx has an mAP50-95 of 0.004")
    assert not any("next to nothing" in sentence for sentence in wording.findings(sample.data))


def test_curves_have_titles_that_a_reader_knows(sample: Report) -> None:
    page = to_html(sample)
    heads = re.findall(r'<div class="head"><span>(.*?)</span>', page)
    assert heads[:5] == ["mAP50-95", "mAP50", "box loss", "objectness loss", "class loss"]
    assert heads[-1] == "soft loss"
    assert "map50" not in page


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


def test_a_slice_of_a_larger_network_is_told_with_its_loss_before_the_first_step(sample: Report) -> None:
    found = sample.data["distillation"]["inheritance"]
    told = "The student started from slices of a larger network: 97.0 % of its parameters"
    losses = "box 0.070 (0.110), obj 0.020 (0.040), cls 0.010 (0.020)"
    assert wording.inherited(found) == f"{told}; label loss before the first step (from scratch) {losses}."
    unknown = {**found, "loss_from_scratch": None, "loss_before_first_step": None, "fresh": ["model.4.m.1"]}
    assert wording.inherited(unknown) == f"{told}; new blocks model.4.m.1."
    assert wording.inherited({key: found[key] for key in ("parameters", "total")}) == f"{told}."
    assert wording.inherited(None) == ""
    assert losses in to_html(sample)


def test_a_check_that_warns_is_no_pass_in_the_report(sample: Report) -> None:
    loss = {**sample.data["distillation"]["losses"][0]}
    states = {"passed": (True, False), "warning": (True, True), "failed": (False, False)}
    loss["checks"] = [
        {"name": f"check {state}", "passed": passed, "detail": "", "warns": warns}
        for state, (passed, warns) in states.items()
    ]
    page = to_html(Report({**sample.data, "distillation": {**sample.data["distillation"], "losses": [loss]}}))
    assert re.findall(r"check (\w+)<.*?>(passed|warning|failed)<", page) == [(state, state) for state in states]
