from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.compute.device import to_device
from compress.losses.distill import detached
from compress.models.checkpoint import load_model
from compress.training.loop import Trainer, of_teacher
from compress.training.objective import Objective, detection_loss
from compress.training.progress import Progress
from compress.training.state import STATE, load_state

from .test_loop import judged  # noqa: F401  a fixture
from .toys import batch, config, network, trainer

pytestmark = pytest.mark.usefixtures("one_thread")
LOSSES = {"soft": "auto", "feat_mse": 0.1}


def joint(out: Path, **changes: object) -> Trainer:
    return trainer(config(strategy="joint", losses=LOSSES, **changes), out, distils=True)


def teacher_of(made: Trainer) -> Objective:
    assert made.objective.teacher
    return made.objective.teacher


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def images(number: int) -> torch.Tensor:
    return batch(number).images / 255


def test_the_teacher_gets_the_gradient_of_its_labels_alone(tmp_path: Path) -> None:
    made, plain = joint(tmp_path), to_device(network("n", seed=1).train(), torch.device("cpu"))
    made.objective.train()
    made.objective(images(0), batch(0).targets, measure=True).total.backward()
    Objective(plain, detection_loss(plain, made.config))(images(0), batch(0).targets).total.backward()
    own, alone = gradients(teacher_of(made).model), gradients(plain)
    assert own.keys() == alone.keys()
    assert all(torch.equal(own[name], gradient) for name, gradient in alone.items())


def test_the_student_learns_from_the_outputs_that_the_teacher_gives_in_training(tmp_path: Path) -> None:
    made, frozen = joint(tmp_path / "joint"), trainer(config(losses=LOSSES), tmp_path / "frozen", distils=True)
    frozen.objective.load_state_dict(made.objective.state_dict(), strict=False)
    for one in (made, frozen):
        one.objective.train()
    outputs = detached(teacher_of(made).student_outputs(images(0)))
    frozen.objective(images(0), batch(0).targets, outputs).total.backward()
    made.objective(images(0), batch(0).targets).total.backward()
    others = gradients(frozen.objective)
    own = {name: value for name, value in gradients(made.objective).items() if not name.startswith("teacher.")}
    assert own.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in own.items())


def test_the_teachers_loss_is_a_term_and_the_terms_add_up(tmp_path: Path) -> None:
    made = joint(tmp_path)
    assert made.objective.terms == ("box", "obj", "cls", "soft", "feat_mse", "teacher")
    total, terms = made.objective(images(0), batch(0).targets)
    assert total.item() == pytest.approx(4 * terms.sum().item(), rel=1e-5)
    assert terms[-1] > 0


def test_the_teacher_moves_at_its_own_rate_and_has_an_average_of_its_own(tmp_path: Path) -> None:
    made = joint(tmp_path, teacher_rate=0.25)
    before = [parameter.detach().clone() for parameter in teacher_of(made).parameters()]
    made.train_batch(batch(0), 0)
    rates = [group["lr"] for group in made.optimizer.param_groups]
    assert rates[3:] == [0.25 * rate for rate in rates[:3]]
    own = {id(p) for group in made.optimizer.param_groups[3:] for p in group["params"]}
    assert own == {id(parameter) for parameter in teacher_of(made).parameters()}
    still = list(map(torch.equal, before, teacher_of(made).parameters()))
    assert sum(still) < 0.1 * len(still)
    assert [average.updates for average in made.averages] == [1, 1]
    assert made.averages[1].module.arch == teacher_of(made).model.arch


def test_large_gradients_of_the_student_do_not_slow_the_teacher(tmp_path: Path) -> None:
    moved = []
    for weight in (0.0, 1e6):
        losses = {"soft": {"weight": 1.0}, "feat_mse": {"weight": weight + 1e-6}}
        made = trainer(config(strategy="joint", losses=losses), tmp_path, distils=True)
        made.train_batch(batch(0), 0)
        moved.append([parameter.detach().clone() for parameter in teacher_of(made).parameters()])
    assert all(map(torch.equal, *moved))


@pytest.mark.usefixtures("judged")
def test_a_joint_training_goes_on_bit_for_bit_and_leaves_both_networks(tmp_path: Path, judged: list[float]) -> None:  # noqa: F811
    judged += [0.1, 0.1]
    settings = config(strategy="joint", losses=LOSSES, epochs=9, val_interval=1, optimizer={"nominal_batch": 12})
    made = trainer(settings, tmp_path, images=12, distils=True)
    for _ in range(2):
        made.close_epoch(made.train_epoch(Progress()))
    other = trainer(settings, tmp_path, images=12, distils=True, seed=5)
    other.load_state_dict(load_state(tmp_path / STATE))
    for number in range(6, 9):
        assert torch.equal(made.train_batch(batch(number), number), other.train_batch(batch(number), number))
    for one, same in zip(made.averages, other.averages, strict=True):
        assert one.updates == same.updates
        same_state = same.module.state_dict()
        assert all(torch.equal(value, same_state[key]) for key, value in one.module.state_dict().items())
    assert load_model(tmp_path / "best.safetensors").arch == made.objective.model.arch
    for name in ("best.safetensors", "last.safetensors"):
        assert load_model(tmp_path / of_teacher(name)).arch == teacher_of(made).model.arch
    header = (tmp_path / "results.csv").read_text().splitlines()[0]
    assert "train/teacher_loss" in header
    assert "share/teacher" not in header


def test_threads_are_measured_with_both_networks_and_leave_them_as_they_are(tmp_path: Path) -> None:
    made = joint(tmp_path)
    before = {name: value.clone() for name, value in made.objective.state_dict().items()}
    made._step_of_a_copy()()
    assert all(torch.equal(value, before[name]) for name, value in made.objective.state_dict().items())
