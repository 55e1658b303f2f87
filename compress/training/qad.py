"""Quantisation-aware distillation: a student that rounds as its INT8 file does learns from itself in float.

In: a trained network, the graph that `export` made of it, a calibration and a scheme. Out: the same graph with other
weights, and ranges with learned scales, both for the writer that calibration alone uses too. It is a distillation like
any other, with the same losses, loop and resume; labels are not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load_file
from torch import Tensor, nn

from compress.config import QadConfig, StudentConfig
from compress.data import Dataset, SplitIndex
from compress.graph.fake import FakeBody, Parameters, fake_body
from compress.graph.ranges import Ranges
from compress.log import Log
from compress.models import YOLOv5
from compress.models.checkpoint import FAKE_SCALES
from compress.models.network import Section
from compress.schemes import Scheme
from compress.training.checks import check_distillation
from compress.training.loop import Job, TrainResult, run_job
from compress.training.prepare import open_distillation
from compress.training.resume import origin_of, read_resume
from compress.training.state import STATE
from compress.training.teacher import distillation, load_sources, make_teacher

SCALE_RATE = 10.0
"""Learning rate of the logarithms of the scales as a multiple of that of the weights."""
PREFIX = "network."
"""The exporter's name for the network: in the graph it stands before the name of every weight."""


class FakeQuantised(YOLOv5):
    """A network with folded BatchNorms that computes as its INT8 file will: a float network in all but the rounding.

    The body is that of the graph; the detect convolutions stay in float, and as they are.
    """

    def __init__(self, network: YOLOv5, body: FakeBody) -> None:
        with torch.device("meta"):
            super().__init__(network.arch)
        self.model = network.fuse().model
        self.detect.requires_grad_(False)
        self.body = body
        scales = torch.tensor(body.scales, dtype=torch.float64).log() / SCALE_RATE
        self.register_parameter(FAKE_SCALES, nn.Parameter(scales.float()))

    @property
    def scales(self) -> Tensor:
        """(tensors,) float32: the scales of `body.scaled`."""
        return (SCALE_RATE * self.get_parameter(FAKE_SCALES)).exp()

    def forward_features(self, images: Tensor, run: Section | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """See `YOLOv5.forward_features`. The body is the graph's and has no sections that `run` could do."""
        parameters = Parameters(self.weights_of_graph(), self.scales.unbind())
        features = self.body(images.flip(1) * 255, parameters)
        return self.detect(features), features

    def weights_of_graph(self) -> dict[str, Tensor]:
        """Weights and biases by their names in the graph. The stem reads BGR 0..255 there, not RGB 0..1."""
        found: dict[str, Tensor] = {f"{PREFIX}{name}": value for name, value in self.model.named_parameters("model")}
        if stem := self.body.stem:
            found[stem] = (found[stem].flip(1).double() / 255).float()
        return found


@dataclass(frozen=True)
class Start:
    """A float network, and the INT8 file that it is trained for."""

    student: Path
    """Its checkpoint."""
    model: onnx.ModelProto
    """Its FP32 graph."""
    ranges: Ranges
    """Ranges of a calibration, at which the scales begin."""
    scheme: Scheme
    float_layers: Collection[str] = ()

    @property
    def body(self) -> FakeBody:
        return fake_body(self.model, self.ranges, self.scheme, self.float_layers)


@dataclass(frozen=True)
class Learned:
    """Everything that the writer of an INT8 file needs, and the training that it comes from."""

    model: onnx.ModelProto
    """The FP32 graph with the learned weights."""
    ranges: Ranges
    training: TrainResult


def train_for_int8(
    config: QadConfig,
    start: Start,
    *,
    data: Dataset,
    teachers: Sequence[Path] = (),
    unlabelled: SplitIndex | None = None,
    out: Path,
    device: str,
    log: Log,
) -> Learned:
    """Train a network for its INT8 file, with itself in float and the `teachers` as teachers.

    A training that is begun in the folder `out` goes on. Raises the errors of a distillation.
    """
    files = (start.student, *teachers)
    origin = origin_of(
        config, data, start=StudentConfig(scale=None, weights=start.student), teachers=files, device=device,
        unlabelled=config.unlabelled, unlabelled_images=unlabelled,
    )  # fmt: skip
    form = {"scheme": str(start.scheme), "layers in float": ", ".join(start.float_layers) or "none"}
    origin = replace(origin, facts=origin.facts | form)
    state = read_resume(out, config, origin) if (out / STATE).is_file() else None
    sources = load_sources(files, data.names, config, device)
    own: Any = sources[0].model
    network = FakeQuantised(own, start.body)
    teacher = make_teacher(sources, network, config, device, log)
    splits = open_distillation(data, unlabelled, config, log)
    objective = distillation(network, teacher, config, has_labels=splits.train.labelled > 0)
    if state is None:
        check_distillation(objective, teacher, splits.train, config, log)
    job = Job(config, objective, splits.train, splits.val, out, teacher=teacher, origin=origin)
    result = run_job(job, device=device, resume=state, log=log)
    network = network.cpu()
    network.load_state_dict(load_file(result.best))
    return Learned(graph_of(network, start.model), ranges_of(network), result)


def graph_of(network: FakeQuantised, model: onnx.ModelProto) -> onnx.ModelProto:
    """The FP32 graph `model` with the network's weights. The detect convolutions, which it splits, are the same."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    learned = network.weights_of_graph()
    for tensor in result.graph.initializer:
        if tensor.name in learned:
            values = learned[tensor.name].detach().contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return result


def ranges_of(network: FakeQuantised) -> Ranges:
    """The learned scales as ranges of their tensors."""
    return network.body.ranges(network.scales.detach().tolist())
