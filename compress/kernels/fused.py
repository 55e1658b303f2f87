"""Code that all losses with kernels share: where they run, their gradient, and their registration with torch.

The forward pass already writes the gradient, multiplied by the upstream gradient that the caller expects (`scale`: a
gradient scaler's factor, the loss's weight, ...), because a gradient that is rounded to float16 first and multiplied
afterwards has lost up to half of its entries. The backward pass compares, on the device, the expected upstream gradient
with the real one, and does nothing if they are equal.

Eager code queues the kernels and registers their gradient with one `autograd.Function` (7 us on the
host); compiled code calls `torch.ops.edgestill.*`, which torch can trace but which needs a second buffer in the
backward pass. On a CPU, and with `EDGESTILL_KERNELS=off`, a loss is its reference in plain torch.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from compress.kernels.device import MAX_ELEMENTS, MAX_LEVELS, SUFFIX, Device, Launches, Maps, Result
from compress.kernels.gpu import Gpu, gpu
from compress.kernels.rescale import rescale
from compress.kernels.toolchain import Source
from runtime.errors import EdgestillError, UsageError

NAMESPACE = "edgestill"
SWITCH = "EDGESTILL_KERNELS"
"""Environment variable; `off` forces the reference."""
Arguments = Sequence[Any]
"""A loss's arguments: lists of tensors or numbers, numbers, and the expected upstream gradient last."""


class FusedLoss:
    """A loss with kernels, registered as the op `torch.ops.edgestill.<name>`.

    Args:
        name: name of the op.
        schema: arguments of the op in torch's notation; `scale`, which comes last, is left out.
        function: the public function, which takes the same arguments and `scale` by name.
        source: the CUDA source.
        launches: launcher of the kernels: a Device and the arguments -> launches, then loss and gradients.
        reference: the same loss in plain torch, of the arguments without scale.
        learns: positions of the arguments, lists of tensors, that get a gradient; no other does.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        *,
        function: Callable[..., Tensor],
        source: Source,
        launches: Callable[..., Launches],
        reference: Callable[..., Tensor],
        learns: tuple[int, ...] = (0,),
    ) -> None:
        self.name, self.function, self.source = name, function, source
        self.launches, self.reference, self.learns = launches, reference, learns
        self.parameters = tuple(declared.split()[-1] for declared in schema.split(","))
        _register(self, schema)

    def learners(self, arguments: Arguments) -> list[Tensor]:
        """The tensors that get a gradient, in turn."""
        return [tensor for place in self.learns for tensor in arguments[place]]

    def device(self, arguments: Arguments) -> Gpu | None:
        """The GPU on which `run` computes these arguments; None if `by_torch` must."""
        students = arguments[0]
        if torch.compiler.is_compiling() or is_empty(students) or not runs_fused(students):
            return None
        check_places(arguments)
        return gpu(students[0].device.index)

    def run(self, device: Device, arguments: Arguments, **options: Any) -> Result:
        """Queue the kernels. Returns the loss, and each learner's gradient in the learner's dtype."""
        with torch.no_grad(), torch.autocast(arguments[0][0].device.type, enabled=False):
            launches = self.launches(device, *arguments, **options)
            while True:
                try:
                    launch = next(launches)
                except StopIteration as finished:
                    loss, gradients = finished.value
                    break
                device.launch(launch)
        return loss, [g.to(x.dtype) for g, x in zip(gradients, self.learners(arguments), strict=True)]

    def differentiable(self, device: Device, result: Result, arguments: Arguments) -> Tensor:
        """The loss of `run` as a tensor that autograd differentiates once."""
        return _PrecomputedGradient.apply(result, device, arguments[-1], *self.learners(arguments))  # type: ignore[no-untyped-call]

    def by_torch(self, arguments: Arguments) -> Tensor:
        """The loss by the registered op if the code is compiled for a GPU or counted, else by its reference."""
        *inputs, _ = arguments
        students = inputs[0]
        if is_empty(students):
            return torch.cat([s.float().flatten() for s in students]).sum() * 0  # no images, and still a gradient
        if _Mode.counts or (torch.compiler.is_compiling() and runs_fused(students)):
            check_places(arguments)
            loss, _ = getattr(torch.ops.edgestill, self.name)(*arguments)
            return loss
        return self.reference(*(self._constant(place, value) for place, value in enumerate(inputs)))

    def _constant(self, place: int, value: Any) -> Any:
        is_constant = are_tensors(value) and place not in self.learns
        return [tensor.detach() for tensor in value] if is_constant else value

    def by_reference(self, arguments: Arguments) -> Result:
        """The same result as `run`, by autograd of the reference: the op's CPU form."""
        *inputs, scale = arguments
        for place in self.learns:
            inputs[place] = [tensor.detach().requires_grad_() for tensor in inputs[place]]
        with _autograd_inside_an_op(), torch.enable_grad():
            loss = self.reference(*inputs)
            upstream = torch.ones_like(loss) if scale is None else scale.to(loss.dtype)
            return loss.detach(), list(torch.autograd.grad(loss, self.learners(inputs), upstream))


# ---- what the arguments must be -----------------------------------------------------------------------------------


def check_maps(students: Maps, teachers: Maps, pixel_maps: Maps = (), *, same_channels: bool = True) -> None:
    """Raises UsageError unless every level has one map of each kind, and they belong to the same images.

    Students and teachers are (N, C, H, W), the `pixel_maps` (N, H, W), of which there may be none at all.
    """
    counts = {len(students), len(teachers), *([len(pixel_maps)] if pixel_maps else [])}
    if len(counts) != 1 or 0 in counts:
        told = f"{len(students)} student maps, {len(teachers)} teacher maps"
        raise UsageError(f"{told}, {len(pixel_maps)} maps of pixels", "Give one of each per level")
    for level, (s, t) in enumerate(zip(students, teachers, strict=True)):
        pixels = [pixel_maps[level].shape] if pixel_maps else []
        ours, theirs = (s.shape, t.shape) if same_channels else (_pixels(s), _pixels(t))
        if ours != theirs or any(shape != _pixels(s) for shape in pixels):
            told = ", ".join(str(tuple(shape)) for shape in (s.shape, t.shape, *pixels))
            raise UsageError(f"level {level} has maps of unlike shapes: {told}", "Compare maps of the same images")


def _pixels(tensor: Tensor) -> tuple[int, ...]:
    """(N, H, W) of (N, C, H, W)."""
    return tensor.shape[0], *tensor.shape[2:]


def are_tensors(argument: Any) -> bool:
    """Whether an argument is a list of tensors, one a level, or an empty list."""
    return isinstance(argument, (list, tuple)) and all(isinstance(value, Tensor) for value in argument)


def check_places(arguments: Arguments) -> None:
    """Raises UsageError unless all tensors are on one GPU and the scale is float32: kernels do not check addresses."""
    *others, scale = arguments
    tensors = [tensor for other in others if are_tensors(other) for tensor in other]
    devices = {tensor.device for tensor in (tensors if scale is None else [*tensors, scale])}
    if len(devices) != 1:
        raise UsageError(f"tensors on {', '.join(sorted(map(str, devices)))}", "Give all of them on one GPU")
    if scale is not None and (scale.dtype != torch.float32 or scale.numel() != 1):
        raise UsageError(f"scale is {tuple(scale.shape)} {scale.dtype}", "Give one float32")


def is_empty(students: Maps) -> bool:
    """Whether a level has no element, as for a batch without images."""
    return not all(map(Tensor.numel, students))


# ---- where it runs ------------------------------------------------------------------------------------------------


class _Mode:
    """A plain attribute, as torch.compile cannot read a context variable."""

    counts = False


@contextmanager
def as_operations() -> Iterator[None]:
    """Let every loss be its registered op, on any device: for counting, with tensors without data."""
    _Mode.counts = True
    try:
        yield
    finally:
        _Mode.counts = False


def runs_fused(students: Maps) -> bool:
    """Whether the kernels serve these maps: on an NVIDIA GPU, all in float32, float16 or bfloat16, none too large."""
    first = students[0]
    alike = all(s.is_cuda and s.dtype == first.dtype and s.numel() <= MAX_ELEMENTS for s in students)
    served = alike and first.dtype in SUFFIX and len(students) <= MAX_LEVELS
    return served and os.environ.get(SWITCH) != "off" and not unavailable_reason(first.device.index)


@torch.compiler.assume_constant_result  # or torch.compile would trace into the CUDA driver's bindings
def unavailable_reason(index: int) -> str:
    """Why kernels cannot run on cuda:`index`; empty if they can."""
    return _unavailable_reason(index)


@cache
def _unavailable_reason(index: int) -> str:
    """`unavailable_reason`, looked up once; warns, since plain torch is slower."""
    try:
        gpu(index)
    except EdgestillError as error:
        warnings.warn(f"the fused kernels cannot run, plain torch is used: {error}", stacklevel=2)
        return str(error)
    return ""


# ---- the gradient -------------------------------------------------------------------------------------------------


class _PrecomputedGradient(torch.autograd.Function):
    """A loss whose gradients were computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, result: Result, device: Device, scale: Tensor | None, *_learners: Tensor) -> Tensor:
        loss, ctx.gradients = result
        ctx.device, ctx.scale = device, scale
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
    """Whether the running backward pass retains its graph. Private to torch: there is no public function for it."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


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


# ---- registered ops -----------------------------------------------------------------------------------------------

_library = torch.library.Library(NAMESPACE, "DEF")


def _register(loss: FusedLoss, schema: str) -> None:
    _library.define(f"{loss.name}({schema}, Tensor? scale) -> (Tensor, Tensor[])")
    op = f"{NAMESPACE}::{loss.name}"

    def as_declared(result: Result, arguments: Arguments) -> Result:
        """With the strides of `shapes`: compiled code expects them, and a part of a channels-last map has others."""
        value, gradients = result
        pairs = zip(gradients, loss.learners(arguments), strict=True)
        return value, [g if g.stride() == x.stride() else torch.empty_like(x).copy_(g) for g, x in pairs]

    def on_gpu(*arguments: Any) -> Result:
        return as_declared(loss.run(gpu(arguments[0][0].device.index), arguments), arguments)

    def on_cpu(*arguments: Any) -> Result:
        return as_declared(loss.by_reference(arguments), arguments)

    def shapes(*arguments: Any) -> Result:
        learners = loss.learners(arguments)
        wide = torch.float64 if learners[0].dtype == torch.float64 else torch.float32
        return learners[0].new_empty((), dtype=wide), [torch.empty_like(tensor) for tensor in learners]

    def keep(ctx: Any, inputs: Arguments, output: Result) -> None:
        ctx.lengths = [len(value) if are_tensors(value) else None for value in inputs]
        ctx.save_for_backward(inputs[-1], *output[1])

    def backward(ctx: Any, upstream: Tensor, _: Any) -> tuple[Any, ...]:
        results: list[Any] = [None if length is None else [None] * length for length in ctx.lengths]
        scale, *gradients = ctx.saved_tensors
        scaled = iter(torch.ops.edgestill.rescale(gradients, upstream, scale))
        for place in loss.learns:
            results[place] = [next(scaled) for _ in results[place]]
        return tuple(results)

    _library.impl(loss.name, on_gpu, "CUDA")
    _library.impl(loss.name, on_cpu, "CPU")
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
