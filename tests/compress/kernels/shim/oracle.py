"""The result that a kernel must give, by the reference in float64 on the same rounded inputs, and the tolerances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.kernels import soft_head
from compress.kernels.fused import FusedLoss, are_tensors
from shim import figures

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRADIENT_TOLERANCE = {torch.float32: 2e-6, torch.float16: 6e-4, torch.bfloat16: 5e-3}
"""Relative L2 error; in half precision it is the rounding of the stored gradient."""
LOSS_TOLERANCE = 2e-5
"""Relative."""
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
ANCHORS = 3


class Result(NamedTuple):
    loss: Tensor
    gradients: list[Tensor]


def pair(
    shape: Sequence[int], dtype: torch.dtype, *, seed: int = 0, mean: float = 0.7, layout: str = "nchw", skip: int = 0
) -> tuple[Tensor, Tensor]:
    """Student and teacher maps that differ and correlate; `skip` elements off the alignment of 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    s = 2 * torch.randn(*shape, generator=generator) + mean
    t = 1.5 * torch.randn(*shape, generator=generator) - 0.3 + 0.4 * s
    return laid(s.to(dtype), layout, skip), laid(t.to(dtype), layout, skip)


def pairs(shapes: Sequence[Sequence[int]], dtype: torch.dtype, **options: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Student and teacher maps of several levels, each a `pair` of its own."""
    made = [pair(shape, dtype, seed=level, **options) for level, shape in enumerate(shapes)]
    return [s for s, _ in made], [t for _, t in made]


def pixel_weights(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """(N, H, W) in [0, 1) for each (N, C, H, W)."""
    return [torch.rand(n, h, w, generator=torch.Generator().manual_seed(9)) for n, _, h, w in shapes]


def laid(x: Tensor, layout: str = "nchw", skip: int = 0) -> Tensor:
    """A copy in `layout` that starts `skip` elements behind an aligned address. A head's map (B, na, H, W, 5 + nc) in
    channels last is as a convolution writes it: (B, H, W, na, 5 + nc).
    """
    if x.dim() == 5 and layout == "channels_last":
        x = x.permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    else:
        x = x.contiguous(memory_format=LAYOUTS[layout])
    room = torch.empty(x.numel() + skip, dtype=x.dtype, device=x.device)
    y = room[skip:].as_strided(x.shape, x.stride(), storage_offset=skip)
    return y.copy_(x)


def head_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape (N, na, H, W, 5 + nc) of a head's map that is about as large as feature maps (N, C, H, W)."""
    n, c, h, w = shape
    return n, ANCHORS, h, w, 5 + -(-c // ANCHORS)


def head_pairs(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """As `pairs`, of the heads' maps of `head_shape`, the teachers `with_clear_limit`."""
    students, teachers = pairs([head_shape(shape) for shape in shapes], dtype, **options)
    return students, [with_clear_limit(teacher) for teacher in teachers]


def with_clear_limit(teacher: Tensor) -> Tensor:
    """A teacher's map, changed so that no gate of its top cells has an equal beyond them, where it is not defined which
    of them count.
    """
    logits = teacher[..., 4].flatten(1)
    rank = logits.argsort(1, descending=True).argsort(1).view(teacher.shape[:-1])
    teacher[..., 4] += (rank < soft_head.TOP_CELLS).to(teacher.dtype) - 0.5
    return teacher


def head_anchors(levels: int) -> list[Tensor]:
    """(na, 2) per level, in cells."""
    return list(1 + 3 * torch.rand(levels, ANCHORS, 2, generator=torch.Generator().manual_seed(2)))


def upstream(students: Sequence[Tensor]) -> Tensor:
    """An expected upstream gradient that gives float16 gradients normal sizes, as a gradient scaler does."""
    return torch.tensor(8.0 * max(s.numel() for s in students), device=students[0].device)


def truth(reference: Callable[..., Tensor], arguments: Sequence[Any], learns: Sequence[int] = (0,)) -> Result:
    """Loss and gradients by autograd of the reference in float64; `arguments` end with the upstream gradient."""
    return by_autograd(reference, arguments, learns, torch.float64)


def by_autograd(
    reference: Callable[..., Tensor], arguments: Sequence[Any], learns: Sequence[int], dtype: torch.dtype | None
) -> Result:
    """In `dtype`, or as the arguments are: then it is what eager torch gives."""

    def wide(value: Any) -> Any:
        if are_tensors(value):
            return [tensor.to(dtype or tensor.dtype) for tensor in value]
        return value

    *inputs, scale = map(wide, arguments)
    learners: list[Tensor] = []
    for place in learns:
        inputs[place] = [tensor.detach().clone().requires_grad_() for tensor in inputs[place]]
        learners += inputs[place]
    loss = reference(*inputs)
    factor = torch.ones_like(loss) if scale is None else scale.to(loss.dtype)
    return Result(loss.detach(), list(torch.autograd.grad(loss, learners, factor)))


def kernels_of(loss: FusedLoss) -> Callable[..., Result]:
    """The loss as a function of a device, the arguments, and options of its launcher."""
    return lambda device, *arguments, **options: Result(*loss.run(device, arguments, **options))


def by_kernels(kernels: Callable[..., Result], device: Any, arguments: Sequence[Any]) -> Result:
    return kernels(device, *arguments)


def gradient_error(found: Tensor, true: Tensor) -> float:
    """Relative L2 error; absolute if the truth is 0."""
    norm = true.norm().item()
    return ((found.double() - true).norm() / (norm or 1.0)).item()


def errors(found: Result, true: Result) -> tuple[float, float]:
    """Relative error of the loss, and the largest of a gradient."""
    loss = abs(found.loss.item() - true.loss.item()) / (abs(true.loss.item()) or 1.0)
    pairs = zip(found.gradients, true.gradients, strict=True)
    return loss, max(gradient_error(f, t) for f, t in pairs)


def same_bits(first: Result, *others: Result) -> bool:
    """Whether all have the bits of the first."""
    expected = [first.loss, *first.gradients]
    found = ([other.loss, *other.gradients] for other in others)
    return all(torch.equal(x, y) for tensors in found for x, y in zip(tensors, expected, strict=True))


def check(
    kernels: Callable[..., Result],
    reference: Callable[..., Tensor],
    device: Any,
    arguments: Sequence[Any],
    learns: Sequence[int] = (0,),
) -> tuple[float, float]:
    """Assert that kernels agree with the truth within the tolerances, and are no worse than twice eager torch."""
    found, true = by_kernels(kernels, device, arguments), truth(reference, arguments, learns)
    learners = [tensor for place in learns for tensor in arguments[place]]
    assert found.loss.dtype == torch.float32
    loss, gradient = errors(found, true)
    tolerance = GRADIENT_TOLERANCE[arguments[0][0].dtype]
    assert loss <= LOSS_TOLERANCE, f"loss off by {loss:.1e}: {found.loss.item()} instead of {true.loss.item()}"
    eager = by_autograd(reference, arguments, learns, None)
    for f, t, e, learner in zip(found.gradients, true.gradients, eager.gradients, learners, strict=True):
        assert f.shape == learner.shape
        error = gradient_error(f, t)
        assert error <= tolerance, f"gradient {tuple(f.shape)} off by {error:.1e}"
        assert error <= max(2 * gradient_error(e, t), tolerance / 4), f"worse than twice eager: {error:.1e}"
    figures.compared(arguments[0][0].dtype, gradient)
    return loss, gradient
