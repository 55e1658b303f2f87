"""The torch side of every loss with kernels: the registered ops, and the eager path over kernels on the host shim."""

from __future__ import annotations

import traceback

import pytest
import torch
from shim.cases import SHAPES, arguments, with_learners
from shim.oracle import LAYOUTS, by_autograd, gradient_error, laid
from torch import Tensor

from compress.compute.operations import OperationCount
from compress.kernels import cwd, fused
from compress.kernels.adapter_mse import adapter_mse
from compress.kernels.fused import FusedLoss
from compress.kernels.losses import FUSED
from compress.kernels.pkd import pkd
from compress.kernels.rescale import rescale
from compress.kernels.weighted_mse import weighted_mse
from compress.losses.distill import LOSSES, Outputs, Shape
from runtime.errors import UnavailableError, UsageError


def learners_of(name: str, given: list) -> list[Tensor]:
    return [tensor.requires_grad_() for tensor in FUSED[name].learners(given)]


def eager(name: str, device, given: list) -> tuple[Tensor, list[Tensor]]:
    loss, learners = FUSED[name], learners_of(name, given)
    return loss.differentiable(device, loss.run(device, given), given), learners


def true_gradients(name: str, given: list, upstream: float) -> list[Tensor]:
    found = by_autograd(FUSED[name].reference, [*given[:-1], torch.tensor(upstream)], FUSED[name].learns, torch.float64)
    return found.gradients


def agree(found, true, tolerance=4e-6) -> bool:
    return all(gradient_error(f, t) <= tolerance for f, t in zip(found, true, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_a_counted_loss_is_one_operation_and_no_kernel(name):
    given = arguments(name, torch.float32)
    with OperationCount() as count, fused.as_operations():
        loss = FUSED[name].by_torch(given)
    assert count.total.operations == 1
    torch.testing.assert_close(loss, FUSED[name].by_torch(given))


# ---- the eager path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_autograd_gets_the_gradient_in_the_layout_of_the_map(shim_device, name, layout, dtype):
    """Channels last is never read as NCHW."""
    given = arguments(name, dtype, layout=layout, scale=1024)
    loss, learners = eager(name, shim_device(), given)
    loss.backward(torch.tensor(1024.0))
    assert agree(
        [x.grad for x in learners], true_gradients(name, given, 1024.0), 4e-6 if dtype == torch.float32 else 1e-3
    )
    assert all(x.grad.stride() == x.stride() for x in given[0])


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("upstream", [1.0, 65536.0, 0.0, -3.0])
@pytest.mark.parametrize("scale", [None, 0.0, 1.0, 65536.0])
def test_any_upstream_gradient_is_right_whatever_was_expected(shim_device, name, upstream, scale):
    given = arguments(name, scale=scale, shapes=SHAPES[1:])
    loss, learners = eager(name, shim_device(), given)
    loss.backward(torch.tensor(upstream))
    assert agree([x.grad for x in learners], true_gradients(name, given, upstream))


@pytest.mark.parametrize("name", FUSED)
def test_a_graph_that_is_kept_gives_the_right_gradient_each_time(shim_device, name):
    """A gradient that was rescaled in place would be wrong the second time, and the first one spoilt."""
    given = arguments(name, scale=2)
    loss, learners = eager(name, shim_device(), given)
    upstreams = (1.0, 3.0, 0.0, 2.0)
    found = [torch.autograd.grad(u * loss, learners, retain_graph=True) for u in upstreams]
    assert all(agree(f, true_gradients(name, given, u)) for f, u in zip(found, upstreams, strict=True))


@pytest.mark.parametrize("name", FUSED)
def test_a_second_backward_through_a_freed_graph_is_refused(shim_device, name):
    loss, learners = eager(name, shim_device(), arguments(name))
    torch.autograd.grad(loss, learners)
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        torch.autograd.grad(loss, learners)


@pytest.mark.parametrize("name", FUSED)
def test_a_gradient_that_came_as_expected_costs_no_further_byte(shim_device, name):
    given, device = arguments(name, torch.float16, scale=512), shim_device()
    loss, learners = eager(name, device, given)
    device.launches.clear()
    torch.autograd.grad(loss, learners, torch.tensor(512.0))
    assert {kernel.split("_")[0] for kernel, _ in device.launches} == {"rescale"}
    assert device.moved_bytes()[1] == 0


def lost(name: str, device, *, folded: bool) -> float:
    """Share of float16 gradient entries that became 0, under a gradient scaler's usual factor."""
    given, scale = arguments(name, torch.float16, shapes=[(4, 16, 40, 40)]), torch.tensor(65536.0)
    for maps in given[:2]:
        maps[0].mul_(0.01)  # small differences, as late in a training
    given[-1] = scale if folded else None
    loss, learners = eager(name, device, given)
    (gradient,), (true,) = torch.autograd.grad(loss, learners, scale), true_gradients(name, given, 65536.0)
    return ((gradient == 0) & (true.abs() > 2**-24)).double().mean().item()


@pytest.mark.parametrize("name", ["weighted_mse", "cwd", "pkd", "fgd", "soft_head"])
def test_a_folded_scale_keeps_float16_gradients_from_vanishing(shim_device, name):
    """At stride 8 up to 60 % of the entries are lost if the scale is multiplied after the rounding."""
    assert lost(name, shim_device(), folded=True) < 1e-3


@pytest.mark.parametrize("name", ["weighted_mse", "cwd"])
def test_a_scale_that_is_multiplied_afterwards_loses_gradients(shim_device, name):
    assert lost(name, shim_device(), folded=False) > 0.01


@pytest.mark.parametrize("name", FUSED)
def test_mixed_precision_changes_nothing(shim_device, name):
    given = arguments(name, torch.float16)
    loss, _ = eager(name, shim_device(), given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _ = eager(name, shim_device(), given)
    assert torch.equal(loss, inside)


def test_rescaling_in_place_or_anew_gives_the_same_for_odd_lengths(shim_device):
    gradients = [torch.randn(37), torch.randn(64).half(), torch.randn(1001).bfloat16(), torch.randn(5).half()]
    anew = rescale(shim_device(), gradients, torch.tensor(3.0), torch.tensor(2.0), in_place=False)
    assert all(torch.equal(a, (g.float() * 1.5).to(g.dtype)) for a, g in zip(anew, gradients, strict=True))
    kept = rescale(shim_device(), gradients, torch.tensor(3.0), torch.tensor(2.0), in_place=True)
    assert all(k is g and torch.equal(k, a) for k, g, a in zip(kept, gradients, anew, strict=True))


# ---- the registered ops -------------------------------------------------------------------------------------------


def op_arguments(name: str, **kwargs) -> tuple:
    given = arguments(name, **kwargs)
    learners_of(name, given)
    return tuple(given)


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_registered_op_is_sound(name, scale):
    torch.library.opcheck(getattr(torch.ops.edgestill, name).default, op_arguments(name, scale=scale))


@pytest.mark.parametrize("name", FUSED)
def test_the_registered_op_is_sound_for_a_part_of_a_map(name):
    """Half of its channels (of its anchors, if it is a head's), channels last: in neither layout it is dense."""
    given = arguments(name, scale=3.0)
    whole = [laid(torch.cat([s, s], 1), "channels_last") for s in given[0]]
    given[0] = [w[:, : w.shape[1] // 2] for w in whole]
    learners_of(name, given)
    torch.library.opcheck(getattr(torch.ops.edgestill, name).default, tuple(given))


@pytest.mark.parametrize("name", FUSED)
def test_the_registered_op_has_the_gradient_that_differences_show(name):
    given = arguments(name, torch.float64, shapes=[(2, 3, 2, 3)], scale=1)

    def loss(*learners):
        return getattr(torch.ops.edgestill, name)(*with_learners(name, given, learners))[0]

    assert torch.autograd.gradcheck(loss, learners_of(name, given))


@pytest.mark.parametrize("name", FUSED)
def test_the_registered_op_may_be_differentiated_twice_with_a_kept_graph(name):
    given = arguments(name, scale=2)
    learners = learners_of(name, given)
    loss, _ = getattr(torch.ops.edgestill, name)(*given)
    for upstream in (1.0, 3.0):
        found = torch.autograd.grad(upstream * loss, learners, retain_graph=True)
        assert agree(found, true_gradients(name, given, upstream))


def test_compiled_code_takes_the_registered_op(monkeypatch):
    """Traced whole, without a break; on the CPU the op's plain form runs inside."""
    monkeypatch.setattr(fused, "runs_fused", lambda students: True)
    given = arguments("weighted_mse")
    learners = learners_of("weighted_mse", given)
    step = torch.compile(lambda s, t, w: weighted_mse(s, t, w) * 2, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(step(*given[:3]), learners)
    assert agree(found, true_gradients("weighted_mse", given, 2.0))


# ---- the choice ---------------------------------------------------------------------------------------------------


def test_maps_on_a_cpu_go_to_the_definition():
    given = arguments("cwd")
    assert torch.equal(cwd.cwd(*given[:3]), cwd.reference(*given[:3]))


class OnGpu:
    """A map as the choice sees it."""

    def __init__(self, dtype=torch.float16, elements=1):
        self.is_cuda, self.dtype, self.device = True, dtype, torch.device("cuda:0")
        self.numel = lambda: elements


@pytest.mark.parametrize(
    ("maps", "switch", "reason", "expected"),
    [
        ([OnGpu()], None, "", True),
        ([OnGpu()], "off", "", False),
        ([OnGpu()], None, "no compiler", False),
        ([OnGpu(torch.float64)], None, "", False),
        ([OnGpu(), OnGpu(torch.float32)], None, "", False),
        ([OnGpu()] * 5, None, "", False),
        ([OnGpu(), OnGpu(elements=1 << 31)], None, "", False),
    ],
)
def test_kernels_run_where_they_can_and_are_wanted(monkeypatch, maps, switch, reason, expected):
    monkeypatch.delenv("EDGESTILL_KERNELS", raising=False)
    if switch:
        monkeypatch.setenv("EDGESTILL_KERNELS", switch)
    monkeypatch.setattr(fused, "unavailable_reason", lambda index: reason)
    assert fused.runs_fused(maps) is expected


def test_a_gpu_without_what_the_kernels_need_is_told_once(monkeypatch):
    def refuse(index):
        raise UnavailableError("NVRTC is not here", "pip install it")

    monkeypatch.setattr(fused, "gpu", refuse)
    fused._unavailable_reason.cache_clear()
    with pytest.warns(UserWarning, match="plain torch is used") as caught:
        reasons = {fused.unavailable_reason(0) for _ in range(2)}
    assert reasons == {"NVRTC is not here. pip install it"}
    assert len(caught) == 1
    fused._unavailable_reason.cache_clear()


@pytest.mark.parametrize("name", FUSED)
def test_an_empty_batch_gives_zero_with_a_gradient(name):
    given = arguments(name, shapes=[(0, 16, 8, 8)])
    learners = learners_of(name, given)
    loss = FUSED[name].function(*given[:-1])
    assert loss == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, learners, allow_unused=True) if g is not None)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda given: given[1].pop(), "2 student maps, 1 teacher maps"),
        (lambda given: [maps.clear() for maps in given[:3]], "0 student maps, 0 teacher maps"),
        (lambda given: given[1].__setitem__(0, given[1][0][:, :, :4]), r"level 0 .*\(2, 16, 8, 8\), \(2, 16, 4, 8\)"),
        (lambda given: given[2].__setitem__(1, given[2][1][:, :2]), r"level 1 .*\(2, 2, 4\)"),
        (lambda given: given[2].pop(), "Give one of each per level"),
    ],
)
def test_maps_of_unlike_shapes_are_refused_before_a_kernel_reads_beyond_one(change, says):
    given = arguments("weighted_mse")
    change(given)
    with pytest.raises(UsageError, match=says):
        weighted_mse(*given[:-1])


@pytest.mark.parametrize(
    ("place", "other", "says"),
    [
        (1, [torch.ones(2, 4, 3, 3, device="meta")], "tensors on cpu, meta"),
        (-1, torch.ones((), device="meta"), "tensors on cpu, meta"),
        (-1, torch.ones((), dtype=torch.float64), "scale is .* torch.float64"),
    ],
)
def test_what_a_kernel_would_read_past_is_refused(monkeypatch, place, other, says):
    monkeypatch.setattr(fused, "runs_fused", lambda students: True)
    given = [[torch.ones(2, 4, 3, 3)], [torch.ones(2, 4, 3, 3)], None]
    given[place] = other
    with pytest.raises(UsageError, match=says):
        pkd(*given[:2], scale=given[2])


def test_an_adapter_for_every_level_is_needed():
    given = arguments("adapter_mse")
    with pytest.raises(UsageError, match="2 student maps, 1 matrices, 2 biases"):
        adapter_mse(given[0], given[1], given[2][:1], given[3])


@pytest.mark.parametrize("name", FUSED)
def test_only_what_learns_gets_a_gradient_on_the_cpu_too(name):
    given = arguments(name)
    tensors = [tensor.requires_grad_() for value in given if fused.are_tensors(value) for tensor in value]
    FUSED[name].function(*given[:-1]).backward()
    learners = {id(tensor) for tensor in FUSED[name].learners(given)}
    assert all((tensor.grad is not None) == (id(tensor) in learners) for tensor in tensors)


# ---- the way down -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["feat_mse", "feat_sl2", "cwd", "pkd", "fgd", "mgd", "soft"])
def test_a_launch_is_at_most_four_calls_below_the_forward_of_a_loss(shim_device, monkeypatch, loss):
    """Every function of the product on the stack counts, from what `forward` calls to `launch` itself."""
    shape = Shape((8,), 3, 3, torch.ones(1, 3, 2), (8,))
    outputs = [Outputs([torch.rand(1, 3, 4, 4, 8)], [torch.rand(1, 8, 4, 4)]) for _ in range(2)]
    device, stacks = shim_device(), []
    launch = device.launch

    def is_ours(frame):
        return "/compress/" in frame.f_code.co_filename and "/tests/" not in frame.f_code.co_filename

    def counted(asked):
        stacks.append([frame.f_code.co_name for frame, _ in traceback.walk_stack(None) if is_ours(frame)])
        launch(asked)

    monkeypatch.setattr(device, "launch", counted)
    monkeypatch.setattr(FusedLoss, "device", lambda self, arguments: device)
    LOSSES[loss](shape, shape)(*outputs)
    assert stacks
    assert all(["launch", *stack].index("forward") <= 4 for stack in stacks)
