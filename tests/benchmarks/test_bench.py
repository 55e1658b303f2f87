from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from benchmarks import overhead
from benchmarks.__main__ import main
from benchmarks.accuracy import coco_accuracy, read_coco, read_ground_truth
from benchmarks.bench import Entry, Plan, compare_files, digest, list_images, measure_files, numbered_images
from benchmarks.environment import device_name, environment
from benchmarks.report import Report, headline, make_report
from benchmarks.rows import latency_ratio
from benchmarks.wording import findings
from runtime.backends import LoadOptions
from runtime.backends import onnx as onnx_backend
from runtime.backends.onnx import session_options
from runtime.card import METADATA_KEY, Artifact, Batches, ModelCard
from runtime.detector import Detector
from runtime.errors import InputError, UsageError
from runtime.files import sha256
from tests.runtime import toys

SIZE = 64
CARD = ModelCard(name="square", names=("thing", "other"), size_hw=(SIZE, SIZE))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that finds one "other" at (8, 8, 40, 40) of every canvas, images of which each has one there."""
    root = tmp_path_factory.mktemp("bench")
    write_model(root / "model.onnx")
    (root / "images").mkdir()
    for number in range(3):
        cv2.imwrite(str(root / "images" / f"{number}.png"), np.full((SIZE, SIZE, 3), 40 * number, np.uint8))
    write_annotations(root / "instances.json", [f"images/{number}.png" for number in range(3)])
    return root


def write_model(path: Path, card: ModelCard = CARD) -> None:
    found = np.array([[[8, 8, 40, 40, 0.9, 1], [0, 0, 0, 0, 0, 0]]], np.float32)
    nodes = [
        helper.make_node("Cast", ["canvas"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMax", ["float"], ["high"], keepdims=0),
        helper.make_node("Mul", ["high", "zero"], ["nothing"]),
        helper.make_node("Add", ["found", "nothing"], ["boxes"]),
    ]
    graph = helper.make_graph(
        nodes,
        "square",
        [helper.make_tensor_value_info("canvas", TensorProto.UINT8, [1, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 2, 6])],
        [
            helper.make_tensor("found", TensorProto.FLOAT, found.shape, found.ravel()),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    helper.set_model_props(model, {METADATA_KEY: card.to_json()})
    onnx.save(model, path)


def write_annotations(path: Path, files: list[str], names: tuple[str, ...] = ("other", "thing")) -> None:
    boxes = [
        {"id": n, "image_id": n, "category_id": 7, "bbox": [8, 8, 32, 32], "area": 1024, "iscrowd": 0}
        for n in range(1, len(files) + 1)
    ]
    truth = {
        "images": [{"id": n, "file_name": name, "width": SIZE, "height": SIZE} for n, name in enumerate(files, 1)],
        "annotations": boxes,
        "categories": [{"id": 7 + index, "name": name} for index, name in enumerate(names)],
    }
    path.write_text(json.dumps(truth))


def bench(folder: Path, out: Path, *more: str) -> int:
    given = ["--model", str(folder / "model.onnx"), "--images", str(folder / "images"), "--out", str(out)]
    return main([*given, "--samples", "12", "--warmup", "5", "--device", "cpu", *more])


def test_a_file_is_timed_and_judged_in_one_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    assert bench(folder, tmp_path, "--annotations", str(folder / "instances.json")) == 0
    (row,) = Report.load(tmp_path).data["models"]
    assert row["accuracy"]["map50_95"] == pytest.approx(1.0)
    assert row["latency"]["end_to_end"]["n"] == 12
    assert row["sha256"] == sha256(folder / "model.onnx")
    assert row["device"] == "cpu"
    assert "| model.onnx | fp32 | onnx |" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "report.csv",
        "report.html",
        "report.json",
        "report.md",
    ]


@pytest.mark.parametrize("package", ["jinja2", "jsonschema", "matplotlib"])
def test_a_missing_package_is_one_line_before_anything_is_measured(
    folder: Path, tmp_path: Path, package: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert bench(folder, tmp_path, "--model", "nowhere.onnx") == 1
    assert capsys.readouterr().err == f"error: Package {package} is not installed. pip install 'edgestill[bench]'\n"


def test_without_annotations_there_is_no_accuracy(folder: Path, tmp_path: Path) -> None:
    assert bench(folder, tmp_path) == 0
    data = Report.load(tmp_path).data
    assert data["models"][0]["accuracy"] is None
    assert data["dataset"]["instances"] is None


def test_settings_of_a_row_come_from_the_model_and_the_command(folder: Path, tmp_path: Path) -> None:
    bench(folder, tmp_path)
    (row,) = Report.load(tmp_path).data["models"]
    settings = row["settings"]
    assert (settings["imgsz"], settings["conf"], settings["iou"]) == (SIZE, CARD.conf, CARD.iou)
    assert (settings["latency_samples"], settings["warmup_ms"], settings["frames"]) == (12, 5.0, 3)


@pytest.mark.parametrize(
    ("batches", "asked", "timed"),
    [(Batches(2, 2), 1, 2), (Batches(1, None), 3, 3), (Batches(1, 4), 9, 4), (Batches(1, 1), 3, 1)],
)
def test_a_call_is_timed_on_the_batch_of_its_file(
    folder: Path, tmp_path: Path, batches: Batches, asked: int, timed: int
) -> None:
    card = replace(toys.card(), size_hw=(32, 64), batches=batches)
    file = toys.canvas_model(tmp_path / "toy.onnx", card)
    plan = Plan(numbered_images(folder / "images"), batch=asked, samples=11, warmup_ms=1)
    settings = measure_files([Entry(file, plan)])[0]["settings"]
    assert (settings["imgsz"], settings["batch"]) == ("32x64", timed)
    assert compare_files(file, file, plan, rounds=10).rounds == 10


def test_a_comparison_of_files_takes_ten_rounds(folder: Path) -> None:
    with pytest.raises(UsageError, match="9 rounds"):
        compare_files(folder / "model.onnx", folder / "model.onnx", Plan([]), rounds=9)


def test_calls_of_different_numbers_of_frames_are_not_compared(folder: Path, tmp_path: Path) -> None:
    one, two = (toys.canvas_model(tmp_path / f"{n}.onnx", replace(toys.card(), batches=Batches(n, n))) for n in (1, 2))
    with pytest.raises(UsageError, match=r"1\.onnx takes 1 frames, one of 2\.onnx 2"):
        compare_files(one, two, Plan(numbered_images(folder / "images"), warmup_ms=1), rounds=10)


def test_a_report_tells_height_width_and_batch(folder: Path, tmp_path: Path, capsys: Any) -> None:
    card = replace(toys.card(), size_hw=(32, 64), batches=Batches(2, 2))
    model = toys.canvas_model(tmp_path / "toy.onnx", card)
    assert bench(folder, tmp_path / "out", "--model", str(model)) == 0
    told = capsys.readouterr().out
    assert "imgsz 32x64, batch 2" in told
    assert "milliseconds from the decoded frames of a call" in told


def test_each_row_has_its_own_settings_backend_and_device(folder: Path) -> None:
    """Three files of one network, whose cards differ."""
    cards = [replace(CARD, iou=0.45), replace(CARD, max_det=1000, conf=0.1)]
    for index, card in enumerate(cards):
        write_model(folder / f"other{index}.onnx", card)
    plan = Plan(numbered_images(folder / "images"), samples=11, warmup_ms=1, device="auto")
    files = (folder / "model.onnx", folder / "other0.onnx", folder / "other1.onnx")
    rows = measure_files([Entry(file, plan, more={"role": "baseline"}) for file in files])
    assert [row["settings"]["iou"] for row in rows] == [0.6, 0.45, 0.6]
    assert [row["settings"]["max_det"] for row in rows] == [300, 300, 1000]
    assert [row["settings"]["conf"] for row in rows] == [0.25, 0.25, 0.1]
    for row, file in zip(rows, files, strict=True):
        with Detector.load(file) as detector:
            assert row["device"] == device_name(detector.providers) != "auto"
        assert (row["backend"], row["role"]) == ("onnx", "baseline")
        assert row["latency"]["ratio"]["of"] == "model.onnx", "no student: the first"
        assert len(row["latency"]["rounds"]) == plan.samples
    report = make_report("three", machine={}, models=rows)
    assert any(sentence.startswith("iou differs") for sentence in findings(report.data))


def test_files_are_loaded_together_and_timed_against_fp32_of_the_student(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    infer = Detector.infer
    monkeypatch.setattr(Detector, "infer", lambda self, *given: (calls.append(id(self)), infer(self, *given))[1])
    plan = Plan(numbered_images(folder / "images"), samples=40, warmup_ms=1)
    roles = {"int8": "student", "fp32": "student", "teacher": "teacher"}
    for name in roles:
        write_model(folder / f"{name}.onnx", replace(CARD, precision="int8" if name == "int8" else "fp32"))
    rows = measure_files([Entry(folder / f"{n}.onnx", plan, more={"role": r}) for n, r in roles.items()])
    changes = sum(one != other for one, other in itertools.pairwise(calls))
    assert changes == 3 + 20 * 2, "three warm-ups and twenty rounds, the last of a round first in the next"
    ratios = [row["latency"]["ratio"] for row in rows]
    assert {ratio["of"] for ratio in ratios} == {"fp32.onnx"}
    assert ratios[1] | {"of": ""} == {"of": "", "ratio": 1, "low": 1, "high": 1}
    own, reference = (np.array(row["latency"]["rounds"]) for row in rows[:2])
    assert ratios[0]["ratio"] == np.median(own / reference)
    assert ratios[0]["low"] <= ratios[0]["ratio"] <= ratios[0]["high"]
    (alone,) = measure_files([Entry(folder / "fp32.onnx", plan)])
    assert "ratio" not in alone["latency"]
    assert alone["latency"]["rounds"] == []


def test_files_of_a_camera_are_compared_by_their_medians_without_an_interval(folder: Path) -> None:
    plan = Plan(numbered_images(folder / "images"), samples=20, warmup_ms=1, interval_ms=1)
    rows = measure_files([Entry(folder / "model.onnx", plan), Entry(folder / "model.onnx", plan)])
    first, second = (np.median(row["latency"]["end_to_end"]["samples"]) for row in rows)
    assert rows[1]["latency"]["ratio"] == {"of": "model.onnx", "ratio": second / first, "low": None, "high": None}


def test_the_time_of_calls_of_different_numbers_of_frames_is_not_compared(folder: Path, tmp_path: Path) -> None:
    one, two = (toys.canvas_model(tmp_path / f"{n}.onnx", replace(toys.card(), batches=Batches(n, n))) for n in (1, 2))
    plan = Plan(numbered_images(folder / "images"), samples=11, warmup_ms=1)
    rows = measure_files([Entry(one, plan), Entry(two, plan)])
    assert [latency_ratio(row) for row in rows] == [1, None]
    assert headline(list(reversed(rows)))["file"] == "1.onnx"


def test_files_of_one_measurement_may_differ_in_what_runs_them(folder: Path) -> None:
    plan = Plan(numbered_images(folder / "images"), samples=11, warmup_ms=1, backend="onnx")
    rows = measure_files([Entry(folder / "model.onnx", replace(plan, as_written=way)) for way in (False, True)])
    assert [row["settings"]["as_written"] for row in rows] == [False, True]


def test_the_row_of_a_bundle_is_of_the_file_that_ran(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "model.onnx", tmp_path / "b.onnx")
    (tmp_path / "a.plan").write_bytes(b"not a plan for here")
    artifacts = (artifact(tmp_path / "a.plan", "fp32", "tensorrt"), artifact(tmp_path / "b.onnx"))
    replace(CARD, artifacts=artifacts).save(tmp_path / "model.json")
    plan = Plan(numbered_images(folder / "images"), samples=11, warmup_ms=1)
    (row,) = measure_files([Entry(tmp_path, plan, "fp32")])
    assert (row["file"], row["backend"]) == ("b.onnx", "onnx")
    assert row["sha256"] == sha256(tmp_path / "b.onnx")


def test_two_files_are_compared_in_turns_and_loaded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Path] = []
    load = Detector.load
    monkeypatch.setattr(Detector, "load", lambda path, **more: (loaded.append(path), load(path, **more))[1])
    plan = Plan(numbered_images(folder / "images"), samples=100, warmup_ms=1, threads=1)
    found = compare_files(folder / "model.onnx", folder / "model.onnx", plan, rounds=10)
    assert loaded == [folder / "model.onnx"] * 2
    assert found.rounds == 10
    assert found.low <= found.ratio <= found.high
    assert found.verdict(limit=20) == "faster"
    assert found.verdict(limit=0.05) == "slower"


@pytest.mark.parametrize(("rule", "code"), [("p50_ms>1e6", 0), ("p50_ms>0", 1), ("p50_ms!", 2)])
def test_a_threshold_is_an_exit_code(folder: Path, tmp_path: Path, rule: str, code: int, capsys: Any) -> None:
    assert bench(folder, tmp_path, "--fail-on", rule) == code
    assert ("p50_ms" in capsys.readouterr().err) == (code != 0)


def test_every_file_of_a_bundle_is_measured_and_idle_engines_are_listed(folder: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(folder / "model.onnx", bundle / name)
    (bundle / "c.plan").write_bytes(b"not a plan for here")
    artifacts = [artifact(bundle / "c.plan", "fp16", "tensorrt"), *(artifact(bundle / f"{n}.onnx") for n in "ab")]
    ModelCard(**{**vars(CARD), "artifacts": tuple(artifacts)}).save(bundle / "model.json")
    images = ["--images", str(folder / "images"), "--samples", "11", "--warmup", "1"]
    assert main(["--model", str(bundle), *images, "--out", str(tmp_path / "out")]) == 0
    data = Report.load(tmp_path / "out").data
    assert [row["file"] for row in data["models"]] == ["a.onnx", "b.onnx"]
    assert [row["latency"]["ratio"]["of"] for row in data["models"]] == ["a.onnx"] * 2
    assert [len(row["latency"]["rounds"]) for row in data["models"]] == [11, 11]
    (engine,) = data["engines"]
    assert (engine["file"], engine["targets"], engine["ran"]) == ("c.plan", ["sm1"], False)
    assert engine["note"]


def artifact(path: Path, precision: str = "fp32", backend: Any = "onnx") -> Artifact:
    targets = ("sm1",) if backend != "onnx" else ()
    return Artifact(path.name, sha256(path), path.stat().st_size, precision, backend, targets)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (["--images", "nowhere"], "nowhere"),
        (["--annotations", "nowhere.json"], "nowhere.json"),
        (["--model", "nowhere.onnx"], "nowhere.onnx"),
    ],
)
def test_an_absent_file_is_one_line(folder: Path, tmp_path: Path, change: list[str], word: str, capsys: Any) -> None:
    assert bench(folder, tmp_path, *change) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert word in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_annotations_of_other_images_are_refused(folder: Path, tmp_path: Path, capsys: Any) -> None:
    write_annotations(tmp_path / "other.json", ["x.png"])
    assert bench(folder, tmp_path / "out", "--annotations", str(tmp_path / "other.json")) == 1
    assert "none of the images" in capsys.readouterr().err


def test_images_and_annotations_meet_by_relative_path(folder: Path) -> None:
    truth = json.loads((folder / "instances.json").read_text())
    images = folder / "images"
    expected = [(1, images / "0.png"), (2, images / "1.png")]
    assert numbered_images(images, truth, most=2) == expected
    for image in truth["images"]:
        image["file_name"] = Path(image["file_name"]).name
    assert numbered_images(images, truth, most=2) == expected
    assert [number for number, _ in numbered_images(images)] == [1, 2, 3]


def test_two_images_of_one_base_name_both_count(folder: Path, tmp_path: Path) -> None:
    names = ["cam1/0.png", "cam2/0.png"]
    for name in names:
        (tmp_path / "val" / name).parent.mkdir(parents=True)
        shutil.copy(folder / "images" / "0.png", tmp_path / "val" / name)
    write_annotations(tmp_path / "truth.json", names)
    plan = Plan(*images_and_truth(tmp_path / "val", tmp_path / "truth.json"), samples=11, warmup_ms=1)
    assert plan.images == [(1, tmp_path / "val/cam1/0.png"), (2, tmp_path / "val/cam2/0.png")]
    accuracy = measure_files([Entry(folder / "model.onnx", plan)])[0]["accuracy"]
    assert (accuracy["images"], accuracy["instances"], accuracy["map50_95"]) == (2, 2, pytest.approx(1.0))


def images_and_truth(folder: Path, annotations: Path) -> tuple[Any, Any]:
    truth = read_coco(annotations)
    return numbered_images(folder, truth), truth


def test_the_digest_changes_with_images_names_and_labels(folder: Path, tmp_path: Path) -> None:
    images = list_images(folder / "images")
    moved = shutil.copytree(folder / "images", tmp_path / "elsewhere")
    assert digest(images) == digest(list_images(moved))
    (moved / "0.png").rename(moved / "x.png")
    assert (
        len({digest(images), digest(images[:2]), digest(images, {"annotations": []}), digest(list_images(moved))}) == 4
    )


def test_a_folder_without_images_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image"):
        list_images(tmp_path)


def test_a_linked_folder_of_images_is_measured_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "linked").symlink_to(folder / "images", target_is_directory=True)
    assert [path.name for path in list_images(tmp_path)] == [path.name for path in list_images(folder / "images")]


@pytest.mark.parametrize("text", ["5", "[]", "{}", '{"images": [3], "annotations": [], "categories": []}'])
def test_json_that_is_not_coco_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match="is not a list of objects") as caught:
        read_coco(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


WHOLE = {
    "images": [{"id": 1, "file_name": "0.png"}],
    "categories": [{"id": 7, "name": "bolt"}, {"id": 8, "name": "nut"}],
    "annotations": [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40]}],
}


def test_ids_and_areas_of_annotations_need_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(WHOLE))
    found = [{"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40], "score": 0.9}]
    for extra in ({}, {"id": 0, "area": None, "iscrowd": None}):
        entry = WHOLE["annotations"][0] | extra
        (tmp_path / "a.json").write_text(json.dumps(WHOLE | {"annotations": [entry]}))
        assert coco_accuracy(read_ground_truth(tmp_path / "a.json"), found).map50_95 == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        *((key, name, None) for key, name in [
            ("images", "id"), ("images", "file_name"), ("categories", "id"), ("categories", "name"),
            ("annotations", "image_id"), ("annotations", "category_id"), ("annotations", "bbox"),
        ]),
        ("images", "id", [1]), ("images", "id", True), ("images", "file_name", 3), ("categories", "name", 5),
        ("annotations", "bbox", [1, 2]), ("annotations", "bbox", "abcd"), ("annotations", "bbox", [1, 2, 3, math.nan]),
        ("annotations", "bbox", [1, 2, 3, 10**400]), ("annotations", "area", "big"), ("annotations", "iscrowd", 2),
        ("annotations", "bbox", ["x" * 9000]),
    ],
)  # fmt: skip
def test_an_entry_of_the_ground_truth_that_cannot_be_used_is_named(
    tmp_path: Path, key: str, name: str, value: object
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(WHOLE | {key: [WHOLE[key][0] | {name: value}]}))
    with pytest.raises(InputError, match=rf"{name} of {key}\[1\] is ") as caught:
        read_ground_truth(tmp_path / "a.json")
    assert len(str(caught.value)) < len(str(tmp_path)) + 200


def test_two_categories_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(WHOLE | {"categories": [{"id": n, "name": "a"} for n in (1, 2)]}))
    with pytest.raises(InputError, match="two categories have one name"):
        read_ground_truth(tmp_path / "a.json")


def test_wrong_usage_is_one_line(capsys: Any) -> None:
    assert main(["--model", "m.onnx"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["--model", "", "--images", "x", "--out", "y"]) == 2
    assert "a path is empty" in capsys.readouterr().err


def test_files_and_images_of_names_that_are_not_utf8_are_reported(folder: Path, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff")
    shutil.copy(folder / "model.onnx", tmp_path / f"{name}.onnx")
    (tmp_path / "images").mkdir()
    shutil.copy(folder / "images" / "0.png", tmp_path / "images" / f"{name}.png")
    given = ["--images", str(tmp_path / "images"), "--samples", "11", "--warmup", "1", "--out", str(tmp_path / name)]
    assert main(["--model", str(tmp_path / f"{name}.onnx"), *given]) == 0
    assert json.loads((tmp_path / name / "report.json").read_text())["models"][0]["file"] == f"{name}.onnx"
    assert {path.suffix for path in (tmp_path / name).iterdir()} == {".json", ".html", ".md", ".csv"}


def test_overhead_is_a_ratio_with_its_interval(folder: Path, capsys: Any) -> None:
    given = ["--model", str(folder / "model.onnx"), "--images", str(folder / "images"), "--rounds", "10"]
    assert overhead.main([*given, "--threads", "1"]) == 0
    text = capsys.readouterr().out
    assert "over time of the bare session.run" in text
    assert "95 % interval" in text
    assert "n = 100" in text
    assert "verdict: " in text


def test_the_bare_session_has_the_options_of_the_detectors(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[LoadOptions] = []
    monkeypatch.setattr(onnx_backend, "session_options", lambda load: (used.append(load), session_options(load))[1])
    Plan([], device="cpu", threads=1).detector(folder / "model.onnx").close()
    overhead.bare_session(folder / "model.onnx", 1)
    assert len(used) == 2
    assert used[0] == used[1]


def test_overhead_needs_an_onnx_file(folder: Path, capsys: Any) -> None:
    assert overhead.main(["--model", "m.plan", "--images", str(folder / "images")]) == 1
    assert "m.plan" in capsys.readouterr().err


def test_the_environment_is_json() -> None:
    facts = environment()
    json.dumps(facts)
    assert facts["packages"]["faster-coco-eval"]
