"""Checkpoints as YOLOv5 writes them, made here: module trees of classes that this package does not have."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from compress.models import Architecture, YOLOv5, load_model

HOMES = {"YOLOv5": ("models.yolo", "DetectionModel"), "Detect": ("models.yolo", "Detect")}


@pytest.fixture(scope="session")
def network(weights: Path) -> YOLOv5:
    """The official yolov5n."""
    return load_model(weights)


@pytest.fixture
def foreign() -> Iterator[Any]:
    """Turns a network into the object that YOLOv5 would pickle."""
    created: dict[tuple[str, str], type] = {}
    modules = {name: types.ModuleType(name) for name in ("models", "models.yolo", "models.common")}
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)

    def class_of(module: nn.Module) -> type:
        """torch's class of this name, such as BatchNorm2d, else a new one."""
        if hasattr(nn, type(module).__name__):
            return getattr(nn, type(module).__name__)
        home, name = HOMES.get(type(module).__name__, ("models.common", type(module).__name__))
        if (home, name) not in created:
            created[home, name] = type(name, (nn.Module,), {"__module__": home})
            setattr(modules[home], name, created[home, name])
        return created[home, name]

    def convert(module: nn.Module) -> nn.Module:
        made = class_of(module).__new__(class_of(module))
        made.__dict__.update(module.__dict__)
        made._modules = {name: convert(child) for name, child in module._modules.items()}
        return made

    def make(model: YOLOv5, **attributes: Any) -> nn.Module:
        arch, made = model.arch, convert(model.half())
        for index, (layer, row) in enumerate(zip(made.model, arch.layers, strict=True)):
            layer.i, layer.f = index, row.source[0] if len(row.source) == 1 else list(row.source)
        for name in ("arch", "feature_channels", "_sources", "_kept", "_sections"):
            del made.__dict__[name]
        made.yaml = {"nc": arch.nc, "depth_multiple": arch.depth, "width_multiple": arch.width}
        made.names = dict(enumerate(arch.names))
        made.__dict__.update(attributes)
        return made

    yield make
    for name, module in before.items():
        sys.modules.pop(name)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="session")
def small() -> Architecture:
    return Architecture.of_scale("p", ("bolt", "nut"))
