from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compress.config import QadConfig
from compress.data import Dataset
from compress.flavours import FLAVOURS
from compress.graph.assemble import boxes_graph
from compress.graph.fake import fake_body, fake_weights
from compress.graph.network import trace
from compress.graph.nms import NmsShape
from compress.graph.parts import GraphParts
from compress.graph.placement import layers
from compress.graph.ranges import Ranges, calibrate, scale_of
from compress.log import Log
from compress.models import Architecture, YOLOv5
from compress.models.activations import ACTIVATIONS
from compress.models.architecture import LAYOUTS
from compress.models.checkpoint import load, save_model
from compress.schemes import SCHEMES, Scheme
from compress.stages.export import RawMaps, head_shape
from compress.training.qad import FakeQuantised, Learned, Start, graph_of, ranges_of, train_for_int8
from runtime.errors import InputError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


def network_of(names: tuple[str, ...], layout: str = "v6", activation: str = "SiLU") -> YOLOv5:
    """Untrained, but with statistics of a batch, so that no signal is lost on its way to the head."""
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", names, layout=layout, activation=activation))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.rand(4, 3, 2 * SIZE, 2 * SIZE))
    return network.eval()


def graph(network: YOLOv5, size: int = SIZE) -> onnx.ModelProto:
    head = head_shape(network, (size, size))
    return boxes_graph(
        trace(RawMaps(network.fuse()), (size, size)), head, NmsShape(0.6, 60, 60, 8), opset=19, metadata={}
    )


def canvases(size: int = SIZE) -> list[np.ndarray]:
    return [np.random.default_rng(seed).integers(0, 256, (1, size, size, 3), dtype=np.uint8) for seed in range(2)]


# ---- the network ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "activation"),
    [*((layout, "SiLU") for layout in LAYOUTS), *(("v6", name) for name in ACTIVATIONS if name != "SiLU")],
)
def test_without_roundings_it_is_the_network_for_images_of_any_shape(layout: str, activation: str) -> None:
    size = 2 * SIZE if layout == "v6-p6" else SIZE
    network = network_of(("red", "green"), layout, activation)
    model = graph(network, size)
    every = list(layers(GraphParts(model.graph), Scheme(operators=())))
    fake = FakeQuantised(network, fake_body(model, {}, Scheme(operators=()), every))
    images = torch.rand(2, 3, size, 2 * size)
    with torch.no_grad():
        found, expected = fake.forward_features(images), network.fuse().forward_features(images)
    for maps in zip(found, expected, strict=True):
        for one, other in zip(*maps, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-3)


def test_an_untrained_one_gives_back_the_graph_and_the_ranges() -> None:
    network = network_of(("red", "green"))
    model = graph(network)
    ranges = calibrate(model, canvases(), "mse")
    fake = FakeQuantised(network, fake_body(model, ranges, SCHEMES["openvino"]))
    assert graph_of(fake, model).SerializeToString() == model.SerializeToString()
    kept = dict(zip(fake.body.scaled, fake.body.scales, strict=True))
    found = dict(zip(fake.body.scaled, fake.scales.tolist(), strict=True))
    assert found == pytest.approx(kept, rel=1e-5)


# ---- the training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def student(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("student") / "student.safetensors"
    save_model(network_of(tiny_data.names), path)
    return path


@pytest.fixture(scope="module")
def model(tiny_data: Dataset) -> onnx.ModelProto:
    return graph(network_of(tiny_data.names))


@pytest.fixture(scope="module")
def ranges(model: onnx.ModelProto) -> Ranges:
    return calibrate(model, canvases(), "mse")


def config(**changes: Any) -> QadConfig:
    base = {"epochs": 4, "batch": 5, "imgsz": SIZE, "workers": 0, "threads": 1, "tensorboard": False}
    return QadConfig.model_validate(base | {"optimizer": {"lr0": 1e-4}} | changes)


@pytest.fixture(scope="module")
def train(tiny_data: Dataset, student: Path, model: onnx.ModelProto, ranges: Ranges) -> Any:
    def run(
        out: Path,
        settings: QadConfig,
        *,
        data: Dataset = tiny_data,
        float_layers: Sequence[str] = ("2.cv1",),
        teachers: Sequence[Path] = (),
        log: Log = lambda _: None,
    ) -> Learned:
        start = Start(student, model, ranges, SCHEMES["openvino"], float_layers)
        return train_for_int8(settings, start, data=data, teachers=teachers, out=out, device="cpu", log=log)

    return run


@pytest.fixture(scope="module")
def learned(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return train(tmp_path_factory.mktemp("learned"), config())


def arrays(graph: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}


def test_weights_and_scales_learn_and_the_detect_convolutions_stay(
    learned: Learned, model: onnx.ModelProto, ranges: Ranges
) -> None:
    before, after = arrays(model), arrays(learned.model)
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    assert {f"network.model.{layer}.weight" for layer in ("0.conv", "2.cv1.conv", "23.cv3.conv")} <= moved
    assert not [name for name in moved if ".24." in name]
    pixels = {name for name in learned.ranges if learned.ranges[name] == ranges[name]}
    assert pixels == {"canvas.nchw"}, "their range is known"
    for name in learned.ranges.keys() - pixels:
        start = fake_scale(ranges, name)
        assert start / 4 < fake_scale(learned.ranges, name) < 4 * start


def fake_scale(ranges: Ranges, name: str) -> float:
    return scale_of(ranges[name], unsigned=True)[0]


def test_the_file_holds_the_weights_that_were_trained_with(learned: Learned) -> None:
    file = arrays(FLAVOURS["int8-openvino"].make(learned.model, learned.ranges, float_layers=("2.cv1",)))
    trained = arrays(learned.model)
    for layer in ("0", "2.cv2", "23.cv3"):
        name = f"network.model.{layer}.conv.weight"
        in_file = file[f"{name}.quantised"].astype(np.float32) * file[f"{name}.scale"][:, None, None, None]
        assert np.array_equal(in_file, fake_weights(torch.from_numpy(trained[name].copy()), 127).numpy()), layer
    assert np.array_equal(file["network.model.2.cv1.conv.weight"], trained["network.model.2.cv1.conv.weight"])


def test_it_comes_closer_to_the_float_network(learned: Learned) -> None:
    with (learned.training.last.parent / "results.csv").open() as file:
        losses = [float(row["train/soft_loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]


def test_no_label_is_needed(train: Any, tiny_data: Dataset, tmp_path: Path) -> None:
    split = tiny_data.splits["train"]
    bare = tuple(replace(sample, labels=np.zeros((0, 5), np.float32)) for sample in split.samples)
    data = replace(tiny_data, splits={**tiny_data.splits, "train": replace(split, samples=bare)})
    assert train(tmp_path, config(epochs=1), data=data).training.epochs == 1


class Killed(BaseException):
    """Stands for a kill."""


def test_a_killed_training_goes_on_bit_for_bit_and_from_the_same_alone(
    train: Any, learned: Learned, tmp_path: Path
) -> None:
    def kill(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, config(), log=kill)
    with pytest.raises(UsageError, match="layers in float"):
        train(tmp_path, config(), float_layers=())
    again = train(tmp_path, config())
    assert again.model.SerializeToString() == learned.model.SerializeToString()
    assert again.ranges == learned.ranges


def test_a_second_teacher_changes_what_is_learned(
    train: Any, learned: Learned, tiny_data: Dataset, tmp_path: Path
) -> None:
    big = YOLOv5(replace(network_of(tiny_data.names).arch, width=0.25))
    save_model(big, tmp_path / "big.safetensors")
    found = train(tmp_path / "out", config(), teachers=[tmp_path / "big.safetensors"])
    assert found.ranges != learned.ranges


def test_its_weights_are_not_taken_for_a_float_network(learned: Learned) -> None:
    with pytest.raises(InputError, match="holds the weights and scales of an INT8 file"):
        load(learned.training.best)


def test_ranges_are_those_of_the_learned_scales(learned: Learned, model: onnx.ModelProto) -> None:
    network = FakeQuantised(
        network_of(("red", "green")), fake_body(model, learned.ranges, SCHEMES["openvino"], ["2.cv1"])
    )
    again = ranges_of(network)
    assert {name: fake_scale(again, name) for name in again} == pytest.approx(
        {name: fake_scale(learned.ranges, name) for name in learned.ranges}, rel=1e-5
    )
