from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import compress.stages.build as stage
from compress.cli import main
from compress.config import BuildConfig, ExportConfig
from compress.graph.fp16 import body_to_fp16
from compress.graph.metadata import metadata_of, write_card
from compress.models import Architecture, YOLOv5, save_model
from compress.stages.build import Inputs, build, by_precision, require_open_batches
from compress.stages.export import export
from runtime.bundle import card_of, model_files, problems
from runtime.card import Artifact, Batches, ModelCard
from runtime.engine import BuildReport
from runtime.errors import EdgestillError, InputError, UnavailableError, UsageError
from runtime.files import sha256
from runtime.identity import OccupiedError
from runtime.layers import EngineLayer, TensorType, save_layers

NAMES = ("bolt", "nut")
CARD = ModelCard("part", NAMES, (32, 32), weights="5" * 64)


def write_model(path: Path, precision: str = "fp32", **changes: Any) -> Path:
    """A graph with one convolution that carries a card."""
    nodes = [
        helper.make_node("Cast", ["canvas"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["nchw"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["nchw", "weight"], ["detections"]),
    ]
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("canvas", TensorProto.UINT8, [1, 32, 32, 3])],
            [helper.make_tensor_value_info("detections", TensorProto.FLOAT, [1, 4, 32, 32])],
            [numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "weight")],
        ),
        opset_imports=[helper.make_opsetid("", 19)],
        ir_version=9,
    )
    helper.set_model_props(model, metadata_of(replace(CARD, precision=precision, **changes)))
    onnx.save(model, path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / f"{name}.onnx", name) for name in ("fp32", "fp16")}


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_plans_are_built_ahead_of_time_and_described_by_model_json(models, tmp_path):
    config = BuildConfig(backend="tensorrt_rtx")
    lines: list[str] = []
    out = tmp_path / "plans"
    plans = build(config, models=models, out=out, log=lines.append)
    card = ModelCard.load(out)
    assert [artifact.precision for artifact in card.artifacts] == ["fp16", "fp32"]
    for plan, artifact in zip(plans, card.artifacts, strict=True):
        assert plan.artifact == artifact
        assert artifact.sha256 == sha256(out / artifact.file)
        assert artifact.bytes == (out / artifact.file).stat().st_size
        assert (artifact.backend, artifact.targets) == ("tensorrt_rtx", ("sm86", "sm89", "sm120"))
        assert artifact.versions
    assert all("sm86, sm89, sm120" in line for line in lines)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_a_target_that_does_not_exist_is_one_line_and_leaves_no_plan(models, tmp_path):
    config = BuildConfig(backend="tensorrt_rtx", targets=("sm86", "sm11"))
    with pytest.raises(EdgestillError, match="sm11"):
        build(config, models=models, out=tmp_path / "plans", log=lambda _: None)
    assert not list((tmp_path / "plans").glob("*"))


def no_tensorrt(*_: Any, **__: Any) -> Any:
    raise UnavailableError("no TensorRT is installed", "pip install edgestill[rtx]")


def test_without_tensorrt_auto_skips_and_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    lines: list[str] = []
    plans = build(BuildConfig(), models=models, out=tmp_path / "plans", log=lines.append)
    assert [plan.artifact for plan in plans] == [None, None]
    assert all("skipped: no TensorRT is installed. pip install edgestill[rtx]" in line for line in lines)
    assert ModelCard.load(tmp_path / "plans") == CARD


def test_without_tensorrt_a_named_backend_fails(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    with pytest.raises(UnavailableError):
        build(BuildConfig(backend="tensorrt"), models=models, out=tmp_path / "plans")


def test_backend_none_builds_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", lambda *_, **__: pytest.fail("built"))
    plans = build(BuildConfig(backend="none"), models=models, out=tmp_path, log=lambda _: None)
    assert {plan.skipped for plan in plans} == {"skipped: the backend is none"}


def test_only_precisions_that_passed_their_gate_are_built(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    config = BuildConfig(precisions=("fp32", "int8-trt"))
    plans = build(config, models=models, out=tmp_path, log=lambda _: None)
    assert [plan.precision for plan in plans] == ["fp32"]


def test_tensorrt_rtx_gets_no_int8_plan_and_the_log_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", fake_build)
    monkeypatch.setattr(stage, "resolve_backend", lambda backend: "tensorrt_rtx" if backend == "auto" else backend)
    lines = []
    for backend in ("auto", "tensorrt"):
        models = {name: write_model(tmp_path / f"model.{name}.onnx", name) for name in ("fp16", "int8-trt")}
        config = BuildConfig(backend=backend, precisions=("fp16", "int8-trt"))
        plans = build(config, models=models, out=tmp_path / backend, log=lines.append)
        assert [plan.artifact is not None for plan in plans] == [True, backend == "tensorrt"]
    assert "int8-trt: skipped: TensorRT-RTX fuses no INT8 convolution with its activation" in lines[1]


@pytest.mark.parametrize("commands", [(("fp16", "int8-trt"),), (("fp16",), ("int8-trt",)), (("int8-trt",), ("fp16",))])
def test_an_int8_plan_that_moves_more_than_fp16_is_left_out_with_the_reason(tmp_path, monkeypatch, commands):
    """Whether both are built by one command or by two, in either order."""
    types = {"fp16": ("Half", "Half"), "int8-trt": ("Int8", "Float")}

    def build_engine(model: Path, target: Path, **_: Any) -> BuildReport:
        read, written = (TensorType(name, (1, 500_000)) for name in types[card_of(model).precision])
        layers = (EngineLayer("c", "CaskConvolution", (), (read,), (written,)),)
        report = replace(fake_build(model, target), backend="tensorrt", layers=layers)
        save_layers(target, report.sha256, layers)
        return report

    monkeypatch.setattr(stage, "build_engine", build_engine)
    monkeypatch.setattr(stage, "resolve_backend", lambda _: "tensorrt")
    models = {name: write_model(tmp_path / f"model.{name}.onnx", name) for name in types}
    lines: list[str] = []
    plans = [
        plan
        for names in commands
        for plan in build(
            BuildConfig(), models={name: models[name] for name in names}, out=tmp_path / "out", log=lines.append
        )
    ]
    reason = "its INT8 moves 2.5 MB a call, FP16 moves 2.0"
    assert lines[-1] in (
        f"int8-trt: left out: {reason}", f"part.int8-trt.plan, of an earlier build, is removed: {reason}"
    )  # fmt: skip
    (listed,) = ModelCard.load(tmp_path / "out").artifacts
    assert listed.precision == "fp16"
    assert not list((tmp_path / "out").glob("*int8*"))
    if commands[0] != ("int8-trt",):
        assert [plan.to_json()["moved_bytes"] for plan in plans] == [2_000_000, None]


def fake_build(model: Path, target: Path, **_: Any) -> BuildReport:
    """A plan whose bytes are those of its ONNX file."""
    target.parent.mkdir(exist_ok=True)
    target.write_bytes(model.read_bytes())
    return BuildReport("tensorrt_rtx", {}, 0.1, target.stat().st_size, sha256(target), ("sm86",), ())


def test_two_models_in_one_build_are_refused_before_anything_is_built(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", lambda *_, **__: pytest.fail("built"))
    mine = write_model(tmp_path / "mine.onnx")
    for name, changes in {
        "weights": {"weights": "6" * 64},
        "iou": {"iou": 0.45},
        "names": {"names": ("a", "b")},
    }.items():
        for precision in ("fp32", "fp16"):
            other = write_model(tmp_path / f"{name}.{precision}.onnx", precision, **changes)
            with pytest.raises(InputError, match=f"{other} is another model than {mine}: .*{name}"):
                by_precision([mine, other])
        with pytest.raises(InputError, match="another model"):
            build(BuildConfig(), models={"fp32": mine, "fp16": other}, out=tmp_path / "plans")
    assert not (tmp_path / "plans").exists()


def test_files_of_two_unknown_models_are_refused(tmp_path):
    files = [write_model(tmp_path / f"{precision}.onnx", precision, weights="") for precision in ("fp32", "fp16")]
    with pytest.raises(InputError, match="has no identity"):
        by_precision(files)
    assert by_precision(files[:1]).models == {"fp32": files[0]}


def test_two_calibrations_of_one_precision_are_refused_and_the_same_file_twice_is_not(tmp_path):
    first = write_model(tmp_path / "a.onnx", "int8-trt")
    second = write_model(tmp_path / "b.onnx", "int8-trt", provenance={"calibration": 2})
    with pytest.raises(UsageError, match="both int8-trt"):
        by_precision([first, second])
    assert by_precision([first, first]).models == {"int8-trt": first}


def test_a_second_build_adds_to_the_card_of_the_first(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", fake_build)
    out = tmp_path / "plans"
    for precision in ("fp16", "fp32", "fp16"):
        build(BuildConfig(), models={precision: models[precision]}, out=out, log=lambda _: None)
    card = ModelCard.load(out)
    assert [artifact.file for artifact in card.artifacts] == ["part.fp16.plan", "part.fp32.plan"]
    assert {artifact.identity for artifact in card.artifacts} == {CARD.identity}
    assert [problem for file in model_files(out) for problem in problems(file)] == []


def test_a_build_into_a_bundle_keeps_what_it_offers(models, tmp_path, monkeypatch):
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    file = write_model(bundle / "model.onnx")
    offered = Artifact(file.name, sha256(file), file.stat().st_size, "fp32", "onnx")
    replace(CARD, name="bundled", artifacts=(offered,)).save(bundle / "model.json")
    monkeypatch.setattr(stage, "build_engine", fake_build)
    build(BuildConfig(), models=models, out=bundle, log=lambda _: None)
    card = ModelCard.load(bundle)
    assert [item.file for item in card.artifacts] == ["bundled.fp16.plan", "bundled.fp32.plan", "model.onnx"]
    assert card.artifacts[-1] == offered


@pytest.mark.parametrize("changes", [{"weights": "6" * 64}, {"iou": 0.45}, {"max_det": 100}, {"weights": ""}])
def test_the_folder_of_another_model_is_refused(models, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(stage, "build_engine", lambda *_, **__: pytest.fail("built"))
    replace(CARD, **changes).save(tmp_path / "model.json")
    with pytest.raises(OccupiedError, match=r"model\.json"):
        build(BuildConfig(), models=models, out=tmp_path)


def test_a_file_of_another_precision_is_one_line(models, tmp_path):
    with pytest.raises(InputError, match="has precision 'fp16', expected 'fp32'"):
        build(BuildConfig(), models={"fp32": models["fp16"]}, out=tmp_path)


def test_onnx_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "page.onnx"
    path.write_text("<html>not found</html>")
    with pytest.raises(InputError, match="not an ONNX file"):
        build(BuildConfig(), models={"fp32": path}, out=tmp_path)


OPEN = Batches(1, None)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_model(YOLOv5(Architecture.of_scale("p", NAMES)), path, {})
    return path


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"batch": 2}, (2, 2)), ({"dynamic": True}, (1, 8)), ({"dynamic": True, "frame": (108, 192)}, (1, 8))],
    ids=["fixed", "open", "open frames"],
)
def test_rectangular_batches_build_with_nms_inside(student, tmp_path, settings, expected):
    """In the precisions that a GPU uses, the conventional file, too."""
    export(
        ExportConfig(imgsz=(64, 96), **settings), model=student, out=tmp_path, imgsz=64, log=lambda _: None
    )  # fmt: skip
    half = body_to_fp16(onnx.load(tmp_path / "model.onnx"))
    write_card(half, replace(card_of(tmp_path / "model.onnx"), precision="fp16"))
    onnx.save(half, tmp_path / "model.fp16.onnx")
    config = BuildConfig(backend="tensorrt_rtx", targets=("sm86",))
    lines: list[str] = []
    for models, out in (
        ({"fp32": tmp_path / "model.onnx", "fp16": tmp_path / "model.fp16.onnx"}, tmp_path / "boxes"),
        ({"fp32": tmp_path / "model.yolov5.onnx"}, tmp_path / "rows"),
    ):
        build(config, models=models, out=out, log=lines.append)
        card = ModelCard.load(out)
        assert [artifact.batches for artifact in card.artifacts] == [expected] * len(models)
        assert [file.card.batches for file in model_files(out)] == [expected] * len(models)
        assert card.size_hw == (64, 96)
        assert not [problem for file in model_files(out) for problem in problems(file)]
    assert all(f"batch {Batches(*expected)}" in line for line in lines)


def test_a_profile_given_for_a_file_of_fixed_batch_is_refused(tmp_path):
    require_open_batches(Inputs({"fp32": write_model(tmp_path / "open.onnx", batches=OPEN)}))
    model = write_model(tmp_path / "model.onnx", batches=Batches(4, 4))
    with pytest.raises(UsageError, match=r"model\.onnx takes 4 in one call"):
        require_open_batches(Inputs({"fp32": model}))
    for given in (["--batches", "1,2,4"], ["--set", "batches=1,2,4"]):
        with pytest.raises(SystemExit) as caught:
            main(["build", "--model", str(model), "--out", str(tmp_path / "plans"), *given])
        assert caught.value.code == 2


def test_the_profile_of_an_open_batch_is_that_of_the_settings(tmp_path, monkeypatch):
    seen = []

    def note(*_: Any, shapes: Any, **__: Any) -> Any:
        seen.append(shapes)
        return no_tensorrt()

    monkeypatch.setattr(stage, "build_engine", note)
    for batches in (OPEN, Batches(4, 4)):
        model = write_model(tmp_path / "model.onnx", batches=batches)
        build(
            BuildConfig(batches=(2, 3, 5)),
            models={"fp32": model},
            out=tmp_path / f"plans{batches.most}",
            log=lambda _: None,
        )
    assert seen == [{"canvas": ((2, 32, 32, 3), (3, 32, 32, 3), (5, 32, 32, 3))}, {}]
