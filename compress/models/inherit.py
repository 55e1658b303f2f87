"""Start a student from slices of a larger network: weight inheritance.

In: a source network, and a student of the same layout that is nowhere wider. Out: the student, each of whose layers has
those channels of the source's layer whose BatchNorm has the largest |gamma|, with all weights between kept channels.
A slice changes what every channel sees, so `recalibrate` then measures the BatchNorm statistics afresh, and `fit_head`
finds the head's 1x1 convolutions by ridge regression on the source's outputs.

Sources: Xu et al., "Initializing models with larger ones", ICLR 2024 (slices as a start); Liu et al., "Network
slimming", ICCV 2017 (|gamma| as a channel's importance).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.compute.ridge import Moments, ridge
from compress.models.architecture import Architecture
from compress.models.blocks import C3, SPP, SPPF, BottleneckCSP, Concat, Conv, Detect, Focus, Upsample
from compress.models.network import YOLOv5
from runtime.errors import UsageError

RIDGE = 1e-3
"""Penalty, as a share of the mean diagonal of the features' second moments."""
BOX_COLUMNS = 5
"""tx, ty, tw, th, objectness: they come before the classes."""
Block = Any
"""A module of `compress.models.blocks`: torch types the attributes of modules too loosely to name it."""


class Kept(NamedTuple):
    """Which channels of one of the source's maps the student has."""

    indices: Tensor
    """(k,) int64, in the student's order."""
    width: int
    """Channels of the source's map."""


class Inheritance(NamedTuple):
    """The part of a student that it took over."""

    parameters: int
    """Parameters of the student whose values are the source's."""
    total: int
    classes: tuple[str, ...]
    """Classes that both networks know, whose outputs were copied."""
    fresh: tuple[str, ...]
    """Blocks that the source does not have; with a residual they start as the identity."""


# ---- whether it can be done -----------------------------------------------------------------------------------------


def why_not(student: Architecture, source: Architecture) -> str:
    """Why the student cannot be a slice of the source; empty where it can. Activations may differ."""
    if student.layout != source.layout:
        return f"the student's layout is {student.layout}, the larger network's {source.layout}"
    if student.width > source.width:
        return f"the student is wider ({student.width:g}) than the larger network ({source.width:g})"
    if student.na != source.na:
        return f"the student has {student.na} anchors a level, the larger network {source.na}"
    return ""


@torch.no_grad()
def inherit(student: YOLOv5, source: YOLOv5, classes: Sequence[int | None] | None = None) -> Inheritance:
    """Copy slices of `source` into `student`, in place. Equal widths and depths copy everything.

    `classes` names for each class of the student the source's class that it is, or None; without it they are matched by
    name. The outputs of others stay as they are. Bottlenecks are matched by position; those that the source lacks start
    as the identity, those that the student lacks are left out. Raises UsageError when the student is not a slice of the
    source.
    """
    if classes is None:
        classes = classes_by_name(student.arch, source.arch)
    if reason := why_not(student.arch, source.arch):
        raise UsageError(reason, "Choose a student of the same layout that is not wider, or --init scratch")
    kept: list[Kept] = []
    fresh: list[str] = []
    for index, (own, theirs, layer) in enumerate(zip(student.model, source.model, student.arch.layers, strict=True)):
        inputs = [kept[i] for i in layer.source] if kept else [_all(3)]
        if isinstance(theirs, Detect):
            _detect(own, theirs, inputs, classes)
            break
        kept.append(_LAYERS[type(theirs)](own, theirs, inputs))
        fresh += [f"model.{index}.m.{i}" for i in range(_bottlenecks(theirs), _bottlenecks(own))]
    return _summary(student, classes, fresh)


def classes_by_name(student: Architecture, source: Architecture) -> list[int | None]:
    """For each class of the student the source's class of that name, or None."""
    return [source.names.index(name) if name in source.names else None for name in student.names]


def _summary(student: YOLOv5, sources: Sequence[int | None], fresh: Sequence[str]) -> Inheritance:
    classes = tuple(name for name, source in zip(student.arch.names, sources, strict=True) if source is not None)
    total = sum(parameter.numel() for parameter in student.parameters())
    unknown = student.arch.nc - len(classes)
    rows = sum(unknown * student.arch.na * (channels + 1) for channels in student.feature_channels)
    new = sum(p.numel() for name in fresh for p in student.get_submodule(name).parameters())
    return Inheritance(total - rows - new, total, classes, tuple(fresh))


# ---- one block at a time: (student's, source's, kept inputs) -> kept outputs --------------------------------------


def _all(width: int) -> Kept:
    return Kept(torch.arange(width), width)


def _joined(parts: Sequence[Kept]) -> Kept:
    """Maps that stand beside each other in one."""
    starts = [0, *accumulate(part.width for part in parts)]
    indices = [part.indices + start for part, start in zip(parts, starts, strict=False)]
    return Kept(torch.cat(indices), starts[-1])


def _strongest(gammas: Sequence[Tensor], count: int) -> Kept:
    """The `count` channels with the largest |gamma|, ascending. Several BatchNorms that share one set weigh alike."""
    score = torch.stack([g.abs() / g.abs().mean().clamp_min(1e-12) for g in gammas]).sum(0)
    return Kept(score.topk(count).indices.sort().values, len(score))


def _copy(own: Block, theirs: Block, inputs: Kept, outputs: Kept) -> None:
    own.weight.copy_(theirs.weight[outputs.indices][:, inputs.indices])


def _copy_norm(own: Block, theirs: Block, outputs: Kept) -> None:
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(own, name).copy_(getattr(theirs, name)[outputs.indices])


def _conv(own: Block, theirs: Block, inputs: Kept, outputs: Kept | None = None) -> Kept:
    outputs = outputs or _strongest([theirs.bn.weight], own.conv.out_channels)
    _copy(own.conv, theirs.conv, inputs, outputs)
    _copy_norm(own.bn, theirs.bn, outputs)
    return outputs


def _chain(own: Block, theirs: Block, inputs: Kept) -> Kept:
    """`cv1` and the bottlenecks behind it.

    A residual adds maps, so all that it adds share one set of channels. A bottleneck that the student lacks counts as
    the identity, so the maps before and behind it share one set as well.
    """
    pairs = list(zip(own.m, theirs.m, strict=False))
    gammas = [conv.bn.weight for conv in (theirs.cv1, *(block.cv2 for block in theirs.m))]
    linked = 0 if theirs.m[0].add else len(pairs)
    width = own.cv1.conv.out_channels
    streams = [_strongest([gamma], width) for gamma in gammas[:linked]]
    streams += [_strongest(gammas[linked:], width)] * (len(pairs) + 1 - linked)
    _conv(own.cv1, theirs.cv1, inputs, streams[0])
    for (block, source), before, after in zip(pairs, streams, streams[1:], strict=False):
        _conv(block.cv2, source.cv2, _conv(block.cv1, source.cv1, before), after)
    for block in own.m[len(pairs) :]:
        _pass_through(block)
    return streams[-1]


def _pass_through(block: Block) -> None:
    """Make a bottleneck that has no counterpart the identity where it has a residual, and near it elsewhere."""
    if block.add:
        block.cv2.bn.weight.zero_()
        block.cv2.bn.bias.zero_()
    else:
        nn.init.dirac_(block.cv1.conv.weight)
        nn.init.dirac_(block.cv2.conv.weight)


def _c3(own: Block, theirs: Block, inputs: Sequence[Kept]) -> Kept:
    chain, bypass = _chain(own, theirs, inputs[0]), _conv(own.cv2, theirs.cv2, inputs[0])
    return _conv(own.cv3, theirs.cv3, _joined([chain, bypass]))


def _csp(own: Block, theirs: Block, inputs: Sequence[Kept]) -> Kept:
    half = own.cv2.out_channels
    chain, bypass = (_strongest([gamma], half) for gamma in theirs.bn.weight.chunk(2))
    _copy(own.cv3, theirs.cv3, _chain(own, theirs, inputs[0]), chain)
    _copy(own.cv2, theirs.cv2, inputs[0], bypass)
    both = _joined([chain, bypass])
    _copy_norm(own.bn, theirs.bn, both)
    return _conv(own.cv4, theirs.cv4, both)


def _pooled(maps: int) -> Callable[[Block, Block, Sequence[Kept]], Kept]:
    """A map and its pooled forms stand beside each other, `maps` in all."""

    def copy(own: Block, theirs: Block, inputs: Sequence[Kept]) -> Kept:
        return _conv(own.cv2, theirs.cv2, _joined([_conv(own.cv1, theirs.cv1, inputs[0])] * maps))

    return copy


_LAYERS: dict[type[nn.Module], Callable[..., Kept]] = {
    Conv: lambda own, theirs, inputs: _conv(own, theirs, inputs[0]),
    Focus: lambda own, theirs, inputs: _conv(own.conv, theirs.conv, _joined([inputs[0]] * 4)),
    C3: _c3,
    BottleneckCSP: _csp,
    SPP: _pooled(4),
    SPPF: _pooled(4),
    Concat: lambda _, __, inputs: _joined(inputs),
    Upsample: lambda _, __, inputs: inputs[0],
}


def _bottlenecks(block: Block) -> int:
    return len(block.m) if isinstance(block, (C3, BottleneckCSP)) else 0


def _detect(own: Block, theirs: Block, inputs: Sequence[Kept], classes: Sequence[int | None]) -> None:
    known = [(index, source) for index, source in enumerate(classes) if source is not None]
    columns = [[*range(BOX_COLUMNS), *(BOX_COLUMNS + pair[side] for pair in known)] for side in (0, 1)]
    for conv, source, kept in zip(own.m, theirs.m, inputs, strict=True):
        # an assignment by index, unlike copy_, does not move values to another device
        weight, bias = source.weight[:, kept.indices].to(conv.weight.device), source.bias.to(conv.bias.device)
        _columns(conv.weight, own)[:, columns[0]] = _columns(weight, theirs)[:, columns[1]]
        _columns(conv.bias, own)[:, columns[0]] = _columns(bias, theirs)[:, columns[1]]


def _columns(tensor: Tensor, head: Block) -> Tensor:
    """(na * no, ...) -> (na, no, ...)."""
    return tensor.view(head.na, head.no, *tensor.shape[1:])


# ---- what a slice needs before its first step ---------------------------------------------------------------------


@torch.no_grad()
def recalibrate(model: YOLOv5, batches: Iterable[Tensor]) -> None:
    """BatchNorm statistics measured afresh: means over `batches`, float images (B, 3, H, W). Weights do not change."""
    norms: list[Any] = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta, was_training = [norm.momentum for norm in norms], model.training
    for norm in norms:
        norm.reset_running_stats()
    model.train()
    for number, images in enumerate(batches, 1):
        for norm in norms:
            norm.momentum = 1 / number  # a cumulative mean
            norm.num_batches_tracked.fill_(number)
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(was_training)


@torch.no_grad()
def fit_head(model: YOLOv5, batches: Iterable[tuple[Tensor, Sequence[Tensor]]], unknown: Collection[int] = ()) -> None:
    """Set the head's 1x1 convolutions to the ridge regression of another network's raw maps on the model's features.

    In float64, level by level, over all cells of `batches`: float images (B, 3, H, W), and what the model is to give
    for them, per level (B, na, H, W, 5 + nc) logits. The outputs of the classes `unknown` stay as they are.
    """
    own = [*range(BOX_COLUMNS), *(BOX_COLUMNS + index for index in range(model.arch.nc) if index not in unknown)]
    sums: list[Moments] = []
    was_training = model.training
    model.eval()
    for images, wanted in batches:
        _, features = model.forward_features(images)
        moments = [_moments(x, y[..., own]) for x, y in zip(features, wanted, strict=True)]
        sums = [one.plus(other) for one, other in zip(sums, moments, strict=True)] if sums else moments
    model.train(was_training)
    head: Block = model.detect
    for conv, level in zip(head.m, sums, strict=True):
        matrix, offset = ridge(level, RIDGE)
        matrix = matrix.reshape(head.na, len(own), -1).to(conv.weight.dtype)
        _columns(conv.weight, head)[:, own] = matrix[..., None, None]
        _columns(conv.bias, head)[:, own] = offset.view(head.na, len(own)).to(conv.bias.dtype)


def _moments(features: Tensor, raw: Tensor) -> Moments:
    """The moments of one level's cells: features (B, C, H, W), and raw maps (B, na, H, W, columns) as targets."""
    return Moments.of(features.permute(0, 2, 3, 1).flatten(0, 2), raw.permute(0, 2, 3, 1, 4).flatten(0, 2).flatten(1))
