from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from compress.models import Architecture, YOLOv5, complexity
from compress.models.architecture import DEFAULT_ANCHORS_P6
from runtime.errors import InputError, UsageError

NAMES = tuple(map(str, range(80)))
RUNS = [f"im{image}_{size}" for image in (127, 544, 72, 309) for size in (640, 320)]
ATOL_LOGIT, ATOL_PIXEL, ATOL_PROBABILITY = 1e-4, 0.01, 1e-5


def architecture(name: str, names=NAMES) -> Architecture:
    return Architecture.of_scale(name[0], names, layout="v6-p6" if name.endswith("6") else "v6")


def meta(arch: Architecture) -> YOLOv5:
    with torch.device("meta"):
        return YOLOv5(arch)


def count(network) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture(scope="module")
def figures(reference):
    return json.loads((reference / "arch.json").read_text())


@pytest.fixture(scope="module")
def inference(reference):
    return json.loads((reference / "inference_reference.json").read_text())


@pytest.mark.parametrize("name", ["n", "s", "m", "l", "x", "n6", "s6", "m6", "l6", "x6"])
def test_tensors_and_parameters_of_every_scale_are_those_of_yolov5(figures, name):
    expected = figures[name]
    network = meta(architecture(name))
    state = network.state_dict()
    lines = "\n".join(f"{key} {tuple(value.shape)} {value.dtype}" for key, value in state.items())
    assert hashlib.sha256(lines.encode()).hexdigest() == expected["sd_sha256"]
    if "state_dict" in expected:
        assert {key: list(value.shape) for key, value in state.items()} == expected["state_dict"]
    assert count(network) == expected["params"]
    assert count(network.fuse()) == expected["fused_params"]
    for nc, parameters in expected["params_by_nc"].items():
        assert count(meta(architecture(name, NAMES[: int(nc)]))) == parameters


@pytest.mark.parametrize("name", ["n", "x", "n6"])
def test_layers_and_output_shapes_are_those_of_yolov5(figures, name):
    expected, arch = figures[name], architecture(name)
    network = meta(arch)
    shapes = []
    for layer in network.model:
        layer.register_forward_hook(lambda _, __, output: shapes.append(output))
    network.eval()(torch.empty(1, 3, 256, 256, device="meta"))
    for row, layer, module, output in zip(expected["layers"], arch.layers, network.model, shapes, strict=True):
        assert row["type"].split(".")[-1] == layer.block
        assert row["f"] == (layer.source[0] if len(layer.source) == 1 else list(layer.source))
        assert row["params"] == count(module)
        found = [list(o.shape[1:]) for o in output] if isinstance(output, list) else list(output.shape[1:])
        assert found == row["out_CHW_at_256"]
    assert network.strides == tuple(map(int, expected["strides"]))


@pytest.mark.parametrize("name", ["n", "s", "m", "l", "x"])
def test_macs_are_those_of_yolov5(figures, name):
    assert complexity(architecture(name)).macs == figures[name]["conv_macs_640"]


@pytest.mark.parametrize(("layout", "parameters"), [("v4", 7_276_605), ("v2", 7_468_157)])
def test_older_layouts_have_the_parameters_of_their_releases(layout, parameters):
    assert count(meta(Architecture.of_scale("s", NAMES, layout=layout))) == parameters


def test_a_seeded_network_has_the_values_of_a_seeded_yolov5(reference):
    expected = json.loads((reference / "train_reference.json").read_text())["init_seed0_yolov5n"]
    torch.manual_seed(0)
    network = YOLOv5(architecture("n"))
    network.init_detect_bias()
    state = network.state_dict()
    for key, (total, absolute) in expected["sums"].items():
        assert state[key].double().sum().item() == pytest.approx(total, abs=1e-9)
        assert state[key].double().abs().sum().item() == pytest.approx(absolute, abs=1e-9)
    for conv, bias in zip(network.detect.m, expected["detect_bias"], strict=True):
        assert torch.allclose(conv.bias[: len(bias)], torch.tensor(bias), atol=1e-6)
    for key, value in state.items():
        fresh = {"running_var": 0.9, "running_mean": 0.0, "num_batches_tracked": 1}.get(key.split(".")[-1])
        assert fresh is None or (value == torch.tensor(fresh, dtype=value.dtype)).all()


def _images(reference, run) -> torch.Tensor:
    with np.load(reference / "letterboxed_bgr_uint8.npz") as file:
        bgr = file[run]
    return torch.from_numpy(np.ascontiguousarray(bgr[..., ::-1].transpose(2, 0, 1))[None]).float() / 255


def _rows(raw) -> torch.Tensor:
    return torch.cat([level.flatten(1, 3) for level in raw], 1)


def _assert_decoded(found, expected) -> None:
    np.testing.assert_allclose(found[..., :4], expected[..., :4], rtol=0, atol=ATOL_PIXEL)
    np.testing.assert_allclose(found[..., 4:], expected[..., 4:], rtol=0, atol=ATOL_PROBABILITY)


@pytest.mark.parametrize("run", RUNS)
def test_raw_and_decoded_rows_equal_the_reference(network, reference, inference, run):
    with torch.inference_mode():
        raw = network(_images(reference, run))
        decoded = network.decode(raw)[0].numpy()
    rows = _rows(raw)[0].numpy()
    expected = inference["runs"][run]
    assert [list(level.shape) for level in raw] == expected["raw_shapes"]
    np.testing.assert_allclose([level.double().sum().item() for level in raw], expected["raw_sum"], rtol=1e-6)
    with np.load(reference / f"{run}.npz") as file:
        for picked, suffix in (("rows", "rows"), ("top200_obj_rows", None)):
            raw_name, decoded_name = ("raw_rows", "decoded_rows") if suffix else ("top200_raw", "top200_decoded")
            np.testing.assert_allclose(rows[file[picked]], file[raw_name], rtol=0, atol=ATOL_LOGIT)
            _assert_decoded(decoded[file[picked]], file[decoded_name])


def test_fused_rows_equal_the_reference(network, reference):
    run = "im127_320"
    with torch.inference_mode():
        fused = network.fuse()
        decoded = fused.decode(fused(_images(reference, run)))[0].numpy()
    with np.load(reference / f"{run}.npz") as file:
        _assert_decoded(decoded, file["decoded"][0])


def test_every_activation_equals_the_reference_on_a_formula_image(network, reference, inference):
    with np.load(reference / "synthetic_64x96.npz") as file:
        arrays = dict(file)
    outputs = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out)) for layer in network.model]
    with torch.inference_mode():
        raw, features = network.forward_features(torch.from_numpy(arrays["input_u8"]).float() / 255)
        decoded = network.decode(raw).numpy()
    for hook in hooks:
        hook.remove()
    for name, expected in arrays.items():
        if name.startswith("layer"):
            found = outputs[int(name[5:7])][0].numpy()
            np.testing.assert_allclose(found, expected, rtol=0, atol=ATOL_LOGIT)
    for index, mean in inference["synthetic_64x96"]["layer_mean"].items():
        assert outputs[int(index)].double().mean().item() == pytest.approx(mean, abs=1e-5)
        assert list(outputs[int(index)].shape) == inference["synthetic_64x96"]["layer_shape"][index]
    for level, found in zip((3, 4, 5), raw, strict=True):
        np.testing.assert_allclose(found.numpy(), arrays[f"raw_P{level}"], rtol=0, atol=ATOL_LOGIT)
    _assert_decoded(decoded, arrays["decoded"])
    assert all(feature is outputs[index] for feature, index in zip(features, (17, 20, 23), strict=True))


def test_training_mode_returns_the_raw_maps_of_the_reference(network, reference):
    with np.load(reference / "train_reference.npz") as file:
        images, expected = file["imgs_u8"], [file[f"train_raw_P{level}"] for level in (3, 4, 5)]
    state = {key: value.clone() for key, value in network.state_dict().items()}
    try:
        with torch.no_grad():
            raw = network.train()(torch.from_numpy(images).float() / 255)
    finally:
        network.load_state_dict(state)
        network.eval()
    for found, level in zip(raw, expected, strict=True):
        np.testing.assert_allclose(found.numpy(), level, rtol=0, atol=5e-4)


@pytest.mark.parametrize("layout", ["v6", "v6-p6", "v4", "v2"])
@pytest.mark.parametrize("activation", ["SiLU", "LeakyReLU", "Hardswish"])
def test_fusing_changes_a_copy_and_no_output(layout, activation):
    arch = replace(Architecture.of_scale("p", ("a", "b"), layout=layout), activation=activation)
    torch.manual_seed(0)
    network = YOLOv5(arch).train()
    images = torch.rand(2, 3, 64, 128)
    with torch.no_grad():
        for _ in range(3):
            network(images)
        before = network.eval()(images)
        fused = network.fuse()
        for old, new, again in zip(before, fused(images), network(images), strict=True):
            torch.testing.assert_close(new, old, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(again, old, rtol=0, atol=0)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert fused.fuse() is not fused


def test_memory_format_changes_no_output(network):
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        plain = network.fuse()(images)
        last = network.fuse().to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    for a, b in zip(plain, last, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=ATOL_LOGIT)
        assert b.is_contiguous()


def test_every_parameter_gets_a_gradient():
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", ("a",))).train()
    sum(level.square().sum() for level in network(torch.rand(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_one_class_starts_certain():
    network = YOLOv5(Architecture.of_scale("p", ("bolt",)))
    torch.nn.init.zeros_(network.detect.m[0].bias)
    network.init_detect_bias()
    bias = network.detect.m[0].bias.view(3, 6)
    assert bias[:, 5].tolist() == pytest.approx([11.0021] * 3, abs=1e-3)
    assert bias[:, 4].tolist() == pytest.approx([-6.6846] * 3, abs=1e-3)


def test_feature_channels_are_those_of_the_features(network):
    _, features = network.forward_features(torch.zeros(1, 3, 64, 64))
    assert tuple(feature.shape[1] for feature in features) == network.feature_channels == (64, 128, 256)


def test_architecture_survives_json():
    arch = Architecture(0.5, 0.375, ("a", "b"), [[(1, 2.5)], [(3, 4)], [(5, 6)]], activation="ReLU")
    assert Architecture.from_json(json.loads(json.dumps(arch.to_json()))) == arch
    assert hash(arch) == hash(Architecture.from_json(arch.to_json()))


def test_four_levels_of_anchors_make_a_network_of_four_levels():
    assert Architecture.of_scale("p", ("a",), anchors=DEFAULT_ANCHORS_P6).strides == (8, 16, 32, 64)


@pytest.mark.parametrize(
    "change",
    [
        {"layout": "v9"},
        {"activation": "os.system"},
        {"depth": 0},
        {"width": float("nan")},
        {"width": 1e9},
        {"depth": True},
        {"names": ()},
        {"names": "bolt"},
        {"names": (1,)},
        {"anchors": ()},
        {"anchors": [[(1, 2)], [(1, 2)]]},
        {"anchors": [[(1, 2)], [(1, 2)], [(1, -2)]]},
        {"anchors": [[(1, 2)], [(1, 2)], [(1, 2), (3, 4)]]},
        {"anchors": [[1, 2]] * 3},
    ],
)
def test_an_impossible_architecture_is_refused(change):
    fields = {"depth": 0.33, "width": 0.25, "names": ("a",)} | change
    with pytest.raises(UsageError) as caught:
        Architecture(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"strides": [8, 16]}, {"extra": 1}, {"depth": "deep"}, None])
def test_a_damaged_architecture_json_is_refused(change):
    raw = Architecture.of_scale("n", ("a",)).to_json()
    with pytest.raises(InputError):
        Architecture.from_json(raw | change if change else None)


def test_an_unknown_scale_names_the_known_ones():
    with pytest.raises(UsageError, match="p, n, s, m, l, x"):
        Architecture.of_scale("h", ("a",))
