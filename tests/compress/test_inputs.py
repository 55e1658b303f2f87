from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.bench import Plan
from compress.flavours import FLAVOURS
from compress.inputs import kept_files, measured_files, refuse_another_model, suited
from runtime import backends
from runtime.bundle import folder_card
from runtime.card import CARD_FILE, Batches
from runtime.errors import InputError, UnavailableError
from runtime.files import write_json
from runtime.identity import OccupiedError
from tests.runtime.toys import canvas_model, card

UNMEASURED = {"loss": None, "latency": None}


def write_files(folders: dict[str, Path], **changes: object) -> None:
    """FP32 and two flavours; `changes` are those of the last one's card."""
    canvas_model(folders["export"] / "model.onnx", card())
    for precision, more in {"int8-ort": {}, "int8-trt": changes}.items():
        canvas_model(folders["quantize"] / f"model.{precision}.onnx", card(precision=precision, **more))


def test_a_flavour_that_could_not_be_made_is_neither_measured_nor_shipped(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("export", "quantize", "qad")}
    folders["quantize"].mkdir()
    write_json(folders["qad"] / "qad.json", [])
    entries = [
        {"name": "fp32", "file": "model.onnx", "kept": True, "reason": "the reference"},
        {"name": "fp16", "file": None, "kept": False, "reason": "it cannot be made"},
        {"name": "int8-ort", "file": "model.int8-ort.onnx", "kept": False, "reason": "loses 0.5"},
        {"name": "int8-trt", "file": "model.int8-trt.onnx", "kept": True, "reason": "loses 0.0"},
    ]
    (folders["quantize"] / "quantize.json").write_text(json.dumps([UNMEASURED | entry for entry in entries]))
    write_files(folders)
    assert [file.role for file in measured_files(folders)] == ["student"] * 3
    canvas_model(folders["export"] / "teacher.onnx", card())
    files = {(file.role, file.precision): file.path.name for file in measured_files(folders)}
    assert files == {
        ("teacher", "fp32"): "teacher.onnx",
        ("student", "fp32"): "model.onnx",
        ("student", "int8-ort"): "model.int8-ort.onnx",
        ("student", "int8-trt"): "model.int8-trt.onnx",
    }
    assert set(kept_files(folders)) == {"fp32", "int8-trt"}


@pytest.mark.parametrize("replaces", [True, False])
def test_a_trained_file_is_measured_and_shipped_in_place_of_the_calibrated_one(tmp_path: Path, replaces: bool) -> None:
    folders = {name: tmp_path / name for name in ("export", "quantize", "qad")}
    names = {"fp32": "model.onnx", "int8-ort": "model.int8-ort.onnx", "int8-trt": "model.int8-trt.onnx"}
    entries = [
        {**UNMEASURED, "name": name, "file": file, "kept": name != "int8-trt", "reason": ""}
        for name, file in names.items()
    ]
    write_json(folders["quantize"] / "quantize.json", entries)
    write_json(folders["qad"] / "qad.json", [entries[2] | {"kept": True, "replaces": replaces}])
    write_files(folders)
    canvas_model(folders["qad"] / "model.int8-trt.onnx", card(precision="int8-trt"))
    expected = folders["qad" if replaces else "quantize"] / "model.int8-trt.onnx"
    assert [file.path for file in measured_files(folders)][-1] == expected
    assert kept_files(folders).get("int8-trt") == (expected if replaces else None)


def test_a_measured_file_brings_what_its_gate_measured(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("export", "quantize", "qad")}
    loss = {"drop": 0.01, "standard_error": 0.001, "image_error": None, "draws": 4}
    latency = {"ratio": 0.6, "low": 0.59, "high": 0.61, "rounds": 20}
    entries = [
        {**UNMEASURED, "name": "fp32", "file": "model.onnx", "kept": True, "reason": ""},
        {
            **{"name": "int8-ort", "file": "model.int8-ort.onnx", "kept": True, "reason": ""},
            **{"loss": loss, "latency": latency},
        },
    ]
    write_json(folders["quantize"] / "quantize.json", entries)
    write_json(folders["qad"] / "qad.json", [])
    write_files(folders)
    assert measured_files(folders)[-1].loss == loss


@pytest.mark.parametrize("changes", [{"weights": "6" * 64}, {"max_det": 100}, {"weights": ""}])
def test_a_flavour_of_another_model_is_neither_measured_nor_shipped(tmp_path: Path, changes: dict[str, object]) -> None:
    folders = {name: tmp_path / name for name in ("export", "quantize", "qad")}
    write_json(folders["qad"] / "qad.json", [])
    write_files(folders, **changes)
    files = {"fp32": "model.onnx", "int8-trt": "model.int8-trt.onnx"}
    entries = [{"name": name, "file": file, "kept": True, "reason": ""} for name, file in files.items()]
    (folders["quantize"] / "quantize.json").write_text(json.dumps(entries))
    for read in (kept_files, measured_files):
        with pytest.raises(InputError, match=r"model\.int8-trt\.onnx"):
            read(folders)


@pytest.mark.parametrize(
    ("precision", "is_installed", "backend", "as_written"),
    [
        ("fp32", True, "auto", False),
        ("int8-ort", True, "onnx", False),
        ("int8-trt", True, "onnx", True),
        ("int8-openvino", True, "openvino", False),
        ("int8-openvino", False, "onnx", True),
    ],
)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_the_card_and_the_device_decide_what_runs_a_file_and_what_is_computed_as_written(
    tmp_path: Path,
    precision: str,
    is_installed: bool,
    backend: str,
    as_written: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = canvas_model(tmp_path / "model.onnx", card(precision=precision))
    monkeypatch.setattr(backends, "find_spec", lambda name: object() if is_installed or name != "openvino" else None)
    plan, note = suited(Plan([], device=device), model)
    assert (plan.backend, plan.as_written, note != "") == (backend, as_written, as_written)
    monkeypatch.setattr("compress.inputs.device_name", lambda providers: "a GPU")
    on_gpu = Plan([], device=device, backend="onnx", as_written=True)
    assert suited(on_gpu, model) == (Plan([], device=device, backend="onnx"), "")


@pytest.mark.parametrize("precision", ["fp16", "int8-trt", "int8-openvino"])
def test_a_flavour_whose_library_or_gpu_is_not_here_is_computed_as_it_is_written(
    tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch, no_openvino: None
) -> None:
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "openvino" else object())
    row = FLAVOURS[precision]
    model = canvas_model(
        tmp_path / "model.onnx", card(precision=precision, backend=row.backend, devices=row.devices)
    )  # fmt: skip
    plan, note = suited(Plan([]), model)
    assert (plan.backend, plan.as_written, note) == ("onnx", True, row.note)
    with pytest.raises(UnavailableError):
        suited(Plan([], device="tensorrt"), model)


@pytest.mark.parametrize(("precision", "has_note"), [("fp32", False), ("int8-ort", False), ("int8-openvino", True)])
def test_a_backend_that_is_named_runs_any_file_and_a_note_says_if_it_is_made_for_another(
    tmp_path: Path, precision: str, has_note: bool
) -> None:
    model = canvas_model(tmp_path / "model.onnx", card(precision=precision))
    asked = Plan([], backend="onnx")
    plan, note = suited(asked, model)
    assert (plan, note != "") == (asked, has_note)


@pytest.mark.parametrize(
    ("precision", "backend"),
    [("fp32", "auto"), ("fp16", "auto"), ("int8-trt", "auto"), ("int8-ort", "auto"), ("int8-openvino", "openvino")],
)
def test_a_file_that_was_converted_is_measured_in_what_reads_its_new_kind(
    tmp_path: Path, precision: str, backend: str
) -> None:
    openvino = pytest.importorskip("openvino")
    row = FLAVOURS.get(precision)
    made_for = {"backend": row.backend, "devices": row.devices} if row else {}
    model = canvas_model(tmp_path / "model.onnx", card(precision=precision, **made_for))
    openvino.save_model(openvino.Core().read_model(str(model)), str(tmp_path / "model.xml"))
    plan, note = suited(Plan([]), tmp_path / "model.xml")
    assert (plan.backend, plan.as_written) == (backend, False)
    assert note == ("" if precision in ("fp32", "int8-openvino") else FLAVOURS[precision].note)
    with plan.detector(tmp_path / "model.xml") as detector:
        assert detector.providers == ("OpenVINO on the CPU",)


def test_files_of_other_batches_are_not_written_beside_each_other(tmp_path: Path) -> None:
    """They would have the same names, or one call of a bundle would take other images than the next."""
    own, other = card(), card(batches=Batches(4, 4))
    canvas_model(tmp_path / "model.onnx", own)
    refuse_another_model(tmp_path, own, ("model.onnx",))
    with pytest.raises(OccupiedError, match="batches 1 instead of 4"):
        refuse_another_model(tmp_path, other, ("model.onnx",))
    other.save(tmp_path / CARD_FILE)
    with pytest.raises(OccupiedError, match="batches 1 instead of 4"):
        folder_card(tmp_path, tmp_path / "model.onnx")
