from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from pydantic import ValidationError

from benchmarks.bench import Plan
from benchmarks.latency import LatencyRatio
from compress.config import QuantizeConfig
from compress.flavours import FLAVOURS, Flavour
from compress.gate import FileGate, Loss, spread
from compress.graph.assemble import boxes_graph, yolov5_graph
from compress.graph.metadata import metadata_of, opset_of, read_card, write_card
from compress.graph.network import trace
from compress.graph.nms import NmsShape
from compress.graph.parts import GraphParts
from compress.graph.placement import layer_name
from compress.graph.session import open_session
from compress.models import Architecture, YOLOv5
from compress.stages.export import RawMaps, head_shape
from compress.stages.quantize import quantize
from runtime import backends
from runtime.card import Artifact, Batches, ModelCard
from runtime.detector import Detector
from runtime.errors import EdgestillError, InputError
from runtime.identity import OccupiedError
from runtime.image import read_image

SIZE = 160
OPENVINO = FLAVOURS["int8-openvino"].is_run_here
CONFIG = QuantizeConfig(calibration_images=4, draws=2, float_layers=0, method="minmax")
"""Every flavour, as it is."""


@pytest.fixture(scope="module")
def graphs() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", ("bolt", "nut"))).eval()
    for conv in network.detect.m:
        torch.nn.init.normal_(conv.weight, 0, 2.0)
    traced, head = trace(RawMaps(network.fuse()), (SIZE, SIZE)), head_shape(network, (SIZE, SIZE))
    card = ModelCard("part", ("bolt", "nut"), (SIZE, SIZE), candidates=300, nms_iterations=8, weights="5" * 64)
    rows = ModelCard("part", ("bolt", "nut"), (SIZE, SIZE), input="tensor", output="rows")
    return (
        boxes_graph(traced, head, NmsShape(0.6, 300, 300, 8), opset=19, metadata=metadata_of(card)),
        yolov5_graph(traced, head, opset=19, metadata=metadata_of(rows)),
    )


@pytest.fixture(scope="module")
def model(graphs: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp32") / "model.onnx"
    onnx.save(graphs[0], path)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"{index:02}.png" for index in range(10)]
    for path in paths:
        cv2.imwrite(str(path), cv2.resize(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8), (200, 150)))
    return paths


class FixedGate:
    """Accuracy by precision, else 0.5, a number or one for each call; every group of images left out has `spread` more
    or less. Every other file takes `ratios` times the reference's time, round by round."""

    def __init__(self, maps: Mapping[str, Any], ratios: Sequence[float], spread: float = 0.0) -> None:
        self.figures = {name: cycle([value] if isinstance(value, float) else value) for name, value in maps.items()}
        self.ratios, self.spread = ratios, spread
        self.timed: list[str] = []

    def maps(self, path: Path, flavour: Flavour | None = None) -> np.ndarray:
        precision = read_card(onnx.load(path), path.name).precision
        assert precision == (flavour.name if flavour else "fp32")
        figure = next(self.figures.get(precision, cycle([0.5])))
        return figure + self.spread * np.array([0, 1, -1] if precision != "fp32" else [0, 0, 0])

    def latency(self, reference: Path, other: Path, flavour: Flavour) -> LatencyRatio:
        self.timed.append(read_card(onnx.load(other), other.name).precision)
        assert self.timed[-1] == flavour.name
        low, middle, high = np.percentile(self.ratios, (2.5, 50, 97.5))
        return LatencyRatio(middle, low, high, tuple(self.ratios))


def replace_config(**changes: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate({**CONFIG.model_dump(), **changes})


SLOWER, FASTER, SCATTERED = [1.2] * 20, [0.8] * 20, [0.8, 1.25] * 10


def run(
    config: QuantizeConfig,
    model: Path,
    images: list[Path],
    out: Path,
    maps: Mapping[str, Any],
    ratios: Sequence[float] = SLOWER,
    spread: float = 0.0,
) -> Any:
    lines: list[str] = []
    gate = FixedGate(maps, ratios, spread)
    made = quantize(config, model=model, images=images, out=out, gate=gate, log=lines.append)
    local = {name for name, flavour in FLAVOURS.items() if flavour.is_run_here}
    assert set(gate.timed) <= local, "latency here counts for no other flavour"
    return {judged.name: judged for judged in made}, lines


@pytest.fixture(scope="module")
def flavours(model: Path, images: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("flavours")
    return run(CONFIG, model, images, out, {"int8-trt": 0.47, "fp16": 0.485})


def test_each_file_says_what_it_is_made_for_and_is_the_same_model_all_the_same(flavours):
    cards = {name: read_card(onnx.load(judged.path), name) for name, judged in flavours[0].items()}
    assert {name: (card.backend, card.devices) for name, card in cards.items()} == {
        "fp32": ("", ()),
        "fp16": ("", ("cuda", "tensorrt")),
        "int8-trt": ("", ("tensorrt",)),
        "int8-openvino": ("openvino", ("cpu",)),
        "int8-ort": ("onnx", ("cpu",)),
    }
    assert {card.identity for card in cards.values()} == {cards["fp32"].identity}


def test_the_gate_is_the_measured_drop(flavours):
    found, lines = flavours
    assert {name: flavour.kept for name, flavour in found.items()} == {
        "fp32": True, "fp16": True, "int8-trt": False, "int8-openvino": not OPENVINO, "int8-ort": False,
    }  # fmt: skip
    assert found["int8-trt"].loss.drop == pytest.approx(0.03)
    assert "more than 0.02" in found["int8-trt"].reason
    assert any("int8-trt" in line and "left out" in line for line in lines)


def test_latency_on_this_cpu_counts_only_for_flavours_that_run_on_it(flavours):
    assert flavours[0]["fp16"].kept
    assert flavours[0]["fp16"].latency is None
    assert flavours[0]["int8-ort"].latency.ratio == 1.2


def test_a_flavour_is_judged_in_its_own_library_and_the_verdict_says_so(model, images, tmp_path, monkeypatch):
    config = replace_config(flavours=("int8-ort", "int8-openvino"))
    monkeypatch.setattr(backends, "find_spec", lambda name: object())
    found, _ = run(config, model, images, tmp_path, {}, FASTER)
    for name, library in (("int8-ort", "onnxruntime"), ("int8-openvino", "openvino")):
        assert found[name].reason.startswith(f"loses +0.0000 ± 0.0000 mAP50-95 (2 draws) in {library}, within 0.02")
        assert found[name].latency.ratio == 0.8


def test_without_its_library_a_flavour_is_judged_as_it_is_written_and_not_timed(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == "openvino" else object())
    found, _ = run(replace_config(flavours=("int8-openvino",)), model, images, tmp_path, {})
    assert "computed as it is written, as openvino is not installed, within 0.02" in found["int8-openvino"].reason
    assert (found["int8-openvino"].kept, found["int8-openvino"].latency) == (True, None)


@pytest.mark.skipif(not OPENVINO, reason="openvino is not installed")
def test_the_gate_measures_each_file_in_the_library_that_ships_it(model, images, tmp_path):
    config = replace_config(flavours=("int8-ort", "int8-openvino", "int8-trt"), max_map_drop=1, max_latency_ratio=1000)
    truth = {
        "images": [{"id": number, "width": 200, "height": 150} for number in range(2)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(("bolt", "nut"))],
        "annotations": [
            {"id": 1 + number, "image_id": number, "category_id": 0, "bbox": [5, 5, 30, 30], "area": 900, "iscrowd": 0}
            for number in range(2)
        ],
    }
    plan = Plan(list(enumerate(images[:2])), truth, samples=80, warmup_ms=1, device="cpu", threads=1)
    judged = quantize(
        config, model=model, images=images, out=tmp_path, gate=FileGate(plan), log=lambda _: None
    )  # fmt: skip
    timed = {file.name: file.latency is not None for file in judged if file.kept}
    assert timed == {"fp32": False, "int8-ort": True, "int8-openvino": True, "int8-trt": False}


@pytest.mark.parametrize(
    ("ratios", "kept", "reason"),
    [
        (SLOWER, False, "1.200 (95 % interval 1.200 to 1.200, n = 20 rounds), above the limit 1"),
        (FASTER, True, "n = 20 rounds), below the limit 1"),
        (SCATTERED, True, "n = 20 rounds), inconclusive as the rounds disagree; the limit is 1"),
    ],
    ids=["slower", "faster", "inconclusive"],
)
def test_only_a_flavour_that_is_clearly_slower_than_fp32_is_left_out(model, images, tmp_path, ratios, kept, reason):
    config = replace_config(flavours=("int8-ort",))
    found, lines = run(config, model, images, tmp_path, {}, ratios)
    assert found["int8-ort"].kept is kept
    assert found["int8-ort"].reason.endswith(reason)
    assert found["int8-ort"].to_json()["latency"]["rounds"] == 20
    assert reason in lines[-1]


def test_a_flavour_that_is_out_by_its_accuracy_is_not_timed(model, images, tmp_path):
    config = replace_config(flavours=("int8-ort",))
    found, _ = run(config, model, images, tmp_path, {"int8-ort": 0.1}, FASTER)
    assert (found["int8-ort"].kept, found["int8-ort"].to_json()["latency"]) == (False, None)


def test_every_file_carries_its_precision_and_the_rest_of_the_card(flavours, model):
    reference = read_card(onnx.load(model), "")
    for name, flavour in flavours[0].items():
        card = read_card(onnx.load(flavour.path), flavour.path.name)
        assert card.precision == name
        assert (card.names, card.size_hw, card.candidates) == (reference.names, reference.size_hw, 300)


def test_calibration_is_recorded_for_int8_only(flavours):
    found = flavours[0]
    assert found["int8-trt"].calibration == found["int8-ort"].calibration
    assert found["int8-trt"].calibration["n"] == 4
    assert len(found["int8-trt"].calibration["sha256"]) == 64
    assert not found["fp16"].calibration


def test_scores_of_every_flavour_stay_alive(flavours, images):
    canvas = np.random.default_rng(3).integers(0, 256, (1, SIZE, SIZE, 3), dtype=np.uint8)
    best = {
        name: open_session(onnx.load(flavour.path)).run(None, {"canvas": canvas})[0][0, 0, 4]
        for name, flavour in flavours[0].items()
    }
    assert all(abs(score - best["fp32"]) < 0.15 for score in best.values())


@pytest.mark.parametrize("score", [float("nan"), -1.0])
def test_an_unmeasurable_or_worthless_flavour_is_left_out(model, images, tmp_path, score):
    found, _ = run(QuantizeConfig(flavours=("fp16",)), model, images, tmp_path, {"fp16": score})
    assert not found["fp16"].kept


@pytest.mark.parametrize(
    ("maps", "reason"),
    [
        ({"fp32": 0.0, "fp16": 0.0}, "FP32 itself has mAP50-95 0.0000, so no loss of more than 0.02 can be measured"),
        ({"fp32": 0.0, "fp16": 0.01}, "FP32 itself has mAP50-95 0.0000"),
        ({"fp32": float("nan"), "fp16": 0.5}, "FP32 itself has mAP50-95 nan"),
        (
            {"fp32": 0.02, "fp16": 0.019},
            "FP32 itself has mAP50-95 0.0200, so no loss of more than 0.02 can be measured",
        ),
        ({"fp32": 0.021, "fp16": 0.0}, "its mAP50-95 is 0"),
    ],
    ids=["both nothing", "FP32 nothing", "FP32 not measurable", "no more than may be lost", "nothing found"],
)
def test_no_flavour_passes_where_a_loss_cannot_be_seen(model, images, tmp_path, maps, reason):
    found, lines = run(QuantizeConfig(flavours=("fp16",)), model, images, tmp_path, maps)
    assert not found["fp16"].kept
    assert reason in found["fp16"].reason
    assert "left out" in lines[-1]


def test_a_limit_of_1_keeps_any_accuracy(model, images, tmp_path):
    config = QuantizeConfig(flavours=("fp16",), max_map_drop=1)
    found, _ = run(config, model, images, tmp_path, {"fp32": 0.0, "fp16": 0.0})
    assert found["fp16"].kept


def test_a_weight_beyond_fp16_leaves_out_fp16_and_nothing_else(graphs, images, tmp_path):
    broken = onnx.ModelProto.FromString(graphs[0].SerializeToString())
    weight = next(tensor for tensor in broken.graph.initializer if tensor.name.endswith("model.1.conv.weight"))
    array = numpy_helper.to_array(weight).copy()
    array.flat[0] = 7e4
    weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    onnx.save(broken, tmp_path / "model.onnx")
    onnx.save(broken, tmp_path / "model.fp16.onnx")  # as from an earlier calibration
    found, lines = run(CONFIG, tmp_path / "model.onnx", images, tmp_path, {})
    assert {name for name, judged in found.items() if judged.path} == set(found) - {"fp16"}
    assert (found["fp16"].kept, found["fp16"].to_json()["file"]) == (False, None)
    assert "fp16: left out: it cannot be made: 'network.model.1.conv.weight' holds 7e+04, beyond FP16's 65504" in lines
    assert not (tmp_path / "model.fp16.onnx").exists()


def test_an_fp16_overflow_is_seen_whatever_the_map_says(graphs, images, tmp_path):
    broken = onnx.ModelProto.FromString(graphs[0].SerializeToString())
    weight = next(tensor for tensor in broken.graph.initializer if tensor.name.endswith("model.1.conv.weight"))
    array = numpy_helper.to_array(weight)
    weight.CopyFrom(numpy_helper.from_array(array / np.abs(array).max() * np.float32(6e4), weight.name))
    onnx.save(broken, tmp_path / "model.onnx")
    found, _ = run(QuantizeConfig(flavours=("fp16",)), tmp_path / "model.onnx", images, tmp_path / "out", {})
    assert not found["fp16"].kept
    assert found["fp16"].reason


def test_no_images_is_one_line(model, tmp_path):
    with pytest.raises(EdgestillError, match="no images to calibrate"):
        run(QuantizeConfig(), model, [], tmp_path, {})


def without_network(model: onnx.ModelProto) -> onnx.ModelProto:
    """Input, output and card of `model`, and nothing but zeros between."""
    nodes = [
        onnx.helper.make_node("Cast", ["canvas"], ["pixels"], to=onnx.TensorProto.FLOAT),
        onnx.helper.make_node("ReduceMean", ["pixels"], ["mean"], axes=[1, 2, 3], keepdims=0),
        onnx.helper.make_node("Mul", ["boxes", "mean"], [model.graph.output[0].name]),
    ]
    zeros = onnx.numpy_helper.from_array(np.zeros((1, 300, 6), np.float32), "boxes")
    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "empty", model.graph.input, model.graph.output[:1], [zeros]),
        opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8,
    )  # fmt: skip
    made.graph.input[0].name = "canvas"
    made.metadata_props.extend(model.metadata_props)
    return made


def test_onnx_of_another_kind_is_one_line(graphs, model, flavours, images, tmp_path):
    onnx.save(graphs[1], tmp_path / "rows.onnx")
    foreign = onnx.ModelProto.FromString(graphs[0].SerializeToString())
    del foreign.metadata_props[:]
    onnx.save(foreign, tmp_path / "foreign.onnx")
    (tmp_path / "page.onnx").write_text("<html>not found</html>")
    onnx.save(without_network(graphs[0]), tmp_path / "empty.onnx")
    cases = {
        "empty.onnx": "has no convolution, expected a network",
        "rows.onnx": "output 'rows'",
        "foreign.onnx": "no edgestill card",
        "page.onnx": "not an ONNX model",
        "absent.onnx": "cannot read",
    }
    for name, reason in cases.items():
        with pytest.raises(InputError, match=reason):
            run(QuantizeConfig(), tmp_path / name, images, tmp_path, {})
    with pytest.raises(InputError, match="is fp16"):
        run(QuantizeConfig(), flavours[0]["fp16"].path, images, tmp_path, {})


def test_calibration_images_are_spread_over_the_whole_set():
    paths = [Path(str(index)) for index in range(10)]
    assert [path.name for path in spread(paths, 4)] == ["0", "2", "5", "7"]
    assert spread(paths, 20) == paths


def test_the_same_images_give_the_same_bytes(model, images, flavours, tmp_path):
    again, _ = run(CONFIG, model, images, tmp_path, {})
    for name in FLAVOURS:
        assert again[name].path.read_bytes() == flavours[0][name].path.read_bytes(), name


def test_flavours_are_not_written_beside_those_of_another_model(model, images, tmp_path):
    """Nor those that this call would not make: they would be taken for flavours of this model."""
    source = onnx.load(model)
    other = replace(read_card(source, "model.onnx"), weights="6" * 64, precision="int8-ort")
    write_card(source, other)
    onnx.save(source, tmp_path / "model.int8-ort.onnx")
    before = (tmp_path / "model.int8-ort.onnx").read_bytes()
    for flavours in (("fp16",), ("int8-ort",)):
        with pytest.raises(OccupiedError, match="other weights"):
            run(QuantizeConfig(flavours=flavours, calibration_images=4), model, images, tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["model.int8-ort.onnx"]
    assert (tmp_path / "model.int8-ort.onnx").read_bytes() == before


def test_a_bundle_that_lists_a_flavour_by_its_hash_is_not_broken(model, images, tmp_path):
    listed = Artifact("model.fp16.onnx", "0" * 64, 1, "fp16", "onnx")
    replace(read_card(onnx.load(model), "model.onnx"), artifacts=(listed,)).save(tmp_path / "model.json")
    with pytest.raises(OccupiedError, match=r"lists model\.fp16\.onnx"):
        run(QuantizeConfig(flavours=("fp16",), calibration_images=4), model, images, tmp_path, {})


# --------------------------------------------------------------------------------------------- draws and float layers

INT8_ALONE = {"flavours": ("int8-trt",)}
"""No library of a CPU runs it, so it is not timed."""


def test_the_verdict_is_about_the_mean_of_the_draws(model, images, tmp_path):
    """The file itself, the first draw, loses 0.03, which alone would be too much."""
    config = replace_config(**INT8_ALONE, draws=4)
    found, lines = run(config, model, images, tmp_path, {"int8-trt": [0.47, 0.5, 0.49, 0.5]})
    judged = found["int8-trt"]
    assert judged.kept
    assert judged.map50_95 == 0.47
    assert judged.loss.drop == pytest.approx(0.01)
    assert judged.loss.standard_error == pytest.approx(np.std([0.03, 0, 0.01, 0], ddof=1) / 2)
    assert judged.loss.draws == 4
    assert "loses +0.0100 ± 0.0071 mAP50-95 (4 draws) computed as it is written, within 0.02" in lines[-1]


def test_a_loss_near_the_limit_is_not_resolved_by_images_that_scatter(model, images, tmp_path):
    config = replace_config(**INT8_ALONE)
    few, _ = run(config, model, images, tmp_path / "few", {"int8-trt": 0.49}, spread=0.02)
    many, _ = run(config, model, images, tmp_path / "many", {"int8-trt": 0.49}, spread=0.001)
    assert few["int8-trt"].reason.endswith("within 0.02, not resolved: too few images for this limit")
    assert many["int8-trt"].reason.endswith("within 0.02")
    assert few["int8-trt"].kept


def test_fp16_is_one_draw(model, images, tmp_path):
    found, _ = run(replace_config(flavours=("fp16",)), model, images, tmp_path, {"fp16": 0.49})
    assert (found["fp16"].loss.draws, found["fp16"].loss.standard_error) == (1, 0)
    assert found["fp16"].reason.endswith("within 0.02")


def test_one_draw_of_a_flavour_that_has_more_is_too_few(model, images, tmp_path):
    found, _ = run(replace_config(**INT8_ALONE, draws=1), model, images, tmp_path, {"int8-trt": 0.499})
    assert found["int8-trt"].loss.standard_error is None
    assert found["int8-trt"].reason.endswith(
        "(1 draw) computed as it is written, within 0.02, not resolved: too few draws for this limit"
    )


def test_layers_return_to_float_until_the_loss_is_within_its_limit(model, images, tmp_path):
    config = replace_config(**INT8_ALONE, float_layers="auto")
    maps = {"int8-trt": [0.45, 0.45, 0.47, 0.47, 0.49, 0.49]}
    found, lines = run(config, model, images, tmp_path, maps)
    judged = found["int8-trt"]
    assert judged.kept
    assert [len(step.choice.float_layers) for step in judged.steps] == [2, 4, 8]
    assert judged.float_layers == tuple(layer.name for layer in judged.ranking[:8])
    predicted = [step.predicted_error for step in judged.steps]
    assert predicted == sorted(predicted, reverse=True)
    assert ", ".join(judged.float_layers) in lines[-1]
    parts = GraphParts(onnx.load(judged.path).graph)
    in_float = {
        layer_name(node.name) for node in parts.nodes if node.op_type == "Conv" and node.input[1] in parts.initializers
    }
    assert in_float >= set(judged.float_layers)


def test_a_flavour_that_never_holds_is_left_out_with_all_its_steps(model, images, tmp_path):
    found, _ = run(replace_config(**INT8_ALONE, float_layers="auto"), model, images, tmp_path, {"int8-trt": 0.4})
    judged = found["int8-trt"]
    assert not judged.kept
    assert [len(step.choice.float_layers) for step in judged.steps] == [2, 4, 8, 16]


@pytest.mark.parametrize(
    ("maps", "tried"),
    [
        ([0.5], [("minmax", 2)]),
        ([0.4, 0.5], [("minmax", 2), ("mse", 2)]),
        ([0.4, 0.4, 0.5], [("minmax", 2), ("mse", 2), ("minmax", 4)]),
    ],
)
def test_both_methods_are_tried_before_more_layers_stay_in_float(model, images, tmp_path, maps, tried):
    config = replace_config(**INT8_ALONE, float_layers="auto", method="auto", draws=1)
    found, _ = run(config, model, images, tmp_path, {"int8-trt": maps})
    judged = found["int8-trt"]
    assert [(step.choice.method, len(step.choice.float_layers)) for step in judged.steps] == tried
    assert judged.kept
    assert judged.calibration["method"] == judged.to_json()["steps"][-1]["method"] == tried[-1][0]
    assert judged.float_layers == tuple(layer.name for layer in judged.ranking[: tried[-1][1]])
    only = replace_config(**INT8_ALONE, float_layers=judged.float_layers, method=tried[-1][0], draws=1)
    again, _ = run(only, model, images, tmp_path / "again", {"int8-trt": 0.5})
    assert again["int8-trt"].path.read_bytes() == judged.path.read_bytes()


def test_each_number_of_layers_is_timed_once_whatever_the_method(model, images, tmp_path):
    config = replace_config(flavours=("int8-ort",), float_layers=2, method="auto", draws=1)
    found, _ = run(config, model, images, tmp_path, {"int8-ort": [0.4, 0.5]}, FASTER)
    steps = found["int8-ort"].to_json()["steps"]
    assert [(step["method"], step["float_layers"], step["latency_ratio"]) for step in steps] == [
        ("mse", 0, 0.8), ("minmax", 2, 0.8), ("mse", 2, 0.8),
    ]  # fmt: skip


def test_each_step_of_a_flavour_for_this_cpu_is_timed_beside_none_in_float(model, images, tmp_path):
    config = replace_config(flavours=("int8-ort",), float_layers=2)
    found, _ = run(config, model, images, tmp_path, {}, FASTER)
    steps = found["int8-ort"].to_json()["steps"]
    assert [(step["float_layers"], step["latency_ratio"]) for step in steps] == [(0, 0.8), (2, 0.8)]
    assert steps[0]["drop"] is None


def test_a_file_of_integer_operators_alone_is_tried_first_where_layers_in_float_cost_their_neighbours_too(
    model, images, tmp_path
):
    config = replace_config(flavours=("int8-ort",), float_layers="auto", draws=1)
    whole, _ = run(config, model, images, tmp_path / "whole", {}, FASTER)
    assert [step.choice.float_layers for step in whole["int8-ort"].steps] == [()]
    found, _ = run(config, model, images, tmp_path / "more", {"int8-ort": [0.4, 0.4, 0.5]}, FASTER)
    assert [len(step.choice.float_layers) for step in found["int8-ort"].steps] == [0, 2, 4]
    assert [step.latency is not None for step in found["int8-ort"].steps] == [True] * 3


def test_named_layers_stay_in_float_and_an_unknown_name_is_one_line(model, images, tmp_path):
    config = replace_config(**INT8_ALONE, float_layers=("2.cv1", "1"))
    found, _ = run(config, model, images, tmp_path, {"int8-trt": 0.4})
    assert [step.choice.float_layers for step in found["int8-trt"].steps] == [("2.cv1", "1")]
    with pytest.raises(InputError, match=r"model\.onnx has no layer '99'"):
        run(replace_config(**INT8_ALONE, float_layers=("99",)), model, images, tmp_path, {})


@pytest.mark.parametrize("value", ["never", -1, True, [2.5], 1.5])
def test_another_value_of_float_layers_is_refused(value):
    with pytest.raises(ValidationError, match="expected auto, a number of layers, or a list of their names"):
        QuantizeConfig(float_layers=value)


def test_names_that_yaml_reads_as_numbers_are_names():
    assert QuantizeConfig(float_layers=["2.cv1", 1]).float_layers == ("2.cv1", "1")


@pytest.mark.parametrize("batch", [3, None], ids=["batch 3", "any batch"])
def test_rectangular_batches_are_calibrated_and_checked(images, tmp_path, batch):
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", ("bolt", "nut"))).eval()
    traced, head = trace(RawMaps(network.fuse()), (96, 160)), head_shape(network, (96, 160))
    batches, nms = Batches(batch or 1, batch), NmsShape(0.6, 300, 300, 8)
    card = ModelCard("part", ("bolt", "nut"), (96, 160), batches=batches, weights="5" * 64)
    graph = boxes_graph(traced, head, nms, opset=17, metadata=metadata_of(card), batch=batch)
    onnx.save(graph, tmp_path / "model.onnx")
    found, _ = run(CONFIG, tmp_path / "model.onnx", images, tmp_path, {}, FASTER)
    assert {judged.name for judged in found.values() if judged.kept} == {"fp32", *CONFIG.flavours}
    frames = [read_image(path) for path in images[:4]]
    for judged in found.values():
        with Detector.load(judged.path, device="cpu") as detector:
            assert detector.card.batches == batches
            assert judged.name == "fp32" or detector.card.provenance["opset"] == opset_of(onnx.load(judged.path))
            assert [one.to_list() for one in detector(frames)] == [detector(frame).to_list() for frame in frames]


@pytest.mark.parametrize(("draws", "images"), [(None, None), (None, 0.0), (0.0, None)])
def test_a_loss_of_unknown_error_is_not_resolved_and_shows_none(draws: float | None, images: float | None) -> None:
    """A single labelled image, or a single draw, says nothing about how far the next one would be."""
    loss = Loss(0.0, draws, images, draws=1)
    assert not loss.is_resolved(0.02)
    assert str(loss) == "+0.0000 mAP50-95 (1 draw)"


@pytest.mark.parametrize(
    ("draws", "images", "remedy"),
    [(None, None, "images"), (None, 0.1, "draws"), (0.1, 0.2, "images"), (0.2, 0.1, "draws"), (0.1, None, "images")],
)
def test_the_larger_part_of_the_error_says_what_there_are_too_few_of(
    draws: float | None, images: float | None, remedy: str
) -> None:
    assert Loss(0.0, draws, images, 3).remedy == remedy
