from __future__ import annotations

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from compress.losses.detection import DetectionLoss
from compress.losses.distill import LOSSES, Context, DistillLoss, Outputs, Shape
from compress.losses.gradients import neck_gradients
from compress.losses.preflight import DROWNS, SCALED, preflight

from .conftest import ANCHORS_PX, STRIDES

NAMES = ("bolt", "nut", "washer")


class Batch(NamedTuple):
    images: Tensor
    targets: Tensor
    labelled: int | None = None


class Network(nn.Module):
    """A detector in miniature: three strided features, one head convolution each."""

    def __init__(self, width: int, names=NAMES, anchors=ANCHORS_PX, probabilities=False) -> None:
        super().__init__()
        self.arch = SimpleNamespace(names=names, anchors=anchors, strides=STRIDES)
        self.channels = (width, 2 * width, 4 * width)
        self.stems = nn.ModuleList(nn.Conv2d(3, c, s, s) for c, s in zip(self.channels, STRIDES, strict=True))
        self.norms = nn.ModuleList(map(nn.BatchNorm2d, self.channels))
        self.heads = nn.ModuleList(nn.Conv2d(c, 3 * (5 + len(names)), 1) for c in self.channels)
        self.probabilities = probabilities

    def forward_features(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        features = [norm(stem(images)) for stem, norm in zip(self.stems, self.norms, strict=True)]
        raw = []
        for head, feature in zip(self.heads, features, strict=True):
            level = head(feature)
            b, c, h, w = level.shape
            raw.append(level.view(b, 3, c // 3, h, w).permute(0, 1, 3, 4, 2))
        return ([level.sigmoid() for level in raw] if self.probabilities else raw), features

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self,)

    def forward(self, images: Tensor) -> Outputs:
        return Outputs(*self.forward_features(images))


def _shape(network: Network) -> Shape:
    anchors = torch.tensor(network.arch.anchors).float() / torch.tensor(STRIDES).view(3, 1, 1)
    return Shape(network.channels, len(network.arch.names), 3, anchors, STRIDES)


@pytest.fixture
def batch():
    torch.manual_seed(3)
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.4, 0.3], [1, 2, 0.3, 0.6, 0.2, 0.2]])
    return Batch(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8), targets)


def _pair(**teacher):
    torch.manual_seed(0)
    return Network(4), Network(8, **teacher).eval()


def _losses(student, teacher, names=tuple(LOSSES)):
    return {name: LOSSES[name](_shape(student), _shape(teacher)) for name in names}


def _failed(checks):
    return [check.name for check in checks if not check.ok]


def test_a_sound_distillation_passes_every_check(batch):
    student, teacher = _pair()
    task = DetectionLoss(_shape(student).anchors, STRIDES, 3)
    checks = preflight(student, teacher, _losses(student, teacher), batch, task=task)
    assert _failed(checks) == []
    assert {f"{name} is finite and not zero" for name in LOSSES} <= {check.name for check in checks}
    assert all(name in checks[-1].detail for name in ("detection", *LOSSES))


def test_the_examination_changes_neither_network_nor_any_gradient(batch):
    student, teacher = _pair()
    losses = _losses(student, teacher)
    modules = (student, teacher, *losses.values())
    before = [{key: value.clone() for key, value in module.state_dict().items()} for module in modules]
    preflight(student, teacher, losses, batch)
    for module, state in zip(modules, before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert all(parameter.grad is None for parameter in module.parameters())


def test_a_teacher_in_training_mode_is_found(batch):
    student, teacher = _pair()
    checks = preflight(student, teacher.train(), _losses(student, teacher, ("kd",)), batch)
    assert "teacher is in eval mode" in _failed(checks)


def test_a_teacher_that_gives_probabilities_is_found(batch):
    student, teacher = _pair(probabilities=True)
    assert _failed(preflight(student, teacher, _losses(student, teacher), batch)) == ["teacher gives logits"]


def test_another_order_of_classes_is_found_and_shown(batch):
    student, teacher = _pair(names=("bolt", "washer", "nut"))
    checks = preflight(student, teacher, _losses(student, teacher, ("soft",)), batch)
    assert _failed(checks) == ["classes agree"]
    assert "1: nut / washer" in checks[0].detail


def test_other_classes_do_not_matter_to_a_feature_loss(batch):
    student, teacher = _pair(names=("cat", "dog"))
    checks = preflight(student, teacher, _losses(student, teacher, ("feat_mse",)), batch)
    assert _failed(checks) == []
    assert "no loss compares them" in checks[0].detail


def test_other_anchors_are_found(batch):
    student, teacher = _pair()
    losses = _losses(student, teacher, ("soft",))
    teacher.arch.anchors = tuple(tuple((w + 5, h) for w, h in level) for level in ANCHORS_PX)
    assert _failed(preflight(student, teacher, losses, batch)) == ["anchors agree"]


class Detached(DistillLoss):
    """The classic mistake: a loss with a value and no way back to the student."""

    name = "x"

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return sum((s.detach() - t).square().mean() for s, t in zip(student.raw, teacher.raw, strict=True))


class Dead(DistillLoss):
    name = "x"

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return student.raw[0].sum() * 0


class Offset(DistillLoss):
    name = "x"

    def compare(self, student: Outputs, teacher: Outputs, context: Context) -> Tensor:
        return (student.raw[0] - teacher.raw[0]).square().mean() + 1


@pytest.mark.parametrize(
    ("loss", "finding"),
    [
        (Detached, "x reaches the student"),
        (Dead, "x is finite and not zero"),
        (Offset, "x is zero if student equals teacher"),
    ],
)
def test_a_loss_that_does_nothing_or_the_wrong_thing_is_found(batch, loss, finding):
    student, teacher = _pair()
    checks = preflight(student, teacher, {"x": loss(_shape(student), _shape(teacher))}, batch)
    assert finding in _failed(checks)


def test_shares_of_the_gradient_follow_the_weights(batch):
    student, teacher = _pair()
    losses, shares = _losses(student, teacher, ("soft", "feat_mse")), []
    losses["feat_mse"].weight = 1.0
    for weight in (0.0, 1.0, 1e6):
        losses["soft"].weight = weight
        shares.append(preflight(student, teacher, losses, batch)[-1].detail)
    assert "soft 0.0%" in shares[0]
    assert "soft 100.0%" in shares[2]
    assert len(set(shares)) == 3


def test_a_fixed_weight_that_drowns_the_labels_is_told_with_the_remedy(batch):
    student, teacher = _pair()
    losses = _losses(student, teacher, ("soft",))
    task = DetectionLoss(_shape(student).anchors, STRIDES, 3)
    told = {}
    for weight in (1e6, 1e-6, None):
        losses["soft"].weight = weight
        checks = preflight(student, teacher, losses, batch, task=task)
        told[weight] = [check.detail for check in checks if check.name == f"soft {DROWNS}"]
    assert "times their gradient; soft: auto avoids it" in told[1e6][0]
    assert told[1e-6] == told[None] == []


def test_without_labels_shares_refer_to_the_first_head_loss(batch):
    student, teacher = _pair()
    losses = {
        "soft": _losses(student, teacher, ("soft",))["soft"],
        "same": _losses(student, teacher, ("soft",))["soft"],
    }
    losses["same"].weight = 1.0
    assert preflight(student, teacher, losses, batch)[-1].detail == "soft 50.0%, same 50.0%"


def test_losses_are_told_which_images_have_labels(batch):
    student, teacher = _pair()
    seen = []

    class Watched(LOSSES["soft"]):
        def compare(self, student, teacher, context):
            seen.append(context.labelled)
            return super().compare(student, teacher, context)

    preflight(student, teacher, {"soft": Watched(_shape(student), _shape(teacher))}, batch._replace(labelled=1))
    assert set(seen) == {1}


def test_shares_that_are_too_large_together_are_told_as_they_will_be(batch):
    student, teacher = _pair()
    losses = _losses(student, teacher, ("soft", "pkd", "feat_mse"))
    task = DetectionLoss(_shape(student).anchors, STRIDES, 3)
    losses["soft"].share, losses["pkd"].share, losses["feat_mse"].weight = 2.0, 1.0, 1e-9
    checks = {check.name: check for check in preflight(student, teacher, losses, batch, task=task)}
    assert checks[SCALED].ok
    assert checks[SCALED].detail.startswith("soft 2 to 1, pkd 1 to 0.5; together they may be 1.5 times")
    parts = "detection 40.0%, soft 40.0%, pkd 20.0%, feat_mse 0.0%"
    assert checks["parts of the whole gradient at the neck"].detail == parts
    losses["soft"].share, losses["pkd"].share = 1.0, 0.5
    assert SCALED not in [check.name for check in preflight(student, teacher, losses, batch, task=task)]


def test_the_gradient_at_the_neck_is_that_of_autograd():
    features = [torch.ones(2, 3, requires_grad=True), torch.ones(4, requires_grad=True)]
    terms = {"a": features[0].sum() * 2, "b": features[1].square().sum()}
    assert neck_gradients(terms, features) == pytest.approx({"a": 2 * 6**0.5, "b": 4.0})
