"""Launcher of kernel.cu, which multiplies gradients by actual / expected upstream gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from compress.kernels.device import (
    SUFFIX,
    Device,
    Launch,
    fields,
    fits_vectors,
    pointer,
    set_blocks,
    share_blocks,
    vector,
    with_constants,
)

THREADS = 256
BLOCKS = 1024
MAX_TENSORS = 8
"""Tensors of one launch."""
SOURCE = with_constants("rescale", THREADS=THREADS, MAX_TENSORS=MAX_TENSORS)


class _Entry(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "source target"),
        ("elements", ctypes.c_uint64),
        *fields(ctypes.c_uint32, "first_block blocks vectorised unused"),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("tensors", _Entry * MAX_TENSORS),
        *fields(ctypes.c_void_p, "upstream assumed"),
        ("count", ctypes.c_int32),
    )


def rescale(
    device: Device, gradients: Sequence[Tensor], upstream: Tensor, assumed: Tensor | None, *, in_place: bool
) -> list[Tensor]:
    """Each gradient times upstream / assumed; the same tensors, changed, if `in_place`, else new ones.

    Args:
        gradients: dense, each in a dtype of its own.
        upstream, assumed: () float32 on the device; no `assumed` is 1, and so is 0 (see `assumed_scale`).
    """
    results = [g if in_place else torch.empty_like(g) for g in gradients]
    pairs = list(zip(gradients, results, strict=True))
    for dtype in {g.dtype for g in gradients}:
        alike = [pair for pair in pairs if pair[0].dtype == dtype]
        for start in range(0, len(alike), MAX_TENSORS):
            _launch(device, alike[start : start + MAX_TENSORS], upstream, assumed)
    return results


def _launch(device: Device, pairs: Sequence[tuple[Tensor, Tensor]], upstream: Tensor, assumed: Tensor | None) -> None:
    shares = share_blocks([source.numel() for source, _ in pairs], BLOCKS, THREADS * vector(pairs[0][0].dtype))
    args = Args(upstream=pointer(upstream), assumed=pointer(assumed), count=len(pairs))
    set_blocks(args.tensors, shares)
    for entry, (source, target) in zip(args.tensors, pairs, strict=False):
        entry.source, entry.target, entry.elements = pointer(source), pointer(target), source.numel()
        entry.vectorised = fits_vectors(source.numel(), source, target)
    device.launch(Launch(SOURCE, f"rescale{SUFFIX[pairs[0][0].dtype]}", args, sum(shares), THREADS))
