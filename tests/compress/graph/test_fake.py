from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from compress.graph.fake import FakeQuantise, Parameters, Step, fake_body, fake_weights
from compress.graph.parts import GraphParts
from compress.graph.placement import layers
from compress.graph.qdq import quantised
from compress.graph.ranges import calibrate, scale_of
from compress.graph.session import exposing, open_session
from compress.schemes import SCHEMES, Scheme
from runtime.errors import EdgestillError

FORMS = {
    **{name: replace(scheme, half_body=False, space_to_depth=False) for name, scheme in SCHEMES.items()},
    "signed": Scheme(),
}
"""Schemes whose files compute in float32, the stem as it is."""


@pytest.fixture(scope="module")
def canvases():
    return [np.random.default_rng(seed).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for seed in range(2)]


@pytest.fixture(scope="module")
def ranges(case, canvases):
    return calibrate(case.boxes(), canvases, "mse")


def parameters_of(model: onnx.ModelProto, scales: tuple[float, ...]) -> Parameters:
    weights = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in model.graph.initializer}
    return Parameters(weights, [torch.tensor(scale) for scale in scales])


def values_of(file: onnx.ModelProto, steps: tuple[Step, ...], canvas: np.ndarray) -> dict[str, torch.Tensor]:
    """Everything that the steps read or make, as the file computes it."""
    names = list(dict.fromkeys(name for step in steps for name in (*step.inputs, step.output)))
    session = open_session(exposing(file, names), optimise=False, as_written=True)
    return {n: torch.from_numpy(v) for n, v in zip(names, session.run(names, {"canvas": canvas}), strict=True)}


@pytest.mark.parametrize("float_layers", [(), ("down.1",)], ids=["all INT8", "a layer in float"])
@pytest.mark.parametrize("scheme", FORMS.values(), ids=list(FORMS))
def test_every_step_computes_what_its_node_of_the_file_computes(case, ranges, canvases, scheme, float_layers):
    """Each from the file's own values: rounding is chaotic, so ends of two whole networks say nothing."""
    model = case.boxes()
    body = fake_body(model, ranges, scheme, float_layers)
    file = quantised(model, ranges, scheme, float_layers=float_layers)
    values, parameters = values_of(file, body.steps, canvases[0]), parameters_of(model, body.scales)
    assert sum(step.output.endswith(".dequantised") for step in body.steps) == len(
        [node for node in file.graph.node if node.op_type == "QuantizeLinear"]
    )
    for step in body.steps:
        found, expected = step.run(parameters, [values[name] for name in step.inputs]), values[step.output]
        if step.output.endswith(".dequantised"):
            assert torch.equal(found, expected), step.output
        else:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=step.output)
    assert all(name in values for name in body.features)


def test_an_fp16_body_has_the_scales_of_its_file(case, ranges):
    model, scheme = case.boxes(), SCHEMES["tensorrt"]
    body = fake_body(model, ranges, scheme)
    arrays = {t.name: numpy_helper.to_array(t) for t in quantised(model, ranges, scheme).graph.initializer}
    parameters, ramp = parameters_of(model, body.scales), torch.linspace(-20, 20, 4001)
    for step in (step for step in body.steps if step.output.endswith(".dequantised")):
        scale = np.float32(arrays[f"{step.inputs[0]}.scale"])
        expected = np.clip(np.rint(ramp.numpy() / scale), -128, 127) * scale
        assert np.array_equal(step.run(parameters, [ramp]).numpy(), expected), step.output
    weights = parameters.weights["down.1.weight"]
    scale = arrays["down.1.weight.scale"].astype(np.float32)[:, None, None, None]
    file = torch.from_numpy(arrays["down.1.weight.quantised"].astype(np.float32) * scale)
    assert torch.equal(fake_weights(weights, 127, half=True), file)


@pytest.mark.parametrize("scheme", FORMS.values(), ids=list(FORMS))
def test_learned_scales_pass_the_writer_unchanged(case, ranges, scheme):
    model = case.boxes()
    body = fake_body(model, ranges, scheme)
    learned = [float(np.float32(scale * 1.1)) for scale in body.scales]
    ranges_of_all = body.ranges(learned)
    written = {name: scale_of(ranges_of_all[name], unsigned=scheme.unsigned) for name in body.scaled}
    assert ranges_of_all.keys() == {body.pixels, *body.scaled}
    assert [np.float32(scale) for scale, _ in written.values()] == [np.float32(scale) for scale in learned]
    assert tuple(zero for _, zero in written.values()) == body.zero_points
    same = quantised(model, body.ranges(body.scales), scheme)
    assert same.SerializeToString(deterministic=True) == quantised(model, ranges, scheme).SerializeToString(
        deterministic=True
    )


def test_a_pool_and_a_resize_have_the_scale_of_what_they_read(case, ranges):
    """The writer gives both Q/DQ pairs one scale, so only one is learned."""
    body = fake_body(case.boxes(), ranges, Scheme())
    roundings = [step for step in body.steps if step.output.endswith(".dequantised")]
    assert len(body.scaled) < len(roundings)


def test_gradients_are_those_of_learned_step_sizes():
    torch.manual_seed(0)
    x, scale = (
        (3 * torch.randn(500)).double().requires_grad_(),
        torch.tensor(0.11, dtype=torch.float64, requires_grad=True),
    )
    weight = torch.randn(500).double()
    found = torch.autograd.grad((FakeQuantise.apply(x, scale, -9, 12) * weight).sum(), (x, scale))
    inside = (x / scale).clamp(-9, 12)
    plain = scale * (inside + (inside.round() - inside).detach())
    expected = torch.autograd.grad((plain * weight).sum(), (x, scale))
    near_an_end = (x / scale < -9) & (x / scale > -9.5) | (x / scale > 12) & (x / scale < 12.5)
    torch.testing.assert_close(found[0][~near_an_end], expected[0][~near_an_end])
    torch.testing.assert_close(found[0][near_an_end], weight[near_an_end], msg="rounded to the end, not clipped")
    torch.testing.assert_close(found[1], expected[1], rtol=0.05, atol=0.5)
    far = torch.tensor([-9.0, 5.0], dtype=torch.float64, requires_grad=True)
    step = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    FakeQuantise.apply(far, step, -9, 12).sum().backward()
    assert far.grad.tolist() == [0, 0]
    assert float(step.grad) == pytest.approx(3), "by the scale it is the end of the range: -9 + 12"


def test_weights_pass_their_gradient_unchanged():
    weights = torch.randn(4, 3, 3, 3, requires_grad=True)
    fake_weights(weights, 127).mul(2.0).sum().backward()
    assert torch.equal(weights.grad, torch.full_like(weights, 2.0))
    assert not fake_weights(torch.zeros(2, 1, 1, 1), 127).any(), "a channel of zeros has a scale, too"


def test_every_scale_and_weight_of_the_body_learns(case, ranges, canvases):
    body = fake_body(case.boxes(), ranges, Scheme())
    parameters = parameters_of(case.boxes(), body.scales)
    for tensor in (*parameters.scales, *(t for t in parameters.weights.values() if t.dtype == torch.float32)):
        tensor.requires_grad_()
    pixels = torch.from_numpy(canvases[0]).permute(0, 3, 1, 2).float()
    torch.stack([level.square().mean() for level in body(pixels, parameters)]).sum().backward()
    assert all(scale.grad is not None and scale.grad.isfinite() and scale.grad != 0 for scale in parameters.scales)
    for layer in layers(GraphParts(case.boxes().graph), Scheme()):
        assert parameters.weights[f"{layer}.weight"].grad.any(), layer


def test_an_operator_outside_the_table_is_named(case, ranges):
    model = case.boxes()
    node = next(node for node in model.graph.node if node.op_type == "MaxPool")
    node.op_type = "AveragePool"
    with pytest.raises(EdgestillError, match="AveragePool"):
        fake_body(model, ranges, Scheme())
