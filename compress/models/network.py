"""The network: build modules from a table of layers, and decode raw maps to boxes.

Written from published facts (layer tables, tensor names, formulas). With a checkpoint's weights its raw maps and
boxes equal those of YOLOv5 v7.0 to rounding.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

from compress.models.activations import ACTIVATIONS
from compress.models.architecture import Architecture, Layer
from compress.models.blocks import (
    C3,
    SPP,
    SPPF,
    Block,
    BottleneckCSP,
    Concat,
    Conv,
    Detect,
    Focus,
    ScaledLayer,
    Upsample,
)

Section = Callable[[int, int, dict[int, Tensor]], dict[int, Tensor]]
"""See `YOLOv5.section`."""
RARE_OBJECTS = 8
"""Objects that an untrained head expects in a 640-pixel image, per anchor."""
PRIOR_SIZE = 640
CLASS_PRIOR = 0.6

BLOCKS: dict[str, type[Block]] = {
    block.__name__: block for block in (Conv, Focus, SPP, SPPF, C3, BottleneckCSP, Upsample, Concat, Detect)
}
"""The blocks that rows of a layer table may name."""


def _build(arch: Architecture) -> tuple[list[nn.Module], list[int]]:
    """The modules of an architecture's layers, and the output channels of each."""
    modules: list[nn.Module] = []
    channels: list[int] = []
    for layer in arch.layers:
        module, out = BLOCKS[layer.block].build(scaled(layer, arch, channels))
        modules.append(module)
        channels.append(out)
    return modules, channels


def scaled(layer: Layer, arch: Architecture, channels: Sequence[int]) -> ScaledLayer:
    """The row `layer` at the depth and width of `arch`; `channels` are the outputs of the layers before it."""
    inputs = tuple(channels[index] for index in layer.source) if channels else (3,)
    return ScaledLayer(
        inputs, arch.channels(layer.channels), arch.repeats(layer.repeats), layer.options,
        ACTIVATIONS[arch.activation], arch,
    )  # fmt: skip


class YOLOv5(nn.Module):
    """A YOLOv5 detector; tensors are named `model.<layer>...` as in YOLOv5's checkpoints.

    Expects float RGB 0..1 (B, 3, H, W) with H and W multiples of the largest stride. A new network has torch's
    default weights (seeded builds are reproducible) and BatchNorm statistics as YOLOv5's builder leaves them; call
    `init_detect_bias` before a training.
    """

    def __init__(self, arch: Architecture) -> None:
        super().__init__()
        modules, channels = _build(arch)
        self.arch = arch
        self.model = nn.Sequential(*modules)
        self.feature_channels = tuple(channels[index] for index in arch.features)
        """Channels of the features that feed the head, finest first."""
        self._sources = [layer.source for layer in arch.layers]
        self._kept = {index for source in self._sources for index in source if index >= 0}
        ends = sorted(arch.features)
        self._sections = tuple(zip((0, *(end + 1 for end in ends)), ends, strict=False))
        """First and last layers of backbone and neck; a section ends at each level that the head reads."""

    @property
    def detect(self) -> Detect:
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of a cell, finest level first."""
        return self.arch.strides

    def forward(self, images: Tensor) -> list[Tensor]:
        """Raw maps (logits) (B, na, H/s, W/s, 5+nc) of the levels, in training and in evaluation mode."""
        return self.forward_features(images)[0]

    def forward_features(self, images: Tensor, run: Section | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Raw maps, and the features (B, C, H/s, W/s) that the head made them of, finest level first.

        `run` does what `section` does, such as a compiled form of it.
        """
        kept: dict[int, Tensor] = {-1: images}
        for first, last in self._sections:
            kept = (run or self.section)(first, last, kept)
        features = [kept[index] for index in self.arch.features]
        return self.detect(features), features

    def section(self, first: int, last: int, kept: dict[int, Tensor]) -> dict[int, Tensor]:
        """Run the layers `first` to `last`. `kept` are the outputs of layers before that others read, and as -1 that of
        the last one; so is what is returned.
        """
        kept = dict(kept)
        for index in range(first, last + 1):
            source = self._sources[index]
            kept[-1] = self.model[index](kept[-1] if source == (-1,) else [kept[i] for i in source])
            if index in self._kept:
                kept[index] = kept[-1]
        return kept

    def decode(self, raw: Sequence[Tensor]) -> Tensor:
        """Raw maps -> rows (B, N, 5+nc): x y w h (centre, pixels), objectness, class probabilities.

        Rows are ordered by level (finest first), then anchor, y, x. Class columns are not multiplied by objectness.
        """
        pixels = [anchors * stride for anchors, stride in zip(self.detect.anchors, self.strides, strict=True)]
        levels = zip(raw, pixels, self.strides, strict=True)
        return torch.cat([decode_level(level, anchors, stride) for level, anchors, stride in levels], 1)

    @torch.no_grad()
    def init_detect_bias(self) -> None:
        """Set the head's biases so that it expects few objects, and every class equally often.

        Call it once, on a new network. With one class its bias becomes +11: there is no class loss, so its probability
        stays 1 and objectness alone decides.
        """
        for conv, stride in zip(self.detect.m, self.strides, strict=True):
            assert isinstance(conv.bias, nn.Parameter)
            bias = conv.bias.view(self.detect.na, self.detect.no)
            bias[:, 4] += math.log(RARE_OBJECTS / (PRIOR_SIZE / stride) ** 2)
            bias[:, 5:] += math.log(CLASS_PRIOR / (self.arch.nc - 0.99999))

    def fuse(self) -> YOLOv5:
        """A copy in evaluation mode whose BatchNorms are folded into the convolutions before them."""
        made = copy.deepcopy(self).eval()
        with torch.no_grad():
            for block in made.modules():
                if isinstance(block, Block):
                    block.fuse()
        return made


def decode_level(raw: Tensor, anchors_px: Tensor, stride: int) -> Tensor:
    """Raw map (B, na, H, W, 5+nc) and anchors (na, 2) in pixels -> rows (B, na*H*W, 5+nc).

    Centre `(2σ - 0.5 + cell) * stride`, size `(2σ)² * anchor`. The half is taken off the cell first, as in YOLOv5:
    another order rounds differently.
    """
    batch, na, height, width, columns = raw.shape
    y = raw.sigmoid()
    cells_x = torch.arange(width, device=raw.device, dtype=raw.dtype) - 0.5
    cells_y = torch.arange(height, device=raw.device, dtype=raw.dtype) - 0.5
    cells = torch.stack((cells_x.expand(height, width), cells_y[:, None].expand(height, width)), -1)
    centres = (y[..., 0:2] * 2 + cells) * stride
    sizes = (y[..., 2:4] * 2) ** 2 * anchors_px.to(raw.dtype).view(na, 1, 1, 2)
    return torch.cat((centres, sizes, y[..., 4:]), -1).reshape(batch, na * height * width, columns)


@lru_cache(maxsize=16)
def network_on_meta_device(architecture: Architecture) -> YOLOv5:
    """The network on torch's `meta` device: shapes and names only. Shared among callers, who must not change it."""
    with torch.device("meta"):
        return YOLOv5(architecture).eval()
