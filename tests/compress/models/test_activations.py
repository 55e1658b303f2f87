from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compress.models import Architecture, YOLOv5
from compress.models.activations import ACTIVATIONS

every_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def operators(name: str, *, recorded: bool) -> list[str]:
    """The operators of one call on an input whose gradient is `recorded` or not."""
    x = nn.BatchNorm2d(2)(torch.randn(1, 2, 4, 4)).detach().requires_grad_(recorded) * 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        ACTIVATIONS[name]()(x)
    return [event.key for event in seen.key_averages() if event.key.startswith("aten::")]


@every_activation
def test_an_activation_has_the_name_and_the_values_of_torchs(name: str) -> None:
    ours, x = ACTIVATIONS[name](), torch.randn(2, 3, 4, 4)
    theirs = nn.LeakyReLU(0.1) if name == "LeakyReLU" else getattr(nn, name)()
    assert type(ours).__name__ == name
    assert torch.equal(ours(x.clone()), theirs(x))


@every_activation
def test_nothing_is_copied_for_the_backward_pass(name: str) -> None:
    assert "aten::clone" not in operators(name, recorded=True)


@every_activation
def test_without_a_gradient_the_input_is_overwritten(name: str) -> None:
    with torch.no_grad():
        x = torch.randn(2, 3, 4, 4)
        assert ACTIVATIONS[name]()(x).data_ptr() == x.data_ptr()


@every_activation
def test_a_convolution_keeps_two_maps_for_the_backward_pass(name: str) -> None:
    """The input of BatchNorm, and that of the activation or its output; beside its own input."""
    stem = YOLOv5(Architecture.of_scale("p", ("bolt",), activation=name)).train().model[0]
    kept: dict[int, torch.Size] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = stem(torch.rand(1, 3, 32, 32))
    assert list(kept.values()).count(out.shape) == 2
