"""The description of a network: layer tables, anchors, classes, depth and width.

An `Architecture` describes a network fully; its layers follow from the table of its layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from compress.config import SCALES
from compress.models.activations import ACTIVATIONS
from runtime.errors import InputError, UsageError

Anchors = tuple[tuple[tuple[float, float], ...], ...]
"""(width, height) in pixels, a group for each level, finest level first."""

DEFAULT_ANCHORS: Anchors = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)
"""At 640 pixels, strides 8, 16, 32."""

DEFAULT_ANCHORS_P6: Anchors = (
    ((19, 27), (44, 40), (38, 94)),
    ((96, 68), (86, 152), (180, 137)),
    ((140, 301), (303, 264), (238, 542)),
    ((436, 615), (739, 380), (925, 792)),
)
"""At 1280 pixels, strides 8, 16, 32, 64."""

MAX_MULTIPLE = 4.0
MAX_CLASSES = 10_000
MAX_NAME = 1000
MAX_ANCHORS_PER_LEVEL = 32


class Layer(NamedTuple):
    """A row of a layer table, before scaling."""

    block: str
    channels: int = 0
    """Output channels at width 1; 0 if they follow from the inputs."""
    repeats: int = 1
    """Bottlenecks at depth 1."""
    source: tuple[int, ...] = (-1,)
    """Layers whose outputs this one reads: -1 is the one before, others are absolute."""
    options: Mapping[str, Any] = {}


class Layout(NamedTuple):
    """A layer table with its output strides."""

    layers: tuple[Layer, ...]
    strides: tuple[int, ...]
    releases: str
    """The releases of YOLOv5 whose checkpoints have it."""

    @property
    def features(self) -> tuple[int, ...]:
        """Indices of the layers that feed the detection head, finest first."""
        return self.layers[-1].source


_NO_SHORTCUT = {"shortcut": False}


def _down(channels: int) -> Layer:
    return Layer("Conv", channels, options={"k": 3, "s": 2})


def _layout(releases: str, stem: Layer, block: str, stages: Sequence[tuple[int, int]], top: Sequence[Layer]) -> Layout:
    """A layout with the feature pyramid that all releases have.

    `stages` are (channels, repeats) from stride 4 on; `top` are the last stage's blocks. The neck goes top-down, then
    bottom-up (FPN + PAN); each level is concatenated with the map of the earlier pass.
    """
    layers = [stem]
    for channels, repeats in stages[:-1]:
        layers += [_down(channels), Layer(block, channels, repeats)]
    layers += [_down(stages[-1][0]), *top]
    levels = [channels for channels, _ in stages[1:]]
    backbone = [4 + 2 * level for level in range(len(levels) - 1)]
    laterals = []
    for channels, skip in zip(levels[-2::-1], backbone[::-1], strict=True):
        laterals.append(len(layers))
        layers += [Layer("Conv", channels), Layer("Upsample"), Layer("Concat", source=(-1, skip))]
        layers.append(Layer(block, channels, 3, options=_NO_SHORTCUT))
    outputs = [len(layers) - 1]
    for finer, channels, lateral in zip(levels[:-1], levels[1:], laterals[::-1], strict=True):
        layers += [_down(finer), Layer("Concat", source=(-1, lateral))]
        layers.append(Layer(block, channels, 3, options=_NO_SHORTCUT))
        outputs.append(len(layers) - 1)
    layers.append(Layer("Detect", source=tuple(outputs)))
    return Layout(tuple(layers), tuple(8 << level for level in range(len(levels))), releases)


_STEM = Layer("Conv", 64, options={"k": 6, "s": 2, "p": 2})
_FOCUS = Layer("Focus", 64)
_SPP = Layer("SPP", 1024)
_SPPF = Layer("SPPF", 1024)
_STAGES = ((128, 3), (256, 6), (512, 9), (1024, 3))
_STAGES_P6 = ((128, 3), (256, 6), (512, 9), (768, 3), (1024, 3))
_STAGES_OLD = ((128, 3), (256, 9), (512, 9), (1024, 3))

LAYOUTS: dict[str, Layout] = {
    "v6": _layout("6.0 to 7.0", _STEM, "C3", _STAGES, (Layer("C3", 1024, 3), _SPPF)),
    "v6-p6": _layout("6.0 to 7.0, four levels", _STEM, "C3", _STAGES_P6, (Layer("C3", 1024, 3), _SPPF)),
    "v4": _layout(
        "4.0 and 5.0", _FOCUS, "C3", _STAGES_OLD, (_SPP, Layer("C3", 1024, 3, options=_NO_SHORTCUT))
    ),
    "v2": _layout(
        "2.0 to 3.1", _FOCUS, "BottleneckCSP", _STAGES_OLD,
        (_SPP, Layer("BottleneckCSP", 1024, 3, options=_NO_SHORTCUT)),
    ),
}  # fmt: skip
"""The key is the first release with that layout."""


@dataclass(frozen=True)
class Architecture:
    """Everything that fixes a network's graph and the meaning of its outputs.

    Anchors and names may be given as any nested sequences; they are kept as tuples. Raises UsageError when a value is
    out of range, or the anchors do not suit the layout.
    """

    depth: float
    width: float
    names: tuple[str, ...]
    anchors: Anchors = DEFAULT_ANCHORS
    layout: str = "v6"
    activation: str = "SiLU"

    def __post_init__(self) -> None:
        if not isinstance(self.layout, str) or self.layout not in LAYOUTS:
            raise UsageError(f"layout {self.layout!r} is not known", f"Choose among {', '.join(LAYOUTS)}")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"activation {self.activation!r} is not known", f"Choose among {', '.join(ACTIVATIONS)}")
        for name in ("depth", "width"):
            _require(
                name,
                value := getattr(self, name),
                _is_number(value) and 0 < value <= MAX_MULTIPLE,
                "above 0, at most 4",
            )
        object.__setattr__(self, "names", _names(self.names))
        object.__setattr__(self, "anchors", _anchors(self.anchors, len(self.strides)))

    @classmethod
    def of_scale(
        cls,
        scale: str,
        names: Sequence[str],
        anchors: Any = None,
        layout: str | None = None,
        activation: str = "SiLU",
    ) -> Architecture:
        """The network of a scale of `SCALES` for the classes `names`.

        Without a `layout`, four levels of anchors make the one with a fourth level; without anchors the layout's
        defaults are taken. Raises UsageError when the scale is unknown.
        """
        depth, width = _multiples(scale)
        layout = layout or ("v6-p6" if anchors is not None and len(anchors) == 4 else "v6")
        if anchors is None:
            anchors = DEFAULT_ANCHORS_P6 if layout.endswith("p6") else DEFAULT_ANCHORS
        return cls(depth, width, tuple(names), anchors, layout, activation)

    def resized(self, scale: str) -> Architecture:
        """The same at the depth and width of `scale`. Raises UsageError when the scale is unknown."""
        depth, width = _multiples(scale)
        return replace(self, depth=depth, width=width)

    @property
    def nc(self) -> int:
        """Number of classes."""
        return len(self.names)

    @property
    def na(self) -> int:
        """Anchors of a level."""
        return len(self.anchors[0])

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of a cell, finest level first."""
        return LAYOUTS[self.layout].strides

    def require_image_size(self, *sides: int) -> None:
        """Raises UsageError when images of these sides do not divide into whole cells of the coarsest level."""
        stride = max(self.strides)
        fitting = [max(1, -(-side // stride)) * stride for side in sides]
        if fitting != list(sides):
            given, better = ("x".join(map(str, values)) for values in (sides, fitting))
            raise UsageError(f"image size {given} is not a multiple of the network's stride {stride}", f"Use {better}")

    @property
    def layers(self) -> tuple[Layer, ...]:
        return LAYOUTS[self.layout].layers

    @property
    def features(self) -> tuple[int, ...]:
        """Indices of the layers that feed the detection head, finest first."""
        return LAYOUTS[self.layout].features

    @property
    def scale(self) -> str | None:
        """The name in `SCALES` of this depth and width; None if there is none."""
        return next((name for name, multiples in SCALES.items() if multiples == (self.depth, self.width)), None)

    def channels(self, nominal: int) -> int:
        """Channels after scaling, a multiple of 8."""
        return math.ceil(nominal * self.width / 8) * 8

    def repeats(self, nominal: int) -> int:
        """Bottlenecks after scaling; halves round to even."""
        return max(round(nominal * self.depth), 1) if nominal > 1 else nominal

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` takes; `strides` is there for other readers."""
        return {
            "depth": self.depth,
            "width": self.width,
            "names": list(self.names),
            "anchors": [[list(wh) for wh in level] for level in self.anchors],
            "strides": list(self.strides),
            "layout": self.layout,
            "activation": self.activation,
        }

    @classmethod
    def from_json(cls, raw: Any) -> Architecture:
        """The architecture that `to_json` wrote. Raises InputError when `raw` is anything else."""
        keys = {"depth", "width", "names", "anchors", "strides", "layout", "activation"}
        if not isinstance(raw, Mapping) or set(raw) != keys:
            found = sorted(map(str, raw)) if isinstance(raw, Mapping) else type(raw).__name__
            raise InputError(f"an architecture has the keys {sorted(keys)}, not {found}", "Write the file anew")
        fields = {key: value for key, value in raw.items() if key != "strides"}
        try:
            made = cls(**fields)
        except UsageError as error:
            raise InputError(error.message, error.hint) from error
        if raw["strides"] != list(made.strides):
            raise InputError(
                f"layout {made.layout} has strides {made.strides}, not {raw['strides']}", "Write the file anew"
            )
        return made


def _multiples(scale: str) -> tuple[float, float]:
    """Depth and width."""
    if scale not in SCALES:
        raise UsageError(f"scale {scale!r} is not known", f"Choose among {', '.join(SCALES)}")
    return SCALES[scale]


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} of the network: {_brief(value)}", f"Expected: {expected}")


def _brief(value: Any) -> str:
    return f"{value}"[:60] if isinstance(value, (str, int, float)) else f"a {type(value).__name__} of another form"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -math.inf < value < math.inf


def _names(given: Any) -> tuple[str, ...]:
    listed = isinstance(given, (list, tuple))
    holds = listed and 0 < len(given) <= MAX_CLASSES and all(isinstance(n, str) and len(n) <= MAX_NAME for n in given)
    _require("names", given, holds, f"1 to {MAX_CLASSES} class names")
    return tuple(given)


def _anchors(given: Any, levels: int) -> Anchors:
    nested = given.tolist() if hasattr(given, "tolist") else given  # NumPy and torch
    expected = f"{levels} levels of as many (width, height) pairs, 1 to {MAX_ANCHORS_PER_LEVEL}, in pixels above 0"
    try:
        made = tuple(tuple((float(w), float(h)) for w, h in level) for level in nested)
    except (TypeError, ValueError, OverflowError):
        made = ()
    counts = {len(level) for level in made}
    sides = [side for level in made for wh in level for side in wh]
    sound = all(math.isfinite(side) and side > 0 for side in sides)
    _require(
        "anchors",
        given,
        len(made) == levels and len(counts) == 1 and 0 < min(counts) <= MAX_ANCHORS_PER_LEVEL and sound,
        expected,
    )
    return made
