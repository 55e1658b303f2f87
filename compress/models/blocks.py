"""The blocks that networks are made of. Attribute names are the keys of the checkpoints' tensors.

All blocks map float (B, C, H, W) to float (B, C', H', W'). Convolutions are made in the order of the state dict and
nothing else draws random numbers, so a seeded build is reproducible.

To add a block, write a subclass of `Block`, here or in a new file, and enter it in `BLOCKS` of `network.py` and, with
the way in which a student takes a slice of it, in `_LAYERS` of `inherit.py`. Its cost is counted, and it is exported
and trained for INT8 without more work, if the tables of `compress.graph.network` and `compress.graph.fake` have its
operators.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.models.activations import ACTIVATIONS, Activation
from compress.models.architecture import Architecture

BN_EPS, BN_MOMENTUM = 1e-3, 0.03
PROBED_VARIANCE = 0.9
"""Running variance of a new BatchNorm: YOLOv5 finds its strides by one training step on zeros, which makes 1 to 0.9."""


class ScaledLayer(NamedTuple):
    """A row of a layer table at an architecture's depth and width."""

    inputs: tuple[int, ...]
    """Channels of the tensors that it reads."""
    channels: int
    """Output channels; 0 if they follow from the inputs."""
    repeats: int
    """Bottlenecks."""
    options: Mapping[str, Any]
    activation: Activation
    arch: Architecture


class Block(nn.Module):
    """A module of a network: how it is built from a row of a layer table, compared with a file's, and fused."""

    compared: ClassVar[tuple[str, ...]] = ()
    """Attributes that the output depends on and that no tensor shows: a checkpoint with other values is refused."""

    @classmethod
    def build(cls, layer: ScaledLayer) -> tuple[Block, int]:
        """The block of a row, and its output channels.

        Here for blocks made as `cls(input channels, output channels, activation, **options)`.
        """
        return cls(layer.inputs[0], layer.channels, layer.activation, **layer.options), layer.channels

    def fuse(self) -> None:
        """Fold the block's own BatchNorms into its convolutions, in place; most blocks have none of their own."""


class BatchNorm2d(nn.BatchNorm2d):
    """torch's, but the counter of its batches keeps its value: checkpoints have it, nothing reads it, and on a GPU it
    would be one more kernel of each layer.
    """

    def forward(self, x: Tensor) -> Tensor:
        assert self.momentum is not None
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )


def batch_norm(channels: int) -> BatchNorm2d:
    """BatchNorm with YOLOv5's constants, in the state that its builder leaves it in."""
    norm = BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_var.fill_(PROBED_VARIANCE)
    norm.num_batches_tracked.fill_(1)
    return norm


class Conv(Block):
    """Convolution without bias, BatchNorm, activation. Padding is k // 2 unless given."""

    def __init__(self, c1: int, c2: int, act: Activation, k: int = 1, s: int = 1, p: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, bias=False)
        self.bn: nn.Module = batch_norm(c2)
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            self.conv = fused(self.conv, *scale_and_shift(self.bn))
            self.bn = nn.Identity()


class Bottleneck(Block):
    """1x1, then 3x3, with a residual if `shortcut`."""

    compared = ("add",)

    def __init__(self, channels: int, act: Activation, shortcut: bool) -> None:
        super().__init__()
        self.cv1 = Conv(channels, channels, act)
        self.cv2 = Conv(channels, channels, act, 3)
        self.add = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class CspBlock(Block):
    """Base of the blocks whose row says how many bottlenecks they hold at depth 1."""

    @classmethod
    def build(cls, layer: ScaledLayer) -> tuple[Block, int]:
        made = cls(layer.inputs[0], layer.channels, layer.activation, layer.repeats, **layer.options)
        return made, layer.channels


class C3(CspBlock):
    """Two branches at half width, one of them through `n` bottlenecks; joined with the bottlenecks first."""

    def __init__(self, c1: int, c2: int, act: Activation, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, act)
        self.cv2 = Conv(c1, half, act)
        self.cv3 = Conv(2 * half, c2, act)
        self.m = nn.Sequential(*(Bottleneck(half, act, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class BottleneckCSP(CspBlock):
    """The block before C3 (releases 1.0 to 3.1): plain convolutions on both branches, then one BatchNorm.

    Its own activation is LeakyReLU, whichever the rest of the network has.
    """

    def __init__(self, c1: int, c2: int, act: Activation, n: int = 1, shortcut: bool = True) -> None:
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, act)
        self.cv2 = nn.Conv2d(c1, half, 1, bias=False)
        self.cv3 = nn.Conv2d(half, half, 1, bias=False)
        self.cv4 = Conv(2 * half, c2, act)
        self.bn: nn.Module = batch_norm(2 * half)
        self.act = ACTIVATIONS["LeakyReLU"]()
        self.m = nn.Sequential(*(Bottleneck(half, act, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat((self.cv3(self.m(self.cv1(x))), self.cv2(x)), 1)
        return self.cv4(self.act(self.bn(joined)))

    def fuse(self) -> None:
        """Fold the BatchNorm, which acts per channel: each convolution takes the half that belongs to its channels."""
        if isinstance(self.bn, nn.BatchNorm2d):
            (scale3, scale2), (shift3, shift2) = (part.chunk(2) for part in scale_and_shift(self.bn))
            self.cv3, self.cv2 = fused(self.cv3, scale3, shift3), fused(self.cv2, scale2, shift2)
            self.bn = nn.Identity()


class SPP(Block):
    """Max pools of several kernels side by side (releases up to 5.0)."""

    def __init__(self, c1: int, c2: int, act: Activation) -> None:
        super().__init__()
        half = c1 // 2
        self.cv1 = Conv(c1, half, act)
        self.cv2 = Conv(half * 4, c2, act)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat((x, *(pool(x) for pool in self.m)), 1))


class SPPF(Block):
    """The same pools as `SPP`, in series."""

    def __init__(self, c1: int, c2: int, act: Activation) -> None:
        super().__init__()
        half = c1 // 2
        self.cv1 = Conv(c1, half, act)
        self.cv2 = Conv(half * 4, c2, act)
        self.m = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        once = self.m(x)
        twice = self.m(once)
        return self.cv2(torch.cat((x, once, twice, self.m(twice)), 1))


class Focus(Block):
    """The stem of releases up to 5.0: the four pixel phases become channels, then a 3x3 convolution."""

    def __init__(self, c1: int, c2: int, act: Activation) -> None:
        super().__init__()
        self.conv = Conv(4 * c1, c2, act, 3)

    def forward(self, x: Tensor) -> Tensor:
        phases = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(phases, 1))


class Upsample(nn.Upsample, Block):
    """Twice the height and width, each pixel four times."""

    compared = ("scale_factor", "mode")

    @classmethod
    def build(cls, layer: ScaledLayer) -> tuple[Block, int]:
        return cls(scale_factor=2, mode="nearest"), layer.inputs[0]


class Concat(Block):
    """Join along channels, in the order given."""

    @classmethod
    def build(cls, layer: ScaledLayer) -> tuple[Block, int]:
        return cls(), sum(layer.inputs)

    def forward(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(tensors), 1)


class Detect(Block):
    """One 1x1 convolution per level; the buffer `anchors` (nl, na, 2) is in units of the level's stride."""

    anchors: Tensor

    def __init__(self, nc: int, anchors_grid: Tensor, channels: Sequence[int]) -> None:
        super().__init__()
        self.na, self.no = anchors_grid.shape[1], nc + 5
        self.register_buffer("anchors", anchors_grid)
        self.m = nn.ModuleList(nn.Conv2d(c, self.na * self.no, 1) for c in channels)

    @classmethod
    def build(cls, layer: ScaledLayer) -> tuple[Block, int]:
        return cls(layer.arch.nc, anchors_grid(layer.arch), layer.inputs), 0

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Raw maps (B, na, H, W, 5+nc) of the levels."""
        return [self._split(conv(x)) for conv, x in zip(self.m, features, strict=True)]

    def _split(self, joint: Tensor) -> Tensor:
        batch, _, height, width = joint.shape
        return joint.view(batch, self.na, self.no, height, width).permute(0, 1, 3, 4, 2).contiguous()


def scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) factors and summands of a BatchNorm with frozen statistics."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / torch.sqrt(norm.eps + norm.running_var)
    return scale, norm.bias - scale * norm.running_mean


@torch.no_grad()
def fused(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> nn.Conv2d:
    """`conv` followed by `* scale + shift`, as one convolution with bias."""
    made = nn.utils.skip_init(
        nn.Conv2d, conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
        conv.groups, device=conv.weight.device, dtype=conv.weight.dtype,
    )  # fmt: skip
    made.weight.copy_(conv.weight * scale.view(-1, 1, 1, 1))
    made.bias.copy_(shift if conv.bias is None else shift + scale * conv.bias)
    return made.requires_grad_(conv.weight.requires_grad).train(conv.training)


def anchors_grid(arch: Architecture) -> Tensor:
    """(nl, na, 2) float32 anchors in units of their level's stride."""
    return torch.tensor(arch.anchors, dtype=torch.float32) / torch.tensor(arch.strides).view(-1, 1, 1)
