from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compress.models import LAYOUTS, Architecture, YOLOv5, complexity, load_model, save_model
from compress.models.activations import Activation
from compress.models.architecture import Layer
from compress.models.blocks import Block, Conv, batch_norm, fused, scale_and_shift
from compress.models.network import BLOCKS, network_on_meta_device


class Ghost(Block):
    """A new block: half of its channels by a convolution, half by a cheap depthwise one with its own BatchNorm."""

    def __init__(self, c1: int, c2: int, act: Activation) -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2 // 2, act)
        self.cheap = nn.Conv2d(c2 // 2, c2 // 2, 5, padding=2, groups=c2 // 2, bias=False)
        self.bn: nn.Module = batch_norm(c2 // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return torch.cat((x, self.bn(self.cheap(x))), 1)

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            self.cheap, self.bn = fused(self.cheap, *scale_and_shift(self.bn)), nn.Identity()


@pytest.fixture
def ghost(monkeypatch: pytest.MonkeyPatch) -> Architecture:
    """An architecture whose layer 9 is the new block in place of SPPF."""
    layers = list(LAYOUTS["v6"].layers)
    layers[9] = Layer("Ghost", 1024)
    monkeypatch.setitem(BLOCKS, "Ghost", Ghost)
    monkeypatch.setitem(LAYOUTS, "ghost", LAYOUTS["v6"]._replace(layers=tuple(layers)))
    return Architecture.of_scale("p", ("bolt", "nut"), layout="ghost")


def test_a_new_block_needs_its_class_and_its_name(ghost: Architecture, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = YOLOv5(ghost)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.rand(2, 3, 64, 64))
    save_model(network.eval(), tmp_path / "ghost.safetensors")
    loaded, images = load_model(tmp_path / "ghost.safetensors"), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        for raw, again, quick in zip(network(images), loaded(images), network.fuse()(images), strict=True):
            assert torch.equal(raw, again)
            torch.testing.assert_close(quick, raw, rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.fuse().modules())


def test_a_batch_norm_moves_its_statistics_as_torchs_does_and_counts_no_batch() -> None:
    ours, theirs = batch_norm(3), nn.BatchNorm2d(3, eps=1e-3, momentum=0.03)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 5, 5)
    assert torch.equal(ours(images), theirs(images))
    assert torch.equal(ours.eval()(images), theirs.eval()(images))
    found, expected = ours.state_dict(), theirs.state_dict()
    assert (found.pop("num_batches_tracked"), expected.pop("num_batches_tracked")) == (1, 2)
    assert all(map(torch.equal, found.values(), expected.values()))


def test_a_new_blocks_cost_is_counted(ghost: Architecture) -> None:
    conv, cells = network_on_meta_device(ghost).model[9].cv1.conv, (64 // 32) ** 2
    inputs, half = conv.in_channels, conv.out_channels
    with_sppf = complexity(Architecture.of_scale("p", ("bolt", "nut")), (64, 64)).macs
    sppf, own = inputs * inputs // 2 + 4 * inputs // 2 * 2 * half, inputs * half + 25 * half
    assert complexity(ghost, (64, 64)).macs == with_sppf + (own - sppf) * cells


def test_every_row_of_every_layout_names_a_block() -> None:
    assert {row.block for layout in LAYOUTS.values() for row in layout.layers} <= set(BLOCKS)
