"""A small seeded network with YOLOv5's head: three levels, three anchors, spread scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from compress.graph.assemble import boxes_graph, yolov5_graph
from compress.graph.head import HeadShape
from compress.graph.network import NetworkGraph, trace
from compress.graph.nms import NmsShape

ANCHORS = np.asarray([10, 13, 16, 30, 33, 23, 30, 61, 62, 45, 59, 119, 116, 90, 156, 198, 373, 326], np.float32)
SIZE = 160
CLASSES = 5


class Small(nn.Module):
    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 6, 2, 2)
        self.down = nn.ModuleList([nn.Conv2d(width, width, 3, 2, 1) for _ in range(4)])
        self.act = nn.SiLU()
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.up = nn.Upsample(scale_factor=2)
        self.mix = nn.Conv2d(2 * width, width, 1)
        self.detect = nn.ModuleList([nn.Conv2d(width, 3 * (5 + classes), 1) for _ in range(3)])
        for layer in self.detect:
            nn.init.normal_(layer.weight, 0, 2.0)

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        x, features = self.act(self.stem(images)), []
        for layer in self.down:
            x = self.act(layer(x)) * 3.0
            features.append(x)
        p3, p4, p5 = features[1:]
        p4 = p4 + self.act(self.mix(torch.cat([self.up(self.pool(p5)), p4], 1)))
        return [conv(x) for conv, x in zip(self.detect, (p3, p4, p5), strict=True)]


@dataclass(frozen=True)
class Case:
    network: Small
    traced: NetworkGraph
    head: HeadShape
    nms: NmsShape

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Decoded by the formula of the facts, in torch."""
        with torch.inference_mode():
            maps = self.network(torch.from_numpy(images))
        levels = []
        for raw, stride, anchors in zip(maps, self.head.strides, self.head.anchors_px, strict=True):
            height, width = raw.shape[2:]
            unit = raw.view(3, -1, height, width).permute(0, 2, 3, 1).sigmoid()
            y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
            xy = (unit[..., :2] * 2 + (torch.stack([x, y], -1) - 0.5)) * stride
            wh = (unit[..., 2:4] * 2) ** 2 * torch.from_numpy(anchors)[:, None, None]
            levels.append(torch.cat([xy, wh, unit[..., 4:]], -1).reshape(-1, unit.shape[-1]))
        return torch.cat(levels).numpy()

    def boxes(self, **settings: Any) -> Any:
        return boxes_graph(self.traced, self.head, self.nms, **{"opset": 19, "metadata": {}, **settings})

    def conventional(self, **settings: Any) -> Any:
        return yolov5_graph(self.traced, self.head, **{"opset": 19, "metadata": {}, **settings})


def make_case(classes: int = CLASSES, size_hw: tuple[int, int] = (SIZE, SIZE), **nms: Any) -> Case:
    torch.manual_seed(0)
    network = Small(classes).eval()
    head = HeadShape(classes, ANCHORS.reshape(3, 3, 2), (8, 16, 32), size_hw)
    settings = {"iou": 0.6, "candidates": 300, "max_det": 300, "iterations": 8, **nms}
    return Case(network, trace(network, size_hw), head, NmsShape(**settings))


@pytest.fixture(scope="session")
def case() -> Case:
    return make_case()


@pytest.fixture(scope="session")
def make() -> Any:
    return make_case


@pytest.fixture(scope="session")
def canvas() -> np.ndarray:
    return noise(SIZE, SIZE)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
