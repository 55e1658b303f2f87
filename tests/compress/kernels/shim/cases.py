"""Small arguments for every loss with kernels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from compress.kernels.losses import FUSED
from shim.oracle import head_anchors, head_pairs, pairs

Shape = tuple[int, int, int, int]
SHAPES: Sequence[Shape] = ((2, 16, 8, 8), (2, 32, 4, 4))
HEAD = {"balance": (4.0, 1.0, 0.4, 0.1), "obj": 1.0, "cls": 0.5, "box": 0.05}
"""The detection loss's factors, as for 80 classes."""


def arguments(
    name: str,
    dtype: torch.dtype = torch.float32,
    shapes: Sequence[Shape] = SHAPES,
    layout: str = "nchw",
    scale: float | None = None,
    device: str = "cpu",
    mean: float = 0.7,
) -> list[Any]:
    """The arguments of the loss `name`, one level a shape, the expected upstream gradient last."""
    generator = torch.Generator().manual_seed(5)
    wide = dtype if dtype == torch.float64 else torch.float32

    def to_device(maps: list[torch.Tensor]) -> list[torch.Tensor]:
        return [m.to(device) for m in maps]

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=wide)

    def rounded(channels: int, *inputs: int) -> torch.Tensor:
        """An adapter's parameter, as the maps' dtype can hold it: that is how it is used."""
        return (noise(channels, *inputs) / channels**0.5).to(dtype).to(wide)

    make = head_pairs if name == "soft_head" else pairs
    students, teachers = map(to_device, make(shapes, dtype, layout=layout, mean=mean))
    maps = to_device([torch.rand(n, h, w, generator=generator).to(wide) for n, _, h, w in shapes])
    channels = [c for _, c, _, _ in shapes]
    shapes_of_adapters = ([(c, c) for c in channels], [(c,) for c in channels])
    adapters = [to_device([rounded(*shape) for shape in shapes]) for shapes in shapes_of_adapters]
    values = {
        "students": students,
        "teachers": teachers,
        "matrices": adapters[0],
        "biases": adapters[1],
        "weights": maps,
        "masks": maps,
        "tau": 1.0,
        "gamma": 1.0,
        "temperature": 0.5,
        "seen": teachers,
        "tells_all": True,
        "anchors": to_device([a.to(wide) for a in head_anchors(len(shapes))]),
        **HEAD,
        "balance": HEAD["balance"][: len(shapes)],
    }
    made = [values[parameter] for parameter in FUSED[name].parameters]
    return [*made, None if scale is None else torch.tensor(float(scale), device=device)]


def with_learners(name: str, given: Sequence[Any], learners: Iterable[torch.Tensor]) -> list[Any]:
    """The arguments of the loss `name` with `learners`, in turn, in the places of what gets a gradient."""
    rest, made = iter(learners), list(given)
    for place in FUSED[name].learns:
        made[place] = [next(rest) for _ in given[place]]
    return made
