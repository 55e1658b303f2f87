"""The kernels as differentiable torch functions: one `Fused` a loss, an eager path, a registered op for compiled code.

The forward pass already writes the gradient, multiplied by the upstream gradient that the caller expects (`scale`: a
gradient scaler's factor, the loss's weight, ...), because a gradient that is rounded to float16 first and multiplied
afterwards has lost up to half of its entries. The backward pass compares, on the device, what was expected with what
came, and does nothing where they agree.

Eager code goes through one `autograd.Function` (7 us on the host); compiled code through `torch.ops.edgestill.*`, which
torch can trace, at the price of a second buffer in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.kernels import reference
from compress.kernels.adapter_mse import adapter_mse
from compress.kernels.cwd import cwd
from compress.kernels.device import Device
from compress.kernels.fgd import fgd
from compress.kernels.gpu import gpu
from compress.kernels.pkd import pkd
from compress.kernels.rescale import rescale
from compress.kernels.weighted_mse import weighted_mse

NAMESPACE = "edgestill"
Arguments = Sequence[Any]
"""Of one op: lists of tensors, numbers, and the expected upstream gradient last."""


class Fused(NamedTuple):
    """A loss with kernels."""

    arguments: str
    """Of its registered op; `scale`, which comes last, is left out."""
    learns: tuple[int, ...]
    """Positions of the arguments, lists of tensors, that get a gradient."""
    kernels: Callable[..., tuple[Any, ...]]
    """Host half: a Device and the arguments -> the loss, then a list of gradients for each of `learns`."""
    reference: Callable[..., Tensor]
    """The same loss in plain torch, of the arguments without scale."""

    def learners(self, arguments: Arguments) -> list[Tensor]:
        """The tensors that get a gradient, in turn."""
        return [tensor for place in self.learns for tensor in arguments[place]]


FUSED = {
    "weighted_mse": Fused(
        "Tensor[] students, Tensor[] teachers, Tensor[] weights", (0,), weighted_mse, reference.weighted_mse
    ),
    "adapter_mse": Fused(
        "Tensor[] students, Tensor[] teachers, Tensor[] matrices, Tensor[] biases, Tensor[] weights",
        (0, 2, 3),
        adapter_mse,
        reference.adapter_mse,
    ),
    "cwd": Fused("Tensor[] students, Tensor[] teachers, float tau", (0,), cwd, reference.cwd),
    "pkd": Fused("Tensor[] students, Tensor[] teachers", (0,), pkd, reference.pkd),
    "fgd": Fused(
        "Tensor[] students, Tensor[] teachers, Tensor[] masks, float gamma, float temperature",
        (0,),
        fgd,
        reference.fgd,
    ),
}
"""Every loss with kernels, by name."""


def apply(name: str, arguments: Arguments) -> Tensor:
    """The loss of CUDA maps, differentiable once."""
    if torch.compiler.is_compiling():
        loss, _ = getattr(torch.ops.edgestill, name)(*arguments)
        return loss
    fused = FUSED[name]
    learners = fused.learners(arguments)
    return _Eager.apply(fused, gpu(learners[0].device.index), arguments, *learners)  # type: ignore[no-untyped-call]


def with_gradients(fused: Fused, device: Device, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient of each learner in the learner's dtype, by the kernels."""
    with torch.autocast(arguments[0][0].device.type, enabled=False):
        loss, *groups = fused.kernels(device, *arguments)
    gradients = (gradient for group in groups for gradient in group)
    return loss, [g.to(learner.dtype) for g, learner in zip(gradients, fused.learners(arguments), strict=True)]


def by_reference(fused: Fused, arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
    """What `with_gradients` returns, by autograd of the reference: the definition, and the op's CPU form."""
    *inputs, scale = arguments
    for place in fused.learns:
        inputs[place] = [tensor.detach().requires_grad_() for tensor in inputs[place]]
    with _autograd_inside_an_op(), torch.enable_grad():
        loss = fused.reference(*inputs)
        upstream = torch.ones_like(loss) if scale is None else scale.to(loss.dtype)
        return loss.detach(), list(torch.autograd.grad(loss, fused.learners(inputs), upstream))


@contextmanager
def _autograd_inside_an_op() -> Iterator[None]:
    """Torch runs an op's implementation with autograd switched off below it; this switches it on again."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView)
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fused: Fused, device: Device, arguments: Arguments, *_learners: Tensor) -> Tensor:
        loss, ctx.gradients = with_gradients(fused, device, arguments)
        ctx.device, ctx.scale = device, arguments[-1]
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradient of this loss was used up; call backward(retain_graph=True) the first time")
        keep = _graph_is_kept()
        gradients = rescale(ctx.device, ctx.gradients, upstream, ctx.scale, in_place=not keep)
        if not keep:
            ctx.gradients = None
        return None, None, None, *gradients


def _graph_is_kept() -> bool:
    """Whether the running backward pass was asked to retain its graph. Private to torch; nothing public tells."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


# ---- registered ops -----------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "DEF")


def _register(name: str, fused: Fused) -> None:
    _library.define(f"{name}({fused.arguments}, Tensor? scale) -> (Tensor, Tensor[])")
    op = f"{NAMESPACE}::{name}"

    def as_declared(loss: Tensor, gradients: list[Tensor], arguments: Arguments) -> tuple[Tensor, list[Tensor]]:
        """Strides of `shapes`: a part of a channels-last map has another gradient than compiled code expects."""
        pairs = zip(gradients, fused.learners(arguments), strict=True)
        return loss, [g if g.stride() == x.stride() else torch.empty_like(x).copy_(g) for g, x in pairs]

    def on_gpu(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        return as_declared(*with_gradients(fused, gpu(arguments[0][0].device.index), arguments), arguments)

    def on_cpu(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        return as_declared(*by_reference(fused, arguments), arguments)

    def shapes(*arguments: Any) -> tuple[Tensor, list[Tensor]]:
        learners = fused.learners(arguments)
        wide = torch.float64 if learners[0].dtype == torch.float64 else torch.float32
        return learners[0].new_empty((), dtype=wide), [torch.empty_like(tensor) for tensor in learners]

    def keep(ctx: Any, inputs: Arguments, output: tuple[Tensor, list[Tensor]]) -> None:
        ctx.lengths = [len(value) if isinstance(value, (list, tuple)) else None for value in inputs]
        ctx.save_for_backward(inputs[-1], *output[1])

    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
        results: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
        scale, *gradients = ctx.saved_tensors
        scaled = iter(torch.ops.edgestill.rescale(gradients, upstream, scale))
        for place in fused.learns:
            results[place] = [next(scaled) for _ in results[place]]
        return tuple(results)

    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, on_cpu, "CPU")
    torch.library.register_fake(op, shapes, lib=_library)
    torch.library.register_autograd(op, backward, setup_context=keep, lib=_library)


def _rescale_on_cpu(gradients: list[Tensor], upstream: Tensor, assumed: Tensor | None) -> list[Tensor]:
    ratio = upstream if assumed is None else upstream / torch.where(assumed == 0, 1, assumed)
    return [gradient * ratio.to(gradient.dtype) for gradient in gradients]


def _rescale_on_gpu(gradients: list[Tensor], upstream: Tensor, assumed: Tensor | None) -> list[Tensor]:
    return rescale(gpu(upstream.device.index), gradients, upstream, assumed, in_place=False)


def _like_the_gradients(gradients: list[Tensor], *_: Any) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


_library.define("rescale(Tensor[] gradients, Tensor upstream, Tensor? assumed) -> Tensor[]")
_library.impl("rescale", _rescale_on_cpu, "CPU")
_library.impl("rescale", _rescale_on_gpu, "CUDA")
torch.library.register_fake(f"{NAMESPACE}::rescale", _like_the_gradients, lib=_library)
for _name, _fused in FUSED.items():
    _register(_name, _fused)
