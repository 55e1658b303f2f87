"""Parameter groups and optimisers as YOLOv5 v6.2 and later have them."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from torch import nn

from compress.config import OptimizerConfig
from compress.models.checkpoint import FAKE_SCALES
from compress.training.schedule import BIASES, NORMS, WEIGHTS, Rates
from runtime.errors import UsageError

RATE = "rate"
"""Key of a group whose learning rate is a share of that of its role."""
_NORMALISATIONS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def parameter_groups(module: nn.Module, without: nn.Module | None = None) -> list[list[nn.Parameter]]:
    """All parameters by role: biases, weights, normalisation weights (that order), but those of a part `without`.

    Frozen parameters are in the groups too: they get no gradient, so no optimiser changes them, and the groups (hence
    a saved optimiser state) do not depend on what is frozen.
    """
    groups: list[list[nn.Parameter]] = [[], [], []]
    left_out = set(without.modules()) if without else set()
    for owner in (part for part in module.modules() if part not in left_out):
        for name, parameter in owner.named_parameters(recurse=False):
            groups[_role(owner, name)].append(parameter)
    return groups


def _role(owner: nn.Module, name: str) -> int:
    if name in ("bias", FAKE_SCALES):  # scales are logarithms: to decay would be to go to 1
        return BIASES
    return NORMS if isinstance(owner, _NORMALISATIONS) else WEIGHTS


def build_optimizer(
    module: nn.Module,
    config: OptimizerConfig,
    weight_decay: float,
    *,
    slower: nn.Module | None = None,
    rate: float = 1.0,
) -> torch.optim.Optimizer:
    """Nesterov SGD, Adam or AdamW over the three groups; only `WEIGHTS` decays.

    `weight_decay` is the already scaled one (`Schedule.weight_decay`). A part `slower` of the module has three groups
    of its own at the end, whose learning rates are `rate` times the others'.
    """
    groups = _groups(parameter_groups(module, without=slower), weight_decay)
    if slower:
        groups += [group | {RATE: rate} for group in _groups(parameter_groups(slower), weight_decay)]
    betas = (config.momentum, 0.999)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr0, momentum=config.momentum, nesterov=True, fused=True)
    if config.name == "adam":
        return torch.optim.Adam(groups, lr=config.lr0, betas=betas, fused=True)
    return torch.optim.AdamW(groups, lr=config.lr0, betas=betas, fused=True)


def _groups(roles: list[list[nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    groups: list[dict[str, Any]] = [{"params": group, "weight_decay": 0.0} for group in roles]
    groups[WEIGHTS]["weight_decay"] = weight_decay
    return groups


def set_rates(optimizer: torch.optim.Optimizer, rates: Rates) -> None:
    """Write the learning rate of each group, and the momentum if the optimiser has one (SGD)."""
    for group, lr in zip(optimizer.param_groups, cycle(rates.lr), strict=False):
        group["lr"] = lr * group.get(RATE, 1.0)
        if "momentum" in group:
            group["momentum"] = rates.momentum


def freeze(layers: nn.Sequential, count: int) -> None:
    """Stop training the first `count` layers; their normalisation statistics still move, as in YOLOv5.

    Raises UsageError when no layer would be left to train.
    """
    if count >= len(layers):
        raise UsageError(f"freeze is {count}, the network has {len(layers)} layers", "Leave one to train, at least")
    layers[:count].requires_grad_(False)
