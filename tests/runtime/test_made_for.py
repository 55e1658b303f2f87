"""A file that is made for one library or GPU says so in its card, and opens nowhere else unless the caller wants it."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from runtime import backends, engine
from runtime.__main__ import main
from runtime.bundle import folder_card, model_files
from runtime.card import Artifact
from runtime.detector import Detector
from runtime.errors import UnavailableError, UsageError
from runtime.files import sha256

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="openvino is not installed")
OPENVINO = {"precision": "int8-openvino", "backend": "openvino", "devices": ("cpu",)}
ONNX = {"precision": "int8-ort", "backend": "onnx", "devices": ("cpu",)}
GPU = {"precision": "fp16", "devices": ("cuda", "tensorrt")}
TENSORRT = {"precision": "int8-trt", "devices": ("tensorrt",)}


@needs_openvino
def test_a_lone_file_opens_in_the_backend_that_it_is_made_for_unless_another_is_named(toys, tmp_path):
    path = toys.canvas_model(tmp_path / "a.onnx", toys.card(**OPENVINO))
    other = toys.canvas_model(tmp_path / "b.onnx", toys.card(**ONNX))
    for file, options, provider in (
        (path, {}, "OpenVINO on the CPU"),
        (path, {"device": "cpu"}, "OpenVINO on the CPU"),
        (path, {"backend": "onnx"}, "CPUExecutionProvider"),
        (other, {}, "CPUExecutionProvider"),
        (other, {"backend": "openvino"}, "OpenVINO on the CPU"),
    ):
        with Detector.load(file, **options) as detector:
            assert detector.providers == (provider,)


@pytest.mark.parametrize("options", [{}, {"device": "cpu"}])
def test_without_its_library_the_error_names_the_extra_and_the_backend_that_runs_it_all_the_same(
    toys, tmp_path, monkeypatch, no_openvino, options
):
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "openvino" else object())
    path = toys.canvas_model(tmp_path / "a.onnx", toys.card(**OPENVINO))
    with pytest.raises(UnavailableError) as caught:
        Detector.load(path, **options)
    assert caught.value.message == "a.onnx is made for openvino on cpu: openvino is not installed"
    extra = "pip install 'edgestill[openvino]', or openvino"
    assert caught.value.hint == f"{extra}, or name the backend, onnx, to run it all the same"
    Detector.load(path, backend="onnx", **options).close()


@pytest.mark.parametrize(("made_for", "devices"), [(GPU, "cuda or tensorrt"), (TENSORRT, "tensorrt")])
def test_a_file_for_gpus_is_not_run_by_a_cpu_unless_that_is_named(toys, tmp_path, made_for, devices):
    path = toys.canvas_model(tmp_path / "a.onnx", toys.card(**made_for))
    with pytest.raises(
        UnavailableError, match=f"made for onnx on {devices}: .*--device cpu, or name the backend, onnx"
    ):
        Detector.load(path)
    for options in ({"device": "cpu"}, {"backend": "onnx"}):
        Detector.load(path, **options).close()


def bundle_of(folder: Path, toys, *cards) -> Path:
    made = []
    for card in cards:
        file = toys.canvas_model(folder / f"{card.precision}.onnx", card)
        made.append(
            Artifact(file.name, sha256(file), file.stat().st_size, card.precision, "onnx", devices=card.devices)
        )
    toys.card(artifacts=tuple(made)).save(folder / "model.json")
    return folder


@pytest.mark.parametrize(
    ("device", "reason"),
    [("cpu", "a file for cuda or tensorrt, device is cpu"), ("auto", "fp16.onnx is made for onnx")],
)
def test_a_bundle_passes_over_its_files_for_other_hardware(toys, tmp_path, device, reason):
    bundle = bundle_of(tmp_path, toys, toys.card(**GPU), toys.card())
    with Detector.load(bundle, device=device) as detector:
        assert detector.artifact.file == "fp32.onnx"
        ((file, told),) = detector.skipped
    assert (file, told.startswith(reason)) == ("fp16.onnx", True)


def test_an_int8_file_for_cpus_stays_on_the_cpu_where_onnx_runtime_has_cuda(toys, tmp_path, monkeypatch):
    from runtime.backends import onnx

    asked = []
    monkeypatch.setattr(onnx, "choose_providers", lambda device, _: asked.append(device) or onnx.PROVIDERS["cpu"])
    for card in (toys.card(**ONNX), toys.card()):
        Detector.load(toys.canvas_model(tmp_path / "a.onnx", card)).close()
    assert asked == ["cpu", "auto"]
    bundle = bundle_of(tmp_path, toys, toys.card(**ONNX), toys.card())
    with Detector.load(bundle, device="cuda") as detector:
        assert detector.skipped == [("int8-ort.onnx", "a file for cpu, device is cuda")]


@pytest.mark.parametrize("made_for", [OPENVINO, ONNX])
def test_no_plan_is_built_from_a_file_for_cpus(toys, tmp_path, monkeypatch, capsys, made_for):
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    monkeypatch.setattr(engine, "_build_in_child", lambda *_: pytest.fail("built"))
    path = toys.canvas_model(tmp_path / "a.onnx", toys.card(**made_for))
    with pytest.raises(UsageError, match=r"a\.onnx is made for cpu"):
        engine.build_engine(path, tmp_path / "a.plan")
    assert main(["build", str(path)]) == 2
    assert "Build model.fp16.onnx" in capsys.readouterr().err


@needs_openvino
def test_a_file_that_was_converted_runs_where_its_new_kind_runs(toys, tmp_path):
    """`ovc` copies the card: the words of the ONNX file are not those of the IR file."""
    import openvino

    for card in (toys.card(**ONNX), toys.card(**GPU)):
        path = toys.canvas_model(tmp_path / "a.onnx", card)
        openvino.save_model(openvino.Core().read_model(str(path)), str(tmp_path / "a.xml"), compress_to_fp16=False)
        with Detector.load(tmp_path / "a.xml") as detector:
            assert detector.providers == ("OpenVINO on the CPU",)


def test_a_card_that_is_made_for_nothing_is_written_as_before(toys):
    assert not {"backend", "devices"} & set(toys.card().to_dict())
    assert toys.card(**OPENVINO).identity == toys.card().identity


def test_a_folder_of_plans_does_not_take_over_what_its_first_file_is_made_for(toys, tmp_path):
    model = toys.canvas_model(tmp_path / "a.onnx", toys.card(**TENSORRT))
    assert folder_card(tmp_path / "plans", model) == toys.card(precision="int8-trt")
    (tmp_path / "plans").mkdir()
    shutil.copy(model, tmp_path / "plans")
    file = tmp_path / "plans" / model.name
    made = Artifact(file.name, sha256(file), file.stat().st_size, "int8-trt", "onnx")
    engine.list_plans(tmp_path / "plans", model, [made])
    (listed,) = model_files(tmp_path / "plans")
    assert listed.devices == ()
