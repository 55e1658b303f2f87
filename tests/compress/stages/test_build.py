from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import compress.stages.build as stage
from compress.config import BuildConfig
from compress.graph.metadata import metadata_of
from compress.stages.build import build
from runtime.card import Artifact, ModelCard
from runtime.errors import EdgestillError, InputError, UnavailableError
from runtime.files import sha256

NAMES = ("bolt", "nut")
CARD = ModelCard("part", NAMES, (32, 32))


def write_model(path: Path, precision: str = "fp32", names: tuple[str, ...] = NAMES) -> Path:
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
    card = ModelCard("part", names, (32, 32), precision=precision)
    helper.set_model_props(model, metadata_of(card))
    onnx.save(model, path)
    return path


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / f"{name}.onnx", name) for name in ("fp32", "fp16")}


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_plans_are_built_ahead_of_time_and_described_by_model_json(models, tmp_path):
    first = Artifact("model.onnx", "0" * 64, 1, "fp32", "onnx")
    config = BuildConfig(backend="tensorrt_rtx")
    lines: list[str] = []
    out = tmp_path / "plans"
    plans = build(
        config, models=models, out=out, card=ModelCard("part", NAMES, (32, 32), artifacts=(first,)), log=lines.append
    )
    card = ModelCard.load(out)
    assert [artifact.precision for artifact in card.artifacts] == ["fp16", "fp32", "fp32"]
    assert card.artifacts[-1] == first
    for plan, artifact in zip(plans, card.artifacts, strict=False):
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
        build(config, models=models, out=tmp_path / "plans", card=CARD, log=lambda _: None)
    assert not list((tmp_path / "plans").glob("*"))


def no_tensorrt(*_: Any, **__: Any) -> Any:
    raise UnavailableError("no TensorRT is installed", "pip install edgestill[rtx]")


def test_without_tensorrt_auto_skips_and_says_what_to_install(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    lines: list[str] = []
    plans = build(BuildConfig(), models=models, out=tmp_path / "plans", card=CARD, log=lines.append)
    assert [plan.artifact for plan in plans] == [None, None]
    assert all("skipped: no TensorRT is installed. pip install edgestill[rtx]" in line for line in lines)
    assert ModelCard.load(tmp_path / "plans") == CARD


def test_without_tensorrt_a_named_backend_fails(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    with pytest.raises(UnavailableError):
        build(BuildConfig(backend="tensorrt"), models=models, out=tmp_path / "plans", card=CARD)


def test_backend_none_builds_nothing(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", lambda *_, **__: pytest.fail("built"))
    plans = build(BuildConfig(backend="none"), models=models, out=tmp_path, card=CARD, log=lambda _: None)
    assert {plan.skipped for plan in plans} == {"skipped: the backend is none"}


def test_only_precisions_that_passed_their_gate_are_built(models, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "build_engine", no_tensorrt)
    config = BuildConfig(precisions=("fp32", "int8-trt"))
    plans = build(config, models=models, out=tmp_path, card=CARD, log=lambda _: None)
    assert [plan.precision for plan in plans] == ["fp32"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"precision": "fp16"}, "has precision 'fp16', expected 'fp32'"), ({"names": ("a", "b")}, "has names")],
)
def test_a_file_that_is_not_this_model_is_one_line(tmp_path, given, reason):
    path = write_model(tmp_path / "other.onnx", **given)
    with pytest.raises(InputError, match=reason):
        build(BuildConfig(), models={"fp32": path}, out=tmp_path, card=CARD)


def test_onnx_of_another_kind_is_one_line(tmp_path):
    path = tmp_path / "page.onnx"
    path.write_text("<html>not found</html>")
    with pytest.raises(InputError, match="not an ONNX model"):
        build(BuildConfig(), models={"fp32": path}, out=tmp_path, card=CARD)
