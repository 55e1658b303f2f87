"""The builder runs for real with tensorrt_rtx, which builds without a GPU; under the name `tensorrt` too."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from runtime import child_process, engine
from runtime.bundle import card_of, folder_card, model_files, read_checked
from runtime.card import Artifact, Batches, ModelCard
from runtime.engine import BuildRequest, ShapeRange, build_engine, list_plans, profile_of
from runtime.errors import EdgestillError, EngineError, InputError, UnavailableError, UsageError
from runtime.files import sha256
from runtime.layers import EngineLayer, TensorType, layers_file, read_layers, save_layers

REPOSITORY = Path(__file__).resolve().parents[2]
rtx = pytest.mark.skipif("not __import__('importlib.util').util.find_spec('tensorrt_rtx')", reason="needs tensorrt_rtx")
SHAPES = {"images": ((1, 3, 64, 64), (2, 3, 64, 64), (8, 3, 64, 64))}


@rtx
def test_a_plan_is_built_for_its_targets_and_published_whole(toys, tmp_path):
    out = tmp_path / "out" / "toy.plan"
    report = build_engine(toys.canvas_model(tmp_path / "toy.onnx"), out, targets=("sm86", "sm89"))
    assert (report.backend, report.targets, report.log) == ("tensorrt_rtx", ("sm86", "sm89"), ())
    assert (report.bytes, report.sha256) == (out.stat().st_size, sha256(out))
    assert report.versions["tensorrt_rtx"].startswith("1.")
    assert out.read_bytes()[:4] == b"vtrt"  # the raw plan: trtexec and Triton read it
    assert sorted(path.name for path in out.parent.iterdir()) == ["toy.plan", "toy.plan.layers.json"]


@rtx
def test_the_layers_of_a_plan_are_written_beside_it(toys, tmp_path):
    out = tmp_path / "a.plan"
    report = build_engine(toys.conv_model(tmp_path / "a.onnx"), out, targets=("sm86",))
    assert read_layers(out, report.sha256) == report.layers
    assert any(layer.is_convolution for layer in report.layers)
    assert report.layers[0].inputs[0] == TensorType("Float", (1, 3, 64, 64))


def a_plan(folder, precision, types, *, backend="tensorrt", sm="sm86") -> Artifact:
    """A plan of one convolution with these types of input and output, as a build leaves it."""
    plan, shape = folder / f"{precision}.{backend}.{sm}.plan", (1, 8, 100, 100)
    plan.write_bytes(b"vtrt")
    kind, out = (TensorType(name, shape) for name in types)
    save_layers(plan, sha256(plan), (EngineLayer("c", "CaskConvolution", (), (kind,), (out,)),))
    return Artifact(plan.name, sha256(plan), 4, precision, backend, (sm,))


SLOW, FAST, HALF = ("Int8", "Float"), ("Int8", "Int8"), ("Half", "Half")


@pytest.mark.parametrize("order", [("fp16", "int8-trt"), ("int8-trt", "fp16"), None], ids=["first", "last", "at once"])
@pytest.mark.parametrize(("int8", "is_slower"), [(SLOW, True), (FAST, False)])
def test_an_int8_plan_that_moves_more_than_fp16_is_not_listed_whichever_is_built_first(
    toys, tmp_path, order, int8, is_slower
):
    model = toys.canvas_model(tmp_path / "toy.onnx")
    made = {"fp16": a_plan(tmp_path, "fp16", HALF), "int8-trt": a_plan(tmp_path, "int8-trt", int8)}
    steps = [[made[name]] for name in order] if order else [list(made.values())]
    *_, found = (list_plans(tmp_path, model, step) for step in steps)
    file = made["int8-trt"].file
    assert found == ({file: "its INT8 moves 0.4 MB a call, FP16 moves 0.3"} if is_slower else {})
    assert (made["int8-trt"] in ModelCard.load(tmp_path).artifacts) is not is_slower
    assert made["fp16"] in ModelCard.load(tmp_path).artifacts
    assert [path.exists() for path in (tmp_path / file, layers_file(tmp_path / file))] == [not is_slower] * 2
    assert read_layers(tmp_path / made["fp16"].file, made["fp16"].sha256)


@pytest.mark.parametrize("other", [{"backend": "tensorrt_rtx"}, {"sm": "sm89"}])
def test_plans_of_another_builder_or_gpu_are_not_compared(toys, tmp_path, other):
    model = toys.canvas_model(tmp_path / "toy.onnx")
    plans = [a_plan(tmp_path, "int8-trt", SLOW), a_plan(tmp_path, "fp16", HALF, **other)]
    assert list_plans(tmp_path, model, plans) == {}


def test_an_int8_plan_of_unknown_layers_stays(toys, tmp_path):
    model = toys.canvas_model(tmp_path / "toy.onnx")
    plans = [a_plan(tmp_path, "int8-trt", SLOW), a_plan(tmp_path, "fp16", HALF)]
    layers_file(tmp_path / plans[0].file).unlink()
    assert list_plans(tmp_path, model, plans) == {}
    assert list(ModelCard.load(tmp_path).artifacts) == plans


@rtx
def test_two_builds_are_byte_identical(toys, tmp_path):
    model = toys.conv_model(tmp_path / "a.onnx")
    digests = {build_engine(model, tmp_path / f"{run}.plan", targets=("sm86",)).sha256 for run in range(2)}
    assert len(digests) == 1


@rtx
def test_open_dimensions_need_shapes_and_get_a_profile(toys, tmp_path):
    model = toys.conv_model(tmp_path / "a.onnx", batch="batch")
    build_engine(model, tmp_path / "a.plan", targets=("sm86",), shapes=SHAPES)
    with pytest.raises(UsageError, match="images"):
        build_engine(model, tmp_path / "b.plan", targets=("sm86",))
    with pytest.raises(UsageError, match="other"):
        build_engine(model, tmp_path / "b.plan", targets=("sm86",), shapes={"other": SHAPES["images"]})
    assert not (tmp_path / "b.plan").exists()


def test_the_profile_of_an_open_batch_has_the_cards_shape(toys):
    card = toys.card(size_hw=(32, 64), batches=Batches(1, None))
    assert profile_of(card, (1, 2, 8)) == {"canvas": ((1, 32, 64, 3), (2, 32, 64, 3), (8, 32, 64, 3))}
    rows = replace(card, input="tensor", output="rows")
    assert profile_of(rows, (1, 2, 8)) == {"images": ((1, 3, 32, 64), (2, 3, 32, 64), (8, 3, 32, 64))}
    assert profile_of(replace(card, batches=Batches(8, 8)), (1, 2, 8)) == {}


@rtx
def test_a_plan_knows_the_batches_of_its_profile(toys, tmp_path):
    card = toys.card(batches=Batches(1, None))
    model = toys.canvas_model(tmp_path / "a.onnx", card)
    report = build_engine(model, tmp_path / "a.plan", targets=("sm86",), shapes=profile_of(card, (2, 4, 8)))
    assert report.artifact("a.plan", card).batches == (2, 8)
    fixed = toys.card(batches=Batches(3, 3))
    report = build_engine(toys.canvas_model(tmp_path / "b.onnx", fixed), tmp_path / "b.plan", targets=("sm86",))
    assert report.artifact("b.plan", fixed).batches == (3, 3)


@rtx
@pytest.mark.parametrize("target", ["sm87", "sm90", "SM86", "current", "none", "8.6"])
def test_a_target_that_cannot_be_built_for_names_those_that_can(toys, tmp_path, target):
    with pytest.raises(UsageError, match=r"sm120, .*sm86, sm89") as caught:
        build_engine(toys.conv_model(tmp_path / "a.onnx"), tmp_path / "a.plan", targets=("sm86", target))
    assert repr(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "a.plan").exists()


@rtx
def test_a_request_that_the_builder_refuses_is_one_line_and_leaves_nothing(toys, tmp_path):
    """NonMaxSuppression parses, and has no kernel in TensorRT-RTX: the error comes from deep inside the build."""
    import onnx
    from onnx import TensorProto, helper

    node = helper.make_node("NonMaxSuppression", ["boxes", "scores", "limit", "iou", "score"], ["chosen"])
    import numpy as np

    constants = {
        "limit": np.array([10], np.int64),
        "iou": np.array([0.5], np.float32),
        "score": np.array([0.1], np.float32),
    }
    model = toys.save(
        tmp_path / "nms.onnx",
        [node],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [1, 50, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 2, 50]),
        ],
        [helper.make_tensor_value_info("chosen", TensorProto.INT64, ["n", 3])],
        constants,
        {},
    )
    assert onnx.load(model).graph.node
    with pytest.raises(EngineError, match="cannot build it") as caught:
        build_engine(model, tmp_path / "nms.plan", targets=("sm86",))
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["nms.onnx"]


@rtx
def test_an_unknown_operator_is_a_parse_error(toys, tmp_path):
    path = toys.conv_model(tmp_path / "a.onnx")
    path.write_bytes(path.read_bytes().replace(b"Sigmoid", b"Sagmoid"))
    with pytest.raises(EngineError, match="cannot parse it"):
        build_engine(path, tmp_path / "a.plan", targets=("sm86",))


ALIASED = """
import json, sys
import tensorrt_rtx
sys.modules["tensorrt"] = tensorrt_rtx
from runtime.engine import main
main()
"""


@rtx
def test_the_same_builder_serves_a_module_called_tensorrt(toys, tmp_path):
    """The module name is all that the two share for certain; every other difference is asked for, not assumed."""
    answer, plan = tmp_path / "answer.json", tmp_path / "a.plan"
    request = BuildRequest(onnx=str(toys.canvas_model(tmp_path / "toy.onnx")), backend="tensorrt", targets=("sm86",))
    work = {"request": asdict(request), "plan": str(plan), "answer": str(answer)}
    done = subprocess.run(
        [sys.executable, "-c", ALIASED], input=json.dumps(work), text=True, capture_output=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(answer.read_text())["targets"] == ["sm86"]
    assert plan.read_bytes()[:4] == b"vtrt"


@rtx
def test_a_built_plan_is_listed_in_the_card_beside_it(toys, tmp_path):
    model, out = toys.canvas_model(tmp_path / "toy.onnx"), tmp_path / "toy.plan"
    report = build_engine(model, out, targets=("sm86",))
    for _ in range(2):  # building again replaces the entry
        list_plans(tmp_path, model, [report.artifact(out.name, card_of(model))])
    (file,) = model_files(out)
    assert (file.spec.name, file.artifact.targets) == ("tensorrt_rtx", ("sm86",))
    assert read_checked(file) == {out.name: out.read_bytes()}
    assert len(file.card.artifacts) == 1


def test_a_model_without_a_card_cannot_become_an_engine_that_could_not_be_loaded(toys, tmp_path):
    with pytest.raises(InputError, match="no edgestill card"):
        folder_card(tmp_path, toys.conv_model(tmp_path / "a.onnx"))


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"backend": "openvino"}, UsageError, "openvino"),
        ({"backend": "tensorrt_rtx", "dla_core": 0}, UsageError, "DLA"),
        ({"workspace_mib": 0}, UsageError, "workspace"),
        ({"shapes": {"images": ((4, 3), (1, 3), (8, 3))}}, UsageError, "smallest"),
        ({"shapes": {"images": ((4, 3), (4, 3))}}, UsageError, "smallest"),
    ],
)
def test_requests_that_would_be_ignored_or_cannot_be_are_refused_before_the_build(
    toys, tmp_path, monkeypatch, options, error, word
):
    monkeypatch.setattr(engine, "_build_in_child", lambda *_: pytest.fail("the build was started"))
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    with pytest.raises(error, match=word):
        build_engine(toys.conv_model(tmp_path / "a.onnx"), tmp_path / "a.plan", **options)


def test_a_missing_tensorrt_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="pip install tensorrt-rtx"):
        engine.resolve_backend("auto")
    with pytest.raises(UnavailableError, match="JetPack"):
        engine.resolve_backend("tensorrt")


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("a.onnx", None, "no such file"),
        ("a.onnx", b"hello", "not an ONNX file"),
        ("a.xml", b"<net/>", "not an ONNX file"),  # a backend reads the card of such a file
        ("a.engine", b"", "not an ONNX file"),  # none does here
        ("a.bin", b"", "not an ONNX file"),
    ],
)
def test_a_file_that_is_no_model_is_refused_before_the_build(tmp_path, name, data, word):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(InputError, match=word):
        build_engine(path, tmp_path / "a.plan", backend="auto", targets=("sm86",))


def test_a_crash_of_the_builder_is_one_line_and_leaves_nothing(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    monkeypatch.setattr(child_process.sys, "executable", str(_script(tmp_path, "echo half; kill -9 $$")))
    with pytest.raises(EngineError, match="signal 9") as caught:
        build_engine(toys.conv_model(tmp_path / "a.onnx"), tmp_path / "out" / "a.plan", targets=("sm86",))
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "out").iterdir()) == []


def _script(folder: Path, line: str) -> Path:
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


def test_a_target_that_cannot_be_written_is_found_before_the_build(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "_build_in_child", lambda *_: pytest.fail("the build was started"))
    monkeypatch.setattr(engine, "find_spec", lambda name: True)
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgestillError, match="cannot be written"):
        build_engine(toys.conv_model(tmp_path / "a.onnx"), tmp_path / "file" / "a.plan")


class FakeConfig:
    """A builder configuration of plain TensorRT: no compute capabilities to choose."""

    def __init__(self):
        self.flags = []

    def set_flag(self, flag):
        self.flags.append(flag)

    def add_optimization_profile(self, profile):
        return -1 if profile.refused else 0


def fake_tensorrt(**creation_flags):
    return SimpleNamespace(
        __name__="tensorrt",
        __version__="8.6.1",
        NetworkDefinitionCreationFlag=SimpleNamespace(**creation_flags),
        BuilderFlag=SimpleNamespace(FP16="FP16", INT8="INT8", GPU_FALLBACK="GPU_FALLBACK"),
        DataType=SimpleNamespace(HALF="HALF", FLOAT="FLOAT"),
        LayerType=SimpleNamespace(QUANTIZE="QUANTIZE", CONVOLUTION="CONVOLUTION"),
        DeviceType=SimpleNamespace(DLA="DLA"),
    )


def network_of(*layers):
    built = [
        SimpleNamespace(type=kind, num_outputs=1, get_output=lambda index, dtype=dtype: SimpleNamespace(dtype=dtype))
        for kind, dtype in layers
    ]
    return SimpleNamespace(num_layers=len(built), get_layer=built.__getitem__)


@pytest.mark.parametrize(
    ("offered", "expected"),
    [({"EXPLICIT_BATCH": 0}, 1), ({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 3), ({"STRONGLY_TYPED": 1}, 2)],
)
def test_network_flags_are_those_that_the_version_offers(offered, expected):
    assert engine.network_flags(fake_tensorrt(**offered)) == expected


@pytest.mark.parametrize(
    ("layers", "flags"),
    [
        ([("CONVOLUTION", "FLOAT")], []),
        ([("CONVOLUTION", "HALF")], ["FP16"]),
        ([("QUANTIZE", "FLOAT")], ["INT8"]),
        ([("QUANTIZE", "FLOAT"), ("CONVOLUTION", "HALF")], ["FP16", "INT8"]),
    ],
)
def test_without_strong_typing_the_builder_is_allowed_what_the_graph_holds(layers, flags):
    config = FakeConfig()
    engine.set_precision_flags(fake_tensorrt(EXPLICIT_BATCH=0), config, network_of(*layers))
    assert config.flags == flags
    config = FakeConfig()
    engine.set_precision_flags(fake_tensorrt(STRONGLY_TYPED=1), config, network_of(*layers))
    assert config.flags == []


def test_a_profile_that_tensorrt_refuses_silently_is_an_error():
    network = SimpleNamespace(num_inputs=1, get_input=lambda _: SimpleNamespace(name="images", shape=(-1, 3)))
    builder = SimpleNamespace(
        create_optimization_profile=lambda: SimpleNamespace(refused=True, set_shape=lambda *shapes: None)
    )
    request = BuildRequest("a.onnx", "tensorrt", shapes={"images": ShapeRange((1, 3), (1, 3), (1, 3))})
    with pytest.raises(EngineError, match="refused the shapes"):
        engine.set_profile(builder, FakeConfig(), network, request)


def test_dla_is_set_where_it_exists_and_refused_where_not():
    trt, config = fake_tensorrt(EXPLICIT_BATCH=0), FakeConfig()
    request = BuildRequest("a.onnx", "tensorrt", dla_core=1)
    engine.set_dla(trt, SimpleNamespace(num_DLA_cores=2), config, request)
    assert (config.default_device_type, config.DLA_core, config.flags) == ("DLA", 1, ["GPU_FALLBACK"])
    with pytest.raises(UnavailableError, match="0 cores"):
        engine.set_dla(trt, SimpleNamespace(num_DLA_cores=0), FakeConfig(), request)


def test_plain_tensorrt_builds_for_the_gpu_that_is_there_and_says_so(monkeypatch):
    monkeypatch.setattr(engine.machine, "gpus", lambda: [{"compute_capability": "8.7"}])
    request = BuildRequest("a.onnx", "tensorrt", targets=("sm86", "sm87"))
    targets, notes = engine.set_targets(fake_tensorrt(), FakeConfig(), request)
    assert targets == ["sm87"]
    assert "sm86" in notes[0]
    assert "sm87" not in notes[0]


@pytest.mark.parametrize("severity", ["ERROR", "INTERNAL_ERROR"])
def test_any_error_line_fails_a_build_that_returned_a_plan(monkeypatch, severity):
    """EXCLUDE_LEAN_RUNTIME alone, a foreign platform and a corrupt timing cache only log, and return an engine."""
    logger = SimpleNamespace(lines=[("WARNING", "slow"), (severity, "corrupt cache")], layers="")
    parser = SimpleNamespace(parse_from_file=lambda path: True)
    config = FakeConfig()
    config.set_memory_pool_limit = lambda kind, size: None
    network = SimpleNamespace(num_inputs=0, num_outputs=1)
    builder = SimpleNamespace(
        create_network=lambda flags: network,
        create_builder_config=lambda: config,
        build_serialized_network=lambda *_: b"plan",
    )
    trt = fake_tensorrt(STRONGLY_TYPED=1)
    trt.Builder, trt.OnnxParser = (lambda _: builder), (lambda *_: parser)
    trt.MemoryPoolType = SimpleNamespace(WORKSPACE=0)
    trt.ProfilingVerbosity = SimpleNamespace(DETAILED="DETAILED")
    trt.LayerInformationFormat = SimpleNamespace(JSON="JSON")
    monkeypatch.setattr(engine, "collecting_logger", lambda _: logger)
    monkeypatch.setattr(engine.machine, "gpus", list)
    with pytest.raises(EngineError, match="corrupt cache"):
        engine.build_plan(trt, BuildRequest("a.onnx", "tensorrt"))
    logger.lines.pop()
    loaded = SimpleNamespace(engine=SimpleNamespace(create_engine_inspector=lambda: Inspector()))
    monkeypatch.setattr(engine, "deserialize", lambda *_: loaded)
    layer = EngineLayer("stem", "CaskConvolution", (), (), ())
    assert engine.build_plan(trt, BuildRequest("a.onnx", "tensorrt")) == (b"plan", [], ["slow"], (layer,))
    monkeypatch.setattr(engine, "deserialize", cannot_load)
    _, _, log, layers = engine.build_plan(trt, BuildRequest("a.onnx", "tensorrt"))
    assert (log, layers) == (["slow", "the layers of the plan are not known: no GPU"], ())


class Inspector:
    def get_engine_information(self, kind):
        assert kind == "JSON"
        return '{"Layers": [{"Name": "stem", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}]}'


def cannot_load(*_):
    raise EngineError("no GPU")


@pytest.mark.parametrize("name", ["model.onnx", "plan", "a.plan.bak"])
def test_a_plan_replaces_no_file_of_another_kind(toys, tmp_path, name):
    model = toys.canvas_model(tmp_path / "model.onnx")
    before = model.read_bytes()
    with pytest.raises(UsageError, match=r"a plan's name ends in \.engine, \.plan"):
        build_engine(model, tmp_path / name, targets=("sm86",))
    assert model.read_bytes() == before
