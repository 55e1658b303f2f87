"""Every kernel on the GPU itself. `run.sh` runs this first; without a GPU all of it is skipped.

What these tests expect can be tried without one: with EDGESTILL_TESTED_ON=shim those that need no GPU run on the host
shim (`tests/compress/kernels/test_gpu_tests.py`).
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from shapes import DETECTOR, EXTREME, LEVELS, MEDIUM, OPCHECK, SELECTIONS, SHAPES, UNLIKE, even
from shim.cases import HEAD, with_learners
from shim.device import ShimDevice
from shim.oracle import (
    DTYPES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    by_autograd,
    check,
    errors,
    gradient_error,
    head_anchors,
    head_shape,
    kernels_of,
    laid,
    pair,
    same_bits,
    truth,
    upstream,
    with_clear_limit,
)
from torch import Tensor

from compress.kernels import fused
from compress.kernels.device import Device, Launch
from compress.kernels.fused import FusedLoss
from compress.kernels.gpu import gpu
from compress.kernels.losses import FUSED
from compress.kernels.rescale import SOURCE as RESCALE

ON_SHIM = os.environ.get("EDGESTILL_TESTED_ON") == "shim"
if not (ON_SHIM or torch.cuda.is_available()):
    pytest.skip("torch sees no NVIDIA GPU", allow_module_level=True)

WORKSPACE_BYTES = {"fgd": 8 << 20, "adapter_mse": 16 << 20, "soft_head": 5 << 20}
"""Beside the gradients: FGD's float32 maps over pixels, a few of 0.8 MB per level; a copy of dW for each block; the
head's gates."""
MEBIBYTE = 1 << 20
TORCH = torch.device("cpu" if ON_SHIM else "cuda:0")
HALF = torch.float16

every_loss = pytest.mark.parametrize("name", FUSED)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
needs_gpu = pytest.mark.skipif(ON_SHIM, reason="what it looks at a GPU alone has, or its maps are too large for a CPU")


@functools.cache
def device() -> Device:
    """Where the kernels run."""
    return ShimDevice() if ON_SHIM else gpu(0)


@pytest.fixture(autouse=True)
def kernels_on_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses' own functions take the shim too, where it stands for a GPU."""
    if ON_SHIM:
        monkeypatch.setattr(FusedLoss, "device", lambda self, arguments: device())


# ---- inputs -------------------------------------------------------------------------------------------------------


def arguments(
    name: str,
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype = HALF,
    *,
    layout: str = "nchw",
    skip: int = 0,
    seed: int = 0,
    weighted: bool = False,
    scale: float | None = None,
) -> list[Any]:
    """The arguments of `name`; without `scale` the upstream gradient is one that gives gradients normal sizes."""
    generator = torch.Generator().manual_seed(9 + seed)
    if name == "adapter_mse" and dtype != torch.float32:  # others go the general way, which rounds as eager code does
        shapes = [*map(even, shapes)]
    if name == "soft_head":
        shapes = [head_shape(shape) for shape in shapes]
    large = sum(map(torch.Size.numel, map(torch.Size, shapes))) > 1 << 22
    make = pair_on_gpu if large else pair
    pairs = [make(shape, dtype, seed=seed + i, layout=layout, skip=skip) for i, shape in enumerate(shapes)]
    students, teachers = ([laid(x.to(TORCH), layout, skip) for x in maps] for maps in zip(*pairs, strict=True))
    if name == "soft_head":
        teachers = [with_clear_limit(teacher) for teacher in teachers]
    weights = [torch.rand(n, h, w, generator=generator).to(TORCH) for n, _, h, w, *_ in shapes]
    channels = [shape[1] for shape in shapes]
    matrices = [(torch.randn(c, c, generator=generator) / c**0.5).to(dtype).float().to(TORCH) for c in channels]
    biases = [torch.randn(c, generator=generator).to(dtype).float().to(TORCH) for c in channels]
    values = {
        "students": students,
        "teachers": teachers,
        "matrices": matrices,
        "biases": biases,
        "weights": weights if weighted else [],
        "masks": [w / w[0].numel() for w in weights],
        "tau": 1.0,
        "gamma": 1.0,
        "temperature": 0.5,
        "seen": teachers,
        "tells_all": True,
        "anchors": [a.to(TORCH) for a in head_anchors(len(shapes))],
        **HEAD,
        "balance": HEAD["balance"][: len(shapes)],
    }
    if scale is not None:
        expected = torch.tensor(float(scale), device=TORCH)
    elif name == "adapter_mse":  # the gradient of a matrix adds up all pixels, which eager code does in float16
        expected = upstream(students) / 32
    else:
        expected = upstream(students)
    return [*(values[parameter] for parameter in FUSED[name].parameters), expected]


def pair_on_gpu(
    shape: tuple[int, ...], dtype: torch.dtype, *, seed: int, layout: str, skip: int
) -> tuple[Tensor, Tensor]:
    """As `oracle.pair`, made where it is needed: a detector's maps take a CPU seconds."""
    generator = torch.Generator(TORCH).manual_seed(seed)
    s, t = (torch.randn(shape, generator=generator, device=TORCH) for _ in range(2))
    s = 2 * s + 0.7
    return s.to(dtype), (1.5 * t - 0.3 + 0.4 * s).to(dtype)


def learners_of(name: str, given: list[Any]) -> list[Tensor]:
    """The tensors that get a gradient, asking for one."""
    return [tensor.detach().requires_grad_() for tensor in FUSED[name].learners(given)]


def loss_of(name: str, given: list[Any]) -> Tensor:
    """By the function that the product calls."""
    return FUSED[name].function(*given[:-1], scale=given[-1])


def differentiated(name: str, given: list[Any], *upstreams: float, retain: bool = False) -> list[list[Tensor]]:
    """Gradients of the loss by autograd, for each upstream gradient in turn."""
    learners = learners_of(name, given)
    loss = loss_of(name, with_learners(name, given, learners))
    return [
        list(torch.autograd.grad(loss, learners, torch.tensor(u, device=TORCH), retain_graph=retain)) for u in upstreams
    ]


def true_gradients(name: str, given: list[Any], wanted: float) -> list[Tensor]:
    replaced = [*given[:-1], torch.tensor(wanted, device=TORCH)]
    return truth(FUSED[name].reference, replaced, FUSED[name].learns).gradients


def run_kernels(name: str, given: list[Any]) -> Any:
    return kernels_of(FUSED[name])(device(), *given)


def checked(name: str, given: list[Any]) -> tuple[float, float]:
    """See `oracle.check`."""
    return check(kernels_of(FUSED[name]), FUSED[name].reference, device(), given, FUSED[name].learns)


# ---- loss and gradient --------------------------------------------------------------------------------------------


@needs_gpu
def test_the_kernels_are_what_is_tested() -> None:
    assert fused.runs_fused([torch.ones(1, 1, 1, 1, device=TORCH)])
    assert torch.empty(5, device=TORCH).isnan().all(), "nothing is poisoned"


@every_loss
@every_dtype
@every_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss_and_gradient_are_those_of_the_definition(name, dtype, layout, shape, note):
    note(name, dtype, checked(name, arguments(name, [shape], dtype, layout=layout)))


@every_loss
@every_dtype
@every_layout
def test_several_levels_are_added_up(name, dtype, layout, note):
    note(name, dtype, checked(name, arguments(name, LEVELS, dtype, layout=layout)))


@every_loss
@every_dtype
def test_maps_off_the_alignment_are_read_right(name, dtype):
    checked(name, arguments(name, [(2, 8, 8, 8)], dtype, skip=1))


@pytest.mark.parametrize("name", ["weighted_mse", "adapter_mse"])
@every_dtype
@every_layout
def test_pixels_may_have_weights(name, dtype, layout):
    checked(name, arguments(name, LEVELS, dtype, layout=layout, weighted=True))


@needs_gpu
@every_loss
@every_layout
def test_a_detectors_maps_are_compared_right(name, layout, note):
    note(f"{name} at 640", HALF, checked(name, arguments(name, DETECTOR, layout=layout, scale=65536.0)))


@every_loss
@pytest.mark.parametrize("shape", EXTREME, ids=str)
def test_extreme_shapes_are_compared_right(name, shape):
    checked(name, arguments(name, [shape], scale=1024.0))


@every_loss
@every_dtype
@every_layout
def test_equal_maps_give_exactly_zero(name, dtype, layout):
    given = arguments(name, [(2, 8, 9, 7)], dtype, layout=layout)
    given[1] = [s.clone(memory_format=torch.preserve_format) for s in given[0]]
    if name == "adapter_mse":
        given[2], given[3] = [torch.eye(8, device=TORCH)], [torch.zeros(8, device=TORCH)]
    loss, gradients = run_kernels(name, given)
    assert loss == 0
    assert not any(g.any() for g in gradients)


@every_loss
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_the_loss(name, bad):
    """And the gradient, but for an infinite logit, whose probability is finite."""
    given = arguments(name, [(2, 8, 4, 4)])
    given[0][0][1, 2, 3, 0] = bad
    loss, gradients = run_kernels(name, given)
    assert not loss.isfinite()
    assert bool(gradients[0].isfinite().all()) == (name == "soft_head" and bad == float("inf"))


# ---- the same bits ------------------------------------------------------------------------------------------------


@needs_gpu
@every_loss
@every_dtype
@every_layout
def test_every_run_gives_the_same_bits(name, dtype, layout):
    given = arguments(name, MEDIUM, dtype, layout=layout)
    assert same_bits(*(run_kernels(name, given) for _ in range(5)))


@needs_gpu
@every_loss
def test_two_streams_at_once_give_what_one_gives(name):
    """As they would not with a ticket or a partial sum that both use."""
    givens = [arguments(name, MEDIUM, seed=seed) for seed in (0, 100)]
    alone = [run_kernels(name, given) for given in givens]
    streams = [torch.cuda.Stream() for _ in givens]
    torch.cuda.synchronize()
    found: list[list[Any]] = [[], []]
    for _ in range(20):
        for stream, given, results in zip(streams, givens, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(run_kernels(name, given))
    torch.cuda.synchronize()
    assert all(same_bits(expected, *results) for results, expected in zip(found, alone, strict=True))


@needs_gpu
@every_loss
@pytest.mark.parametrize("scale", [2.0, 65536.0])
def test_a_captured_graph_gives_what_eager_code_gives(name, scale):
    """With an upstream gradient other than the assumed one, and with other inputs at each replay."""
    given, other = (arguments(name, MEDIUM[:1], scale=scale, seed=seed) for seed in (0, 50))
    expected = [differentiated(name, inputs, 3.0)[0] for inputs in (given, other)]
    contents = [[x.clone() for x in tensors_of(inputs)] for inputs in (given, other)]
    learners = learners_of(name, given)
    inputs = with_learners(name, given, learners)
    wanted = torch.tensor(3.0, device=TORCH)
    gradients = captured(lambda: torch.autograd.grad(loss_of(name, inputs), learners, wanted))
    for turn in (0, 1, 0):
        with torch.no_grad():
            for tensor, content in zip(tensors_of(inputs), contents[turn], strict=True):
                tensor.copy_(content)
        for gradient in gradients.tensors:
            gradient.fill_(float("nan"))
        gradients.graph.replay()
        torch.cuda.synchronize()
        assert all(map(torch.equal, gradients.tensors, expected[turn]))


@needs_gpu
@every_loss
def test_two_captured_graphs_at_once_give_what_each_gives_alone(name):
    """As they would not with a ticket that both use."""
    givens = [arguments(name, MEDIUM, seed=seed) for seed in (0, 100)]
    expected = [differentiated(name, given, 3.0)[0] for given in givens]
    learners = [learners_of(name, given) for given in givens]
    wanted, graphs = torch.tensor(3.0, device=TORCH), []
    for given, own in zip(givens, learners, strict=True):
        loss = functools.partial(loss_of, name, with_learners(name, given, own))
        graphs.append(captured(lambda loss=loss, own=own: torch.autograd.grad(loss(), own, wanted)))
    streams = [torch.cuda.Stream() for _ in graphs]
    for _ in range(20):
        for stream, captive in zip(streams, graphs, strict=True):
            with torch.cuda.stream(stream):
                captive.graph.replay()
    torch.cuda.synchronize()
    for captive, gradients in zip(graphs, expected, strict=True):
        assert all(map(torch.equal, captive.tensors, gradients))


class Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    tensors: Sequence[Tensor]


def captured(step: Callable[[], Sequence[Tensor]]) -> Captured:
    """The work of `step` as a CUDA graph, and the tensors that its replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tensors = step()
    return Captured(graph, tensors)


def tensors_of(given: list[Any]) -> list[Tensor]:
    """All but the expected upstream gradient."""
    return [tensor for value in given[:-1] if fused.are_tensors(value) for tensor in value]


@needs_gpu
def test_a_call_after_a_refused_launch_is_right() -> None:
    """A failed launch must leave no error behind that a later one reports."""
    given = arguments("cwd", LEVELS)
    expected = run_kernels("cwd", given)
    with pytest.raises(Exception, match="cuLaunchKernel"):
        device().launch(Launch(RESCALE, "rescale_f16", _no_arguments(), grid=1, block=4096))
    assert same_bits(run_kernels("cwd", given), expected)


def _no_arguments() -> Any:
    from compress.kernels.rescale import Args

    return Args()


# ---- the upstream gradient ----------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("scale", [0.0, 1.0, 65536.0])
@pytest.mark.parametrize("wanted", [1.0, 65536.0, 0.0, -3.0])
def test_any_upstream_gradient_is_right_whatever_was_expected(name, scale, wanted):
    """The kernels fold the expected one in; the backward pass puts the difference right."""
    given = arguments(name, LEVELS[2:], torch.float32, scale=scale)
    (found,) = differentiated(name, given, wanted)
    for f, t in zip(found, true_gradients(name, given, wanted), strict=True):
        assert gradient_error(f, t) < 4e-6


@every_loss
def test_a_graph_that_is_kept_gives_the_right_gradient_each_time(name):
    """A gradient that was rescaled in place would be wrong the second time."""
    given, upstreams = arguments(name, LEVELS[2:], torch.float32, scale=2.0), (1.0, 3.0, 0.0, 2.0)
    for found, wanted in zip(differentiated(name, given, *upstreams, retain=True), upstreams, strict=True):
        for f, t in zip(found, true_gradients(name, given, wanted), strict=True):
            assert gradient_error(f, t) < 4e-6


@every_loss
def test_a_second_backward_through_a_freed_graph_is_refused(name):
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        differentiated(name, arguments(name, LEVELS[2:]), 1.0, 1.0)


@needs_gpu
@every_loss
def test_float16_gradients_do_not_vanish(name):
    """At the size at which most would: the scale of a new gradient scaler, folded in."""
    given = arguments(name, DETECTOR[:1], scale=65536.0)
    ((found, *_),) = differentiated(name, given, 65536.0)
    true = true_gradients(name, given, 65536.0)[0]
    lost = ((found == 0) & (true != 0)).double().mean().item()
    assert lost < 1e-3
    assert gradient_error(found, true) < 1e-3


@every_loss
def test_a_gradient_scaler_gets_the_gradient_of_float32(name):
    """A step of mixed precision: maps in float16, the loss scaled by a real gradient scaler, unscaled again."""
    scaler = torch.amp.GradScaler(TORCH.type)
    given = arguments(name, MEDIUM[1:])
    given[-1] = scaler.scale(torch.ones((), device=TORCH))
    given[0] = [s.float() for s in given[0]]
    learners = learners_of(name, given)
    optimizer = torch.optim.SGD(learners, lr=1.0)
    with torch.autocast(TORCH.type, dtype=HALF):
        inside = with_learners(name, given, learners)
        inside[0] = [s.half() for s in inside[0]]
        loss = loss_of(name, inside)
    assert loss.dtype == torch.float32
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for learner, true in zip(learners, true_gradients(name, given, 1.0), strict=True):
        assert gradient_error(learner.grad, true) < 2e-3


# ---- memory -------------------------------------------------------------------------------------------------------


@needs_gpu
@every_loss
def test_a_call_takes_one_gradient_and_little_more(name):
    shapes = DETECTOR[:1] if name == "adapter_mse" else DETECTOR  # wider adapters are matrix products with copies
    given = arguments(name, shapes, scale=65536.0)
    for _ in range(2):  # the first call also makes what stays
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_stats()["requested_bytes.all.current"]
        gradients = differentiated(name, given, 65536.0)[0]
        peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
        own = sum(g.nbytes for g in gradients)
        del gradients
    assert peak <= own + WORKSPACE_BYTES.get(name, MEBIBYTE)


# ---- threads, compilers, ops --------------------------------------------------------------------------------------


BACKWARD_FIRST = """
import threading, torch
from compress.kernels.weighted_mse import weighted_mse

def compare(found):
    x = torch.full((4, 8, 8, 8), 3.0, device="cuda")
    found.append(weighted_mse([x], [torch.zeros_like(x)]).item())

class Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.sum()
    @staticmethod
    def backward(ctx, upstream):
        compare(ctx.found)
        return upstream.expand(4), None

found = []
x = torch.ones(4, device="cuda", requires_grad=True)
Late.apply(x, found).backward()
thread = threading.Thread(target=compare, args=(found,))
thread.start()
thread.join()
assert found == [9.0, 9.0], found
"""


@needs_gpu
def test_the_first_launch_may_come_from_the_backward_thread() -> None:
    """In a process where nothing was launched before; then from a thread that torch does not know."""
    done = subprocess.run([sys.executable, "-c", BACKWARD_FIRST], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


@needs_gpu
@every_loss
def test_compiled_code_gives_what_eager_code_gives(name):
    given = arguments(name, LEVELS, scale=2.0)
    expected = differentiated(name, given, 2.0)[0]
    learners = learners_of(name, given)
    inputs = with_learners(name, given, learners)
    compiled = torch.compile(lambda *values: loss_of(name, list(values)) * 2, fullgraph=True, dynamic=False)
    found = torch.autograd.grad(compiled(*inputs), learners)
    for f, e in zip(found, expected, strict=True):
        assert gradient_error(f, e.double()) < 1e-3


@needs_gpu
@every_loss
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_registered_op_is_sound(name, scale):
    given = arguments(name, OPCHECK, torch.float32, scale=3.0)
    given[-1] = None if scale is None else given[-1]
    inputs = with_learners(name, given, learners_of(name, given))
    torch.library.opcheck(getattr(torch.ops.edgestill, name).default, tuple(inputs))


@needs_gpu
@every_loss
def test_the_registered_op_and_the_eager_path_give_the_same_bits(name):
    given = arguments(name, MEDIUM)
    loss, gradients = getattr(torch.ops.edgestill, name)(*given)
    again, others = run_kernels(name, given)
    assert torch.equal(loss, again)
    assert all(map(torch.equal, gradients, others))


@needs_gpu
@every_loss
def test_mixed_precision_changes_nothing(name):
    given = arguments(name, LEVELS)
    with torch.autocast("cuda", dtype=HALF):
        inside = loss_of(name, given)
    assert torch.equal(inside, loss_of(name, given))


@needs_gpu
def test_the_definition_can_be_forced(monkeypatch) -> None:
    maps = [torch.ones(1, 1, 1, 1, device=TORCH)]
    monkeypatch.setenv(fused.SWITCH, "off")
    assert not fused.runs_fused(maps)


# ---- the top cells of a head --------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("shape", [(4, 60, 80, 80), (2, 30, 20, 20)], ids=str)
def test_soft_head_compares_the_cells_that_topk_takes_of_equal_gates(shape, layout):
    given = arguments("soft_head", [shape], layout=layout)
    given[1][0][..., 4] = given[1][0][..., 4].round()
    found, plain = run_kernels("soft_head", given), by_autograd(FUSED["soft_head"].reference, given, (0,), None)
    rows = [(result.gradients[0][..., 5:] != 0).any(-1) for result in (found, plain)]
    assert torch.equal(*rows)


# ---- the matrix instructions --------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", SELECTIONS, ids=str)
def test_adapter_mse_multiplies_the_elements_that_the_shim_says(channels, dtype, layout):
    """The layouts of ldmatrix and mma.sync: with a selection as matrix, every product is one element, exactly."""
    into, out = channels
    generator = torch.Generator().manual_seed(3)
    chosen = torch.randint(into, (out,), generator=generator)
    matrix = torch.zeros(out, into)
    matrix[torch.arange(out), chosen] = 1
    s = laid(torch.randn(3, into, 9, 8, generator=generator).to(dtype).to(TORCH), layout)
    t = laid(s[:, chosen.to(TORCH)], layout)
    given = [[s], [t], [matrix.to(TORCH)], [torch.zeros(out, device=TORCH)], [], torch.tensor(64.0, device=TORCH)]
    loss, gradients = run_kernels("adapter_mse", given)
    assert loss == 0
    assert not any(g.any() for g in gradients)
    t[2, 5, 7, 3] -= 4  # one element differs: so must one of each gradient's rows, and nothing else
    found = run_kernels("adapter_mse", given)
    dx, dw, db = found.gradients
    assert dx.nonzero().tolist() == [[2, int(chosen[5]), 7, 3]]
    assert set(dw.nonzero()[:, 0].tolist()) == {5}
    assert db.nonzero().tolist() == [[5]]
    true = truth(FUSED["adapter_mse"].reference, given, FUSED["adapter_mse"].learns)
    assert max(errors(found, true)) <= 2 * GRADIENT_TOLERANCE[dtype]  # of one element, which is rounded twice


@every_layout
@every_dtype
@pytest.mark.parametrize("channels", UNLIKE, ids=str)
def test_adapter_mse_brings_other_numbers_of_channels_into_the_teachers(channels, dtype, layout, note):
    given = arguments("adapter_mse", [(2, channels[0], 12, 10)], dtype, layout=layout)
    _, teachers = pair((2, channels[1], 12, 10), dtype, seed=7, layout=layout)
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(channels[1], channels[0], generator=generator) / channels[0] ** 0.5
    given[1] = [laid(teachers.to(TORCH), layout)]
    given[2] = [matrix.to(dtype).float().to(TORCH)]
    given[3] = [torch.randn(channels[1], generator=generator).to(dtype).float().to(TORCH)]
    note("adapter_mse", dtype, checked("adapter_mse", given))


@needs_gpu
@pytest.mark.parametrize(
    ("shape", "scale"), [((32, 128, 80, 80), 65536.0), ((3, 257, 7, 9), 512.0), ((8, 200, 20, 20), 512.0)], ids=str
)
def test_adapter_mse_is_no_worse_than_eager_code(shape, scale):
    """On tensor cores, and in the general way."""
    given, loss = arguments("adapter_mse", [shape], scale=scale), FUSED["adapter_mse"]
    true = truth(loss.reference, given, loss.learns)
    eager = by_autograd(loss.reference, given, loss.learns, None)
    found = run_kernels("adapter_mse", given)
    assert errors(found, true)[0] <= 2 * errors(eager, true)[0] + LOSS_TOLERANCE
    for f, t, e in zip(found.gradients, true.gradients, eager.gradients, strict=True):
        assert gradient_error(f, t) <= 1.1 * gradient_error(e, t) + 1e-6


# ---- the training step --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys() -> ModuleType:
    """Trainings of tiny networks. Loaded by its path: there may be another package `tests` on the machine."""
    path = Path(__file__).parents[1] / "compress/training/toys.py"
    spec = importlib.util.spec_from_file_location("toys_of_trainings", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def training(toys: Any, out: Path, **settings: Any) -> Any:
    """A tiny distillation on the GPU that is about to take its first batch."""
    asked = toys.config(losses={"soft": "auto", "cwd": "auto"}, **settings)
    made = toys.trainer(asked, out, distils=True, device="cuda")
    made.wrapped.train()
    return made


def batches_on_gpu(toys: Any, count: int) -> list[Any]:
    made = map(toys.batch, range(count))
    return [one._replace(images=one.images.to(TORCH), targets=one.targets.to(TORCH)) for one in made]


def terms_of(made: Any, batches: Sequence[Any], first: int = 0) -> Tensor:
    """(batches, terms) of steps that begin with iteration `first`."""
    return torch.stack([made.train_batch(one, number) for number, one in enumerate(batches, first)])


@needs_gpu
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_teacher_in_half_precision_gives_what_autocast_gives(toys, precision):
    from compress.training.teacher import Teacher

    model, images = toys.network("n"), torch.rand(2, 3, 64, 64, device=TORCH).to(memory_format=torch.channels_last)
    with torch.autocast("cuda", getattr(torch, precision)):
        expected = Teacher(model, "cuda", precision="float32")(images)
    for found, wanted in zip(Teacher(model, "cuda", precision=precision)(images), expected, strict=True):
        assert all(map(torch.equal, found, wanted))


@needs_gpu
@pytest.mark.parametrize(
    ("precision", "settings"),
    [
        ("float32", {"cuda_graph": True}),
        ("float16", {"cuda_graph": True}),
        ("bfloat16", {"cuda_graph": True}),
        ("float16", {"cuda_graph": True, "compile": True}),
    ],
    ids=str,
)
def test_graphs_and_compiled_networks_learn_as_plain_steps_do(toys, tmp_path, precision, settings):
    """Steps with and without a measurement of gradients, so each kind of batch runs, is recorded and replayed."""
    batches = batches_on_gpu(toys, 10)
    expected = terms_of(training(toys, tmp_path, precision=precision), batches)
    made = training(toys, tmp_path, precision=precision, **settings)
    rtol = 1e-2 if precision == "float32" else 5e-2
    torch.testing.assert_close(terms_of(made, batches), expected, rtol=rtol, atol=1e-3)
    assert len(made.graphs._graphs) == 2


@needs_gpu
@pytest.mark.parametrize("graph", [False, True])
def test_a_batch_that_overflows_float16_moves_nothing_but_the_scale(toys, tmp_path, graph):
    made, batches = training(toys, tmp_path, precision="float16", cuda_graph=graph), batches_on_gpu(toys, 10)
    terms_of(made, batches)
    stem, scale = made.objective.model.model[0].conv.weight, made.accelerator.scaler.get_scale()
    before = {name: value.clone() for name, value in made.objective.model.state_dict().items()}
    stem.data.mul_(2.0**40)
    assert not terms_of(made, batches[:1], 11).isfinite().all()
    stem.data.mul_(2.0**-40)
    assert all(torch.equal(value, before[name]) for name, value in made.objective.model.state_dict().items())
    assert made.accelerator.scaler.get_scale() == scale / 2
    assert terms_of(made, batches[:3], 12).isfinite().all()


@needs_gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_step_never_waits_for_the_gpu(toys, tmp_path, precision):
    made, batches = training(toys, tmp_path, precision=precision), batches_on_gpu(toys, 4)
    terms_of(made, batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        terms_of(made, batches, 16)  # the first of them measures gradients
    finally:
        torch.cuda.set_sync_debug_mode("default")
