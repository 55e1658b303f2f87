from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.config import DistillConfig
from compress.losses.distill import LOSSES
from compress.models import Architecture, YOLOv5, save_model
from compress.training import checks
from compress.training.checks import check_distillation
from compress.training.teacher import Teacher, build_losses, load_sources
from runtime.errors import EdgestillError, InputError, UsageError

from .toys import NAMES, batch, config, network, quiet, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_teacher_infers_without_gradient_and_leaves_its_model_as_it_was() -> None:
    model = network("n").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = Teacher(model, "cpu")
    outputs = teacher(torch.rand(2, 3, 64, 64, requires_grad=True))
    assert not any(tensor.requires_grad for tensor in (*outputs.raw, *outputs.features))
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in teacher.model.modules())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_teacher_in_half_precision_gives_what_autocast_gives() -> None:
    model, images = network("n"), torch.rand(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    teacher = Teacher(model, "cpu", precision="bfloat16")
    with torch.autocast("cpu", torch.bfloat16):
        expected = Teacher(model, "cpu")(images)
    for found, wanted in zip(teacher(images), expected, strict=True):
        assert all(map(torch.equal, found, wanted))
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {torch.bfloat16}
    assert teacher.shape.anchors.dtype == torch.float32
    assert model.model[0].conv.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "complaint"),
    [
        (("bolt",), "has 1 classes .*, the data has 2"),
        (("nut", "bolt"), "class 0 is 'nut' in the teacher .* and 'bolt'"),
    ],
)
def test_a_teacher_of_other_classes_or_another_order_is_refused(
    names: tuple[str, ...], complaint: str, tmp_path: Path
) -> None:
    save_model(YOLOv5(Architecture.of_scale("p", names)), tmp_path / "teacher.safetensors")
    with pytest.raises(InputError, match=complaint) as caught:
        load_sources([tmp_path / "teacher.safetensors"], NAMES, config(), "cpu")
    assert "Fine-tune the teacher" in str(caught.value.hint)


def test_losses_without_a_weight_are_left_out() -> None:
    settings = DistillConfig(losses={"feat_mse": 1.0, "soft": 0.0})
    assert set(build_losses(network(), Teacher(network("n"), "cpu"), settings)) == {"feat_mse"}
    with pytest.raises(UsageError, match=r"weight above 0\. For labels alone write losses: \{\}"):
        build_losses(network(), Teacher(network("n"), "cpu"), DistillConfig(losses={"soft": 0.0}))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_of_the_table_can_be_built_for_two_scales(name: str) -> None:
    assert set(build_losses(network(), Teacher(network("n"), "cpu"), DistillConfig(losses={name: 1.0}))) == {name}


def test_the_checks_change_no_weight_no_statistic_and_no_gradient(tmp_path: Path) -> None:
    made = trainer(config(), tmp_path, distils=True)
    assert made.job.teacher is not None
    before = {key: value.clone() for key, value in made.objective.state_dict().items()}
    lines: list[str] = []
    found = check_distillation(made.objective, made.job.teacher, made.job.train, made.job.config, lines.append)
    assert all(check.ok for check in found)
    assert all(torch.equal(value, before[key]) for key, value in made.objective.state_dict().items())
    assert all(parameter.grad is None for parameter in made.objective.parameters())
    assert lines[0].startswith(f"distillation: {len(found) - 1} checks passed")
    assert lines[1].startswith("teacher: ")


def test_the_first_failed_check_is_the_error(tmp_path: Path) -> None:
    made = trainer(config(), tmp_path, distils=True)
    assert made.job.teacher is not None
    made.job.teacher.model.train()
    with pytest.raises(EdgestillError, match="would not work: teacher is in eval mode"):
        check_distillation(made.objective, made.job.teacher, made.job.train, made.job.config, quiet)


def test_the_teachers_share_is_that_of_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch(checks.Stopwatch):
        """A clock that ticks 10 ms in the teacher's phase and 30 ms in the student's."""

        def __init__(self, device: torch.device) -> None:
            ticks = iter([0.0, 0.01, 0.01, 0.04] * 2)
            super().__init__(device, lambda: next(ticks))

    monkeypatch.setattr(checks, "Stopwatch", Watch)
    made = trainer(config(), tmp_path, distils=True)
    assert made.job.teacher is not None
    cost = checks.measured_cost(made.objective, made.job.teacher, batch(0, 2), made.job.config)
    assert cost.line == "teacher: 5.0 ms an image, 25% of a step (student 15.0 ms)"
