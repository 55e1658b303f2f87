from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from compress.graph.metadata import metadata_of
from compress.inspection import READERS, as_text, inspect_file
from compress.models import Architecture, YOLOv5, save_model
from runtime.backends import SUFFIXES
from runtime.card import CARD_FILE, Artifact, ModelCard
from runtime.errors import EngineError, InputError
from runtime.files import sha256
from runtime.layers import EngineLayer, TensorType, save_layers

CARD = ModelCard("part", ("bolt", "nut"), (32, 32), weights="5" * 64)


def write_onnx(path: Path, metadata: dict[str, str]) -> Path:
    """One 1x1 convolution with 12 weights and 4 biases."""
    arrays = {"weight": np.ones((4, 3, 1, 1), np.float32), "bias": np.zeros(4, np.float32)}
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight", "bias"], ["maps"])],
        "g",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, 32, 32])],
        [helper.make_tensor_value_info("maps", TensorProto.FLOAT, ["batch", 4, 32, 32])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    helper.set_model_props(model, metadata)
    onnx.save(model, path)
    return path


def write_plan(folder: Path, digest: str | None = None) -> Path:
    plan = folder / "part.fp16.plan"
    plan.write_bytes(b"serialised engine")
    made = Artifact(plan.name, digest or sha256(plan), 17, "fp16", "tensorrt_rtx", ("sm86",), {"tensorrt_rtx": "1.7"})
    ModelCard("part", ("bolt", "nut"), (32, 32), artifacts=(made,)).save(folder / CARD_FILE)
    return plan


def test_every_file_that_the_runtime_loads_can_be_inspected() -> None:
    assert set(SUFFIXES) <= set(READERS)


def test_an_onnx_file_is_described_by_its_tensors_operators_and_card(tmp_path: Path) -> None:
    path = write_onnx(tmp_path / "model.onnx", metadata_of(CARD))
    found = inspect_file(path)
    assert (found["file"], found["bytes"], found["sha256"]) == (str(path), path.stat().st_size, sha256(path))
    assert found["opset"] == {"ai.onnx": 19}
    assert found["inputs"] == {"images": "float [batch, 3, 32, 32]"}
    assert found["outputs"] == {"maps": "float [batch, 4, 32, 32]"}
    assert (found["parameters"], found["operators"]) == (16, {"Conv": 1})
    assert found["card"] == CARD.to_dict()
    assert found["card"]["identity"] == CARD.identity
    assert found["metadata"] == {"names": "{0: 'bolt', 1: 'nut'}", "stride": "32"}


def test_an_onnx_file_of_other_origin_has_no_card(tmp_path: Path) -> None:
    found = inspect_file(write_onnx(tmp_path / "model.onnx", {"author": "someone"}))
    assert (found["card"], found["metadata"]) == (None, {"author": "someone"})


def test_a_checkpoint_is_described_without_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    save_model(YOLOv5(Architecture.of_scale("p", ("bolt", "nut"))), path, {})
    found = inspect_file(path)
    assert found["bytes"] == path.stat().st_size
    assert "bolt" in as_text(found)
    assert len(found["weights"]) == 64


@pytest.mark.parametrize(("digest", "intact"), [(None, True), ("0" * 64, False)])
def test_a_plan_is_described_by_the_card_beside_it_and_an_altered_one_is_not_intact(
    tmp_path: Path, digest: str | None, intact: bool
) -> None:
    found = inspect_file(write_plan(tmp_path, digest))
    assert (found["intact"], found["precision"], found["targets"]) == (intact, "fp16", ["sm86"])
    assert found["card"]["names"] == ["bolt", "nut"]
    assert "artifacts" not in found["card"]


def test_the_layers_of_a_plan_are_listed_a_line_each(tmp_path: Path) -> None:
    plan = write_plan(tmp_path)
    half, small = TensorType("Half", (1, 8, 80, 80)), TensorType("Half", (1, 8, 40, 40))
    layer = EngineLayer("CorrSilu", "correlation", ("stem", "stem.silu"), (half,), (small,))
    save_layers(plan, sha256(plan), [layer, layer])
    found = inspect_file(plan)
    assert (found["convolutions"], found["moved_bytes"]) == ({"Half -> Half": 2}, 256_000)
    line = (
        "  name: CorrSilu; kind: correlation; inputs: Half [1,8,80,80]; outputs: Half [1,8,40,40]; "
        "moved_bytes: 128000; operators: stem, stem.silu"
    )
    assert as_text(found).splitlines().count(line) == 2


def test_a_plan_that_no_card_lists_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "other.plan").write_bytes(b"serialised engine")
    with pytest.raises(EngineError, match=CARD_FILE):
        inspect_file(tmp_path / "other.plan")


@pytest.mark.parametrize("of_file", [True, False], ids=["card file", "folder"])
def test_a_bundle_is_described_by_its_card(tmp_path: Path, of_file: bool) -> None:
    write_plan(tmp_path)
    found = inspect_file(tmp_path / CARD_FILE if of_file else tmp_path)
    assert [entry["file"] for entry in found["card"]["artifacts"]] == ["part.fp16.plan"]


@pytest.mark.parametrize("name", ["notes.txt", "noted"])
def test_a_file_of_another_kind_is_one_line_with_the_known_kinds(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(InputError, match=r"cannot tell what .*Known: \.pt") as caught:
        inspect_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        inspect_file(tmp_path / "absent.onnx")


@pytest.mark.parametrize(
    ("description", "text"),
    [
        ({"a": 1, "b": {"c": [2, 3]}}, "a: 1\nb:\n  c: [2, 3]"),
        ({"files": [{"name": "x"}, {"name": "y"}]}, "files:\n  name: x\n  name: y"),
        ({"empty": {}, "none": None}, "empty: {}\nnone: None"),
    ],
    ids=["nested", "list of groups", "empty"],
)
def test_text_is_indented_by_depth(description: dict[str, Any], text: str) -> None:
    assert as_text(description) == text
