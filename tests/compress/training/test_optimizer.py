from __future__ import annotations

import pytest
import torch
from torch import nn

from compress.config import OptimizerConfig
from compress.training.optimizer import build_optimizer, freeze, parameter_groups, set_rates
from compress.training.schedule import Rates
from runtime.errors import UsageError


def tiny() -> nn.Sequential:
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)), nn.Conv2d(4, 2, 1), nn.LayerNorm(2)
    )


def test_groups_are_biases_then_weights_then_normalisation_weights() -> None:
    model = tiny()
    biases, weights, norms = parameter_groups(model)
    assert [tuple(p.shape) for p in biases] == [(4,), (2,), (2,)]
    assert [tuple(p.shape) for p in weights] == [(4, 3, 3, 3), (2, 4, 1, 1)]
    assert [tuple(p.shape) for p in norms] == [(4,), (2,)]


def test_every_parameter_is_in_exactly_one_group() -> None:
    model = tiny()
    grouped = [id(p) for group in parameter_groups(model) for p in group]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())


def test_only_weights_decay_in_every_optimiser() -> None:
    for name in ("sgd", "adam", "adamw"):
        optimizer = build_optimizer(tiny(), OptimizerConfig(name=name), weight_decay=0.01)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.01, 0.0]


def test_momentum_is_written_for_sgd_and_left_alone_for_adam() -> None:
    rates = Rates((0.3, 0.2, 0.1), 0.85, 1)
    sgd, adam = (build_optimizer(tiny(), OptimizerConfig(name=name), 0.0) for name in ("sgd", "adam"))
    set_rates(sgd, rates)
    set_rates(adam, rates)
    assert [group["lr"] for group in sgd.param_groups] == [0.3, 0.2, 0.1]
    assert {group["momentum"] for group in sgd.param_groups} == {0.85}
    assert {group["betas"] for group in adam.param_groups} == {(0.937, 0.999)}


def test_frozen_layers_do_not_move_but_their_statistics_do() -> None:
    model = tiny()
    freeze(model, 1)
    optimizer = build_optimizer(model, OptimizerConfig(name="sgd"), 0.1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model[1](model[0](torch.randn(2, 3, 8, 8))).sum().backward()
    optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {"0.1.running_mean", "0.1.running_var", "0.1.num_batches_tracked", "1.weight", "1.bias"}


@pytest.mark.parametrize("count", [3, 24])
def test_a_network_with_nothing_left_to_train_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match=f"freeze is {count}, the network has 3 layers"):
        freeze(tiny(), count)
