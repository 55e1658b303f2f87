from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.models import LAYOUTS, Architecture, YOLOv5
from compress.models.blocks import C3, Bottleneck, BottleneckCSP, Conv
from compress.models.inherit import fit_head, inherit, recalibrate
from runtime.errors import UsageError

NAMES = ("bolt", "nut")


def network(scale: str, layout: str = "v6", names: tuple[str, ...] = NAMES, seed: int = 0) -> YOLOv5:
    return with_spread_norms(Architecture.of_scale(scale, names, layout=layout), seed)


def with_spread_norms(arch: Architecture, seed: int = 0) -> YOLOv5:
    torch.manual_seed(seed)
    model = YOLOv5(arch)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.2, 0.2)
    return model.eval()


@torch.no_grad()
def silence_half(model: YOLOv5) -> None:
    """Half of all channels become exactly 0, the same ones wherever a residual adds them."""
    for module in list(model.modules()):
        if isinstance(module, (C3, BottleneckCSP)):
            stream = torch.randperm(len(module.cv1.bn.weight))
            norms = [module.cv1.bn, *(block.cv2.bn for block in module.m if block.add)]
            for norm in norms:
                silence(norm, stream)
    for module in model.modules():
        if isinstance(module, Conv) and bool((module.bn.weight != 0).all()):
            silence(module.bn, torch.randperm(len(module.bn.weight)))
        if isinstance(module, BottleneckCSP):
            half = len(module.bn.weight) // 2
            silence(
                module.bn, torch.cat((torch.randperm(half)[: half // 2], half + torch.randperm(half)[: half // 2])), 1
            )


def silence(norm: nn.Module, order: torch.Tensor, share: float = 0.5) -> None:
    dead = order[: int(len(order) * share)]
    norm.weight[dead] = 0
    norm.bias[dead] = 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_slice_without_the_silent_channels_computes_the_same(layout: str) -> None:
    source, student = network("n", layout), network("p", layout, seed=1)
    silence_half(source)
    found = inherit(student, source)
    images = torch.rand(1, 3, 128, 128)
    assert (found.parameters, found.fresh) == (found.total, ())
    for own, theirs in zip(student(images), source(images), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_student_of_the_same_size_is_a_copy(layout: str) -> None:
    source, student = network("p", layout), network("p", layout, seed=1)
    inherit(student, source)
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_classes_are_matched_by_name_and_new_ones_start_afresh() -> None:
    source, student = network("n"), network("p", names=("washer", "nut"), seed=1)
    before = [conv.weight.clone().view(3, 7, -1) for conv in student.detect.m]
    found = inherit(student, source)
    assert found.classes == ("nut",)
    assert found.parameters < found.total
    for conv, fresh, theirs in zip(student.detect.m, before, source.detect.m, strict=True):
        now = conv.weight.view(3, 7, -1)
        assert torch.equal(now[:, 5], fresh[:, 5])
        assert not torch.equal(now[:, 6], fresh[:, 6])
        assert torch.equal(conv.bias.view(3, 7)[:, 6], theirs.bias.view(3, 7)[:, 6])


def test_bottlenecks_that_the_source_lacks_start_as_the_identity() -> None:
    source = network("n")
    arch = Architecture(depth=0.67, width=0.25, names=NAMES)
    student = YOLOv5(arch).eval()
    found = inherit(student, source)
    assert found.fresh
    block = student.get_submodule(found.fresh[0])
    x = torch.rand(1, block.cv1.conv.in_channels, 8, 8)
    assert torch.equal(block(x), x)


@torch.no_grad()
def pass_through(block: Bottleneck, dead: torch.Tensor) -> None:
    """Make a bottleneck the identity, but for the channels `dead` where it has no residual: those become 0."""
    if block.add:
        block.cv2.bn.weight.zero_()
        block.cv2.bn.bias.zero_()
        return
    for conv in (block.cv1, block.cv2):
        nn.init.dirac_(conv.conv.weight)
        conv.bn.weight.copy_((conv.bn.running_var + conv.bn.eps).sqrt())
        conv.bn.bias.zero_()
    silence(block.cv2.bn, dead, 1)


@pytest.mark.parametrize("depths", [(0.33, 0.33), (0.67, 0.33), (1.0, 0.33), (1.0, 0.67)], ids=str)
@pytest.mark.parametrize("layout", ["v6", "v2"])
def test_a_student_without_bottlenecks_that_pass_through_computes_the_same(
    layout: str, depths: tuple[float, float]
) -> None:
    """The channels that the left-out bottlenecks of the neck, which have no residual, silence are not taken."""
    deep, shallow = (
        Architecture(depth, width, NAMES, layout=layout, activation="ReLU")
        for depth, width in zip(depths, (0.25, 0.125), strict=True)
    )
    source, student = with_spread_norms(deep), with_spread_norms(shallow, seed=1)
    silence_half(source)
    for theirs, own in zip(source.model, student.model, strict=True):
        if isinstance(theirs, (C3, BottleneckCSP)):
            dead = torch.randperm(len(theirs.cv1.bn.weight))[: len(theirs.cv1.bn.weight) // 2]
            for block in theirs.m[len(own.m) :]:
                pass_through(block, dead)
            if len(theirs.m) > len(own.m) and not theirs.m[0].add:
                with torch.no_grad():
                    theirs.m[len(own.m) - 1].cv2.bn.weight.uniform_(0.5, 1.5)
    inherit(student, source)
    images = torch.rand(1, 3, 64, 64)
    for mine, expected in zip(student(images), source(images), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-4)


def test_a_shallower_student_takes_the_first_bottlenecks() -> None:
    torch.manual_seed(0)
    source = YOLOv5(Architecture(depth=0.67, width=0.25, names=NAMES))
    student = network("n")
    inherit(student, source)
    assert torch.equal(student.model[4].m[0].cv1.conv.weight, source.model[4].m[0].cv1.conv.weight)


def test_a_relu_student_takes_a_silu_networks_weights() -> None:
    source = network("n")
    student = YOLOv5(Architecture.of_scale("n", NAMES, activation="ReLU")).eval()
    inherit(student, source)
    assert {type(module.act) for module in student.modules() if isinstance(module, Conv)} == {nn.ReLU}
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in student.state_dict().items())


@pytest.mark.parametrize(
    ("student", "source", "named"),
    [(("s", "v6"), ("n", "v6"), "wider"), (("p", "v4"), ("n", "v6"), "layout")],
)
def test_what_is_no_slice_is_refused(student: tuple[str, str], source: tuple[str, str], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        inherit(network(*student), network(*source))


def test_recalibration_measures_the_mean_over_the_batches_and_keeps_the_rest() -> None:
    model = network("p")
    before = {name: value.clone() for name, value in model.named_parameters()}
    batches = [torch.rand(2, 3, 64, 64) for _ in range(3)]
    recalibrate(model, batches)
    seen = torch.stack([model.model[0].conv(images).mean((0, 2, 3)) for images in batches]).mean(0)
    torch.testing.assert_close(model.model[0].bn.running_mean, seen, rtol=1e-4, atol=1e-5)
    assert model.model[0].bn.momentum == 0.03
    assert model.model[0].bn.num_batches_tracked == 3
    assert not model.training
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_the_fitted_head_finds_a_linear_map_of_the_features() -> None:
    model = network("p")
    batches = [torch.rand(2, 3, 64, 64) for _ in range(4)]
    truth = [conv.weight.clone() for conv in model.detect.m]
    expected = [[level.clone() for level in model(images)] for images in batches]
    with torch.no_grad():
        for conv in model.detect.m:
            conv.weight.zero_()
            conv.bias.zero_()
    fit_head(model, zip(batches, expected, strict=True))
    error = (model(batches[0])[0] - expected[0][0]).abs().mean() / expected[0][0].abs().mean()
    assert error < 0.05
    assert model.detect.m[0].weight.shape == truth[0].shape


def test_columns_of_unknown_classes_are_not_fitted() -> None:
    model = network("p", names=("washer", "nut"))
    before = [conv.bias.clone().view(3, 7)[:, 5] for conv in model.detect.m]
    source = network("n")
    images = torch.rand(2, 3, 64, 64)
    fit_head(model, [(images, source(images))], unknown=[0])
    assert all(torch.equal(conv.bias.view(3, 7)[:, 5], was) for conv, was in zip(model.detect.m, before, strict=True))
