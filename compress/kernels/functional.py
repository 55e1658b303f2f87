"""The feature-matching losses, fused: one pass reads student and teacher and writes the gradient.

On an NVIDIA GPU the kernels of cuda/ run; elsewhere, and with `EDGESTILL_KERNELS=off`, the plain torch of
`reference.py`, which defines them. README.md has formulas, traffic and measurements.

Every function takes one entry per pyramid level and returns one float32 scalar; `scale` () float32 is the upstream
gradient that the caller expects, which is folded into the gradient before that is rounded to the dtype of the maps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compress.kernels import fused
from compress.kernels.device import MAX_LEVELS, SUFFIX
from compress.kernels.gpu import gpu
from runtime.errors import EdgestillError, UsageError

SWITCH = "EDGESTILL_KERNELS"
"""Environment variable; `off` forces the reference."""
PIXEL_MAP_DIMS = 3
"""Of weights and masks (N, H, W)."""
Maps = Sequence[Tensor]


def weighted_mse(students: Maps, teachers: Maps, weights: Maps = (), *, scale: Tensor | None = None) -> Tensor:
    """See `reference.weighted_mse`."""
    return _loss("weighted_mse", students, teachers, weights, scale)


def adapter_mse(
    students: Maps, teachers: Maps, matrices: Maps, biases: Maps, weights: Maps = (), *, scale: Tensor | None = None
) -> Tensor:
    """See `reference.adapter_mse`."""
    return _loss("adapter_mse", students, teachers, matrices, biases, weights, scale)


def cwd(students: Maps, teachers: Maps, tau: float = 1.0, *, scale: Tensor | None = None) -> Tensor:
    """See `reference.cwd`."""
    return _loss("cwd", students, teachers, tau, scale)


def pkd(students: Maps, teachers: Maps, *, scale: Tensor | None = None) -> Tensor:
    """See `reference.pkd`."""
    return _loss("pkd", students, teachers, scale)


def fgd(
    students: Maps,
    teachers: Maps,
    masks: Maps,
    gamma: float = 1.0,
    temperature: float = 0.5,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """See `reference.fgd`."""
    return _loss("fgd", students, teachers, masks, gamma, temperature, scale)


def _loss(name: str, students: Maps, teachers: Maps, *others: Any) -> Tensor:
    _refuse_unlike(students, teachers, others, same_channels=name != "adapter_mse")
    if not all(map(Tensor.numel, students)):
        return torch.cat([s.float().flatten() for s in students]).sum() * 0  # no images, and still a gradient
    lists = ([*other] if isinstance(other, Sequence) else other for other in others)
    arguments = ([*students], [*teachers], *lists)
    if runs_fused(students):
        _refuse_elsewhere(arguments)
        return fused.apply(name, arguments)
    return fused.FUSED[name].reference(*arguments[:-1])


def _refuse_unlike(students: Maps, teachers: Maps, others: Sequence[Any], *, same_channels: bool) -> None:
    """Raise a UsageError unless every level's maps, and the maps of its pixels, have one shape."""
    lists = [other for other in others if isinstance(other, Sequence) and len(other)]
    if len({len(students), len(teachers), *map(len, lists)}) != 1:
        raise UsageError(f"{len(students)} student maps, {len(teachers)} teacher maps", "give one of each a level")
    pixel_maps = [tensor for other in lists for tensor in other if tensor.dim() == PIXEL_MAP_DIMS]
    for level, (s, t) in enumerate(zip(students, teachers, strict=True)):
        pixels = [m.shape for m in pixel_maps[level :: len(students)]]
        ours, theirs = (s.shape, t.shape) if same_channels else (_pixels(s), _pixels(t))
        if ours != theirs or any(shape != _pixels(s) for shape in pixels):
            told = ", ".join(str(tuple(shape)) for shape in (s.shape, t.shape, *pixels))
            raise UsageError(f"level {level} has maps of unlike shapes: {told}", "compare maps of the same images")


def _refuse_elsewhere(arguments: Sequence[Any]) -> None:
    """Raise a UsageError unless all tensors are on one GPU and the scale is float32: a kernel would read past them."""
    *others, scale = arguments
    tensors = [tensor for other in others if isinstance(other, list) for tensor in other]
    devices = {tensor.device for tensor in (tensors if scale is None else [*tensors, scale])}
    if len(devices) != 1:
        raise UsageError(f"tensors on {', '.join(sorted(map(str, devices)))}", "give all of them on one GPU")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise UsageError(f"scale is {tuple(scale.shape)} {scale.dtype}", "give one float32")


def _pixels(tensor: Tensor) -> tuple[int, ...]:
    """(N, H, W) of (N, C, H, W)."""
    return tensor.shape[0], *tensor.shape[2:]


def runs_fused(students: Maps) -> bool:
    """Whether the kernels serve these maps: on an NVIDIA GPU, all in float32, float16 or bfloat16."""
    first = students[0]
    alike = all(s.is_cuda and s.dtype == first.dtype for s in students)
    served = alike and first.dtype in SUFFIX and len(students) <= MAX_LEVELS
    return served and os.environ.get(SWITCH) != "off" and not why_not(first.device.index)


@torch.compiler.assume_constant_result  # or torch.compile would trace into the CUDA driver's bindings
def why_not(index: int) -> str:
    """Why kernels cannot run on cuda:`index`; empty where they can."""
    return _looked_up(index)


@cache
def _looked_up(index: int) -> str:
    """`why_not`, looked up once; warns, since plain torch is slower."""
    try:
        gpu(index)
    except EdgestillError as error:
        warnings.warn(f"the fused kernels cannot run, plain torch is used: {error}", stacklevel=2)
        return str(error)
    return ""
