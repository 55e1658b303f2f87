from __future__ import annotations

import json
import pathlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compress.models import (
    LAYOUTS,
    Architecture,
    YOLOv5,
    describe,
    load,
    load_model,
    network_digest,
    save_model,
    transfer,
)
from compress.models.pickle_reader import Stub, find_name
from compress.models.pickle_to_json import to_json
from runtime.errors import EdgestillError, InputError

SILU_OF = {"v2": "LeakyReLU"}


def seeded(arch: Architecture, seed: int = 0) -> YOLOv5:
    torch.manual_seed(seed)
    return YOLOv5(arch).eval()


def refusal(path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    assert caught.value.hint
    return text


def test_an_official_checkpoint_is_read(weights):
    checkpoint = load(weights)
    assert checkpoint.format == "zip"
    assert checkpoint.architecture == Architecture.of_scale("n", checkpoint.architecture.names)
    assert checkpoint.architecture.names[:2] == ("person", "bicycle")
    assert len(checkpoint.state_dict) == 349
    assert {value.dtype for value in checkpoint.state_dict.values()} == {torch.float32, torch.int64}
    assert checkpoint.meta["date"] == "2022-02-08T18:24:20.515893"
    assert checkpoint.meta["hyp"]["weight_decay"] == 0.001
    assert checkpoint.meta["stripped"]


def test_a_custom_checkpoint_is_read_with_its_classes(shared):
    arch = load(shared / "yolov5/weights/ppe-yolov5n.pt").architecture
    assert arch.names == ("helmet", "vest")
    assert arch.scale == "n"


def test_loading_draws_no_random_numbers_and_makes_a_trainable_model(weights):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_model(weights)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert all(p.requires_grad and not p.is_meta and p.dtype == torch.float32 for p in model.parameters())


def test_description_tells_what_is_in_the_file(weights):
    facts = describe(weights)
    assert json.loads(json.dumps(facts)) == facts
    assert (facts["scale"], facts["classes"], facts["parameters"], facts["fused_parameters"]) == (
        "n", 80, 1_872_157, 1_867_405,
    )  # fmt: skip
    assert facts["macs"] == 2_234_060_800
    assert facts["gflops"] == 4.468
    assert describe(weights, 320)["macs"] * 4 == facts["macs"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("container", ["zip", "legacy"])
def test_every_layout_in_both_containers_comes_back_bit_for_bit(tmp_path, foreign, layout, container):
    arch = replace(
        Architecture.of_scale("p", ("bolt", "nut", "washer"), layout=layout), activation=SILU_OF.get(layout, "SiLU")
    )
    network = seeded(arch)
    expected = {key: value.half().float() if value.is_floating_point() else value for key, value in
                network.state_dict().items()}  # fmt: skip
    path = tmp_path / "best.pt"
    torch.save({"model": foreign(network), "ema": None}, path, _use_new_zipfile_serialization=container == "zip")
    checkpoint = load(path)
    assert (checkpoint.format, checkpoint.architecture) == (container, arch)
    assert list(checkpoint.state_dict) == list(expected)
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())
    images = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        model = load_model(path)
        rows = model.decode(model(images))
    assert rows.shape == (1, sum(3 * (64 // s) ** 2 for s in arch.strides), 8)
    assert torch.isfinite(rows).all()


def test_one_network_has_one_digest_in_every_file_and_any_change_another(tmp_path, foreign, small):
    torch.save({"model": foreign(seeded(small)), "epoch": 3}, tmp_path / "best.pt")
    model = load_model(tmp_path / "best.pt")
    save_model(model, tmp_path / "same.safetensors", {"note": "other metadata"})
    first, same = (load(tmp_path / name) for name in ("best.pt", "same.safetensors"))
    digest = network_digest(first.architecture, first.state_dict)
    assert network_digest(same.architecture, same.state_dict) == digest == network_digest(small, model.state_dict())
    assert network_digest(replace(small, names=("a", "b")), model.state_dict()) == digest
    anchors = tuple(tuple((2 * w, h) for w, h in level) for level in small.anchors)
    others = [replace(small, activation="ReLU"), replace(small, anchors=anchors)]
    assert digest not in [network_digest(other, model.state_dict()) for other in others]
    for key in ("model.0.conv.weight", "model.0.bn.running_var", "model.24.m.0.bias"):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state[key].view(-1)[0] += 1e-3
        assert network_digest(small, state) != digest


def test_old_checkpoints_with_anchors_in_pixels_and_counters_are_read(tmp_path, foreign):
    made = foreign(seeded(Architecture.of_scale("p", ("a",), layout="v4")))
    made.model[-1].register_buffer("anchor_grid", torch.ones(3, 1, 3, 1, 1, 2))
    made.model[0].register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
    torch.save({"model": made}, tmp_path / "old.pt")
    assert not any(key.endswith(("anchor_grid", "total_ops")) for key in load(tmp_path / "old.pt").state_dict)


def test_of_a_training_file_the_average_is_read_and_the_optimizer_is_not(tmp_path, foreign, small):
    model, ema = seeded(small, 1), seeded(small, 2)
    expected = ema.state_dict()["model.0.conv.weight"].half().float()
    content = {
        "epoch": 7,
        "best_fitness": np.array([0.25]),
        "model": foreign(model).train(),
        "ema": foreign(ema),
        "updates": 900,
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(9)}}, "param_groups": [{"lr": 0.1}]},
        "date": "2024-01-02T03:04:05",
        "wandb_id": None,
        "opt": {"imgsz": 320, "save_dir": pathlib.PurePosixPath("/runs/exp"), "lr": np.float64(0.5), "s": {1}},
        "git": {"commit": "915bbf2"},
    }
    torch.save(content, tmp_path / "last.pt")
    checkpoint = load(tmp_path / "last.pt")
    assert torch.equal(checkpoint.state_dict["model.0.conv.weight"], expected)
    assert not checkpoint.meta["stripped"]
    assert checkpoint.meta["epoch"] == 7
    assert checkpoint.meta["best_fitness"] == [0.25]
    assert checkpoint.meta["updates"] == 900
    assert checkpoint.meta["opt"]["imgsz"] == 320
    assert checkpoint.meta["opt"]["save_dir"].endswith("runs/exp")
    assert checkpoint.meta["opt"]["lr"] == 0.5
    json.dumps(checkpoint.meta)


@pytest.mark.parametrize("module", ["pathlib", "pathlib._local"])  # the second since Python 3.13
def test_paths_of_every_python_become_text(module):
    path = Stub(find_name(module, "PosixPath"), ("/", "runs", "exp"))
    assert to_json(path, torch.zeros) == "/runs/exp"


@pytest.mark.parametrize("names", [["bolt", "nut"], {0: "bolt", 1: "nut"}, {1: "nut", 0: "bolt"}])
def test_names_may_be_a_list_or_a_table(tmp_path, foreign, small, names):
    torch.save({"model": foreign(seeded(small), names=names)}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").architecture.names == ("bolt", "nut")


@pytest.mark.parametrize(("names", "texts"), [({0: 0, 1: 1}, ("0", "1")), ([1.5, False], ("1.5", "False"))])
def test_names_that_yaml_made_into_numbers_are_text_again(tmp_path, foreign, small, names, texts):
    torch.save({"model": foreign(seeded(small), names=names)}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").architecture.names == texts


def test_scale_is_told_by_shapes_where_the_file_does_not_state_it(tmp_path, foreign, small):
    torch.save({"model": foreign(seeded(small), yaml=None)}, tmp_path / "yolov5x.pt")
    assert load(tmp_path / "yolov5x.pt").architecture == small


def test_custom_anchors_are_kept_in_pixels(tmp_path, foreign, small):
    arch = replace(small, anchors=[[(9, 12)], [(34, 50)], [(96, 256)]])
    torch.save({"model": foreign(seeded(arch))}, tmp_path / "a.pt")
    assert load(tmp_path / "a.pt").architecture.anchors == arch.anchors


def _other_block(made):
    other = type("C3x", (torch.nn.Module,), {"__module__": "models.common"})
    sys.modules["models.common"].C3x = made.model[4].__class__ = other


def _more_padding(made):
    made.model[0].conv.padding = (3, 3)


def _other_epsilon(made):
    made.model[6].m[0].cv1.bn.eps = 1e-4


def _mixed_activation(made):
    made.model[3].act = torch.nn.Hardswish()


def _wrong_source(made):
    made.model[12].f = [-1, 4]


def _no_residual(made):
    made.model[2].m[0].add = False


def _grouped(made):
    made.model[5].conv.groups = 2


def _fused(made):
    del made.model[1]._modules["bn"]


def _shorter(made):
    del made.model[24]


def _other_kernel(made):
    made.model[9].m.kernel_size = 7


def _tanh(made):
    for module in made.modules():
        if "act" in module._modules:
            module._modules["act"] = torch.nn.Tanh()


def _not_finite(made):
    made.model[0].conv.weight.data[0, 0, 0, 0] = float("nan")


def _integers(made):
    made.model[0].bn._buffers["running_mean"] = torch.zeros(8, dtype=torch.int32)


REFUSED = {
    _other_block: "layer 4 is C3x from [-1] instead of C3",
    _more_padding: "module model.0.conv has padding (3, 3) instead of (2, 2)",
    _other_epsilon: "model.6.m.0.cv1.bn has eps 0.0001 instead of 0.001",
    _mixed_activation: "module model.3.act is Hardswish instead of SiLU",
    _wrong_source: "layer 12 is Concat from [-1, 4] instead of Concat from [-1, 6]",
    _no_residual: "module model.2.m.0 has add",
    _grouped: "module model.5.conv has groups 2 instead of 1",
    _fused: "tensor model.1.bn.weight is missing",
    _shorter: "layer 24 is nothing instead of Detect",
    _other_kernel: "module model.9.m has kernel_size 7 instead of 5",
    _tanh: "its activation is Tanh",
    _not_finite: "tensor model.0.conv.weight holds values that are not finite",
    _integers: "tensor model.0.bn.running_mean is torch.int32",
}


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_a_network_that_would_compute_something_else_is_refused(tmp_path, foreign, small, change):
    made = foreign(seeded(small))
    change(made)
    torch.save({"model": made}, tmp_path / "a.pt")
    assert REFUSED[change] in refusal(tmp_path / "a.pt")


def test_a_network_with_other_shapes_than_it_states_is_refused(tmp_path, foreign, small):
    made = foreign(seeded(small))
    made.model[0].conv.weight = torch.nn.Parameter(torch.zeros(8, 1, 6, 6))
    torch.save({"model": made}, tmp_path / "a.pt")
    assert "tensor model.0.conv.weight has shape (8, 1, 6, 6) instead of (8, 3, 6, 6)" in refusal(tmp_path / "a.pt")


@pytest.mark.parametrize("content", [{"model": None}, {"model": {"a": torch.zeros(2)}}, [1, 2], {}, torch.zeros(3)])
def test_a_file_without_a_network_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "a.pt")
    assert "it holds no" in refusal(tmp_path / "a.pt")


def test_a_torchscript_program_is_refused(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4)), str(tmp_path / "a.pt"))
    assert "TorchScript" in refusal(tmp_path / "a.pt")


def test_saving_and_loading_is_identity_and_its_bytes_are_reproducible(tmp_path, network):
    meta = {"imgsz": 640, "record": [{"map": 0.5}], "ü": None}
    for name in ("a.safetensors", "b.bin"):
        save_model(network.to(memory_format=torch.channels_last), tmp_path / name, meta)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.bin").read_bytes()
    checkpoint = load(tmp_path / "b.bin")
    assert checkpoint.format == "safetensors"
    assert checkpoint.meta == meta
    assert checkpoint.architecture == network.arch
    for key, value in network.state_dict().items():
        assert torch.equal(checkpoint.state_dict[key], value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.bin"]


def test_a_model_that_cannot_be_written_is_one_line(tmp_path, small):
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgestillError) as caught:
        save_model(YOLOv5(small), tmp_path / "file" / "model.safetensors")
    assert "\n" not in str(caught.value)


def _rewrite(source, goal, *, header=None, tensors=None, metadata=None) -> None:
    with safe_open(source, "pt") as file:
        old = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        text = json.loads(file.metadata()["edgestill"])
    text = json.dumps(header(text)) if header else json.dumps(text)
    save_file(tensors(old) if tensors else old, goal, metadata if metadata is not None else {"edgestill": text})


HEADERS = {
    "another width": (lambda h: h | {"architecture": h["architecture"] | {"width": 0.25}}, "instead of"),
    "another class count": (lambda h: h | {"architecture": h["architecture"] | {"names": ["a"]}}, "instead of"),
    "another version": (lambda h: h | {"schema_version": 2}, "schema version 2"),
    "no metadata": (lambda h: h | {"meta": 3}, "schema version"),
    "no architecture": (lambda h: {k: v for k, v in h.items() if k != "architecture"}, "an architecture has the keys"),
    "a list": (lambda h: [], "schema version"),
    "a code string": (lambda h: h | {"architecture": h["architecture"] | {"activation": "exit()"}}, "activation"),
    "endless names": (lambda h: h | {"architecture": h["architecture"] | {"names": ["a"] * 20_000}}, "names"),
    "another stride": (lambda h: h | {"architecture": h["architecture"] | {"strides": [8]}}, "strides"),
    "one stride": (lambda h: h | {"architecture": h["architecture"] | {"strides": 8}}, "strides"),
    "a layout in a list": (lambda h: h | {"architecture": h["architecture"] | {"layout": ["v6"]}}, "layout"),
    "a depth beyond float": (lambda h: h | {"architecture": h["architecture"] | {"depth": 10**400}}, "depth"),
    "anchors beyond float": (
        lambda h: h | {"architecture": h["architecture"] | {"anchors": [[[10**400, 1]]] * 3}},
        "anchors",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_the_tensors_is_refused(tmp_path, small, name):
    save_model(YOLOv5(small), tmp_path / "a.safetensors")
    _rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", header=HEADERS[name][0])
    assert HEADERS[name][1] in refusal(tmp_path / "b.safetensors")


def test_tensors_of_another_file_are_refused(tmp_path, small):
    save_model(YOLOv5(small), tmp_path / "a.safetensors")
    source, goal = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    _rewrite(source, goal, tensors=lambda old: old | {"extra": torch.zeros(1)})
    assert "tensor extra is not part of the network" in refusal(goal)
    _rewrite(source, goal, tensors=lambda old: {k: v for k, v in old.items() if k != "model.3.bn.bias"})
    assert "tensor model.3.bn.bias is missing" in refusal(goal)
    _rewrite(source, goal, metadata={})
    assert "header" in refusal(goal)
    _rewrite(source, goal, metadata={"edgestill": "[" * 100_000})
    assert "damaged header" in refusal(goal)
    goal.write_bytes(source.read_bytes()[:-1000])
    assert "damaged" in refusal(goal)


def test_transfer_copies_what_agrees_and_names_the_rest(network):
    torch.manual_seed(0)
    mine = YOLOv5(Architecture.of_scale("n", ("a", "b"), anchors=[[(1, 2)] * 3] * 3))
    anchors = mine.detect.anchors.clone()
    copied, left = transfer(network.state_dict(), mine)
    assert left == [f"model.24.m.{level}.{kind}" for level in range(3) for kind in ("weight", "bias")]
    assert len(copied) + len(left) + 1 == len(mine.state_dict())
    assert torch.equal(mine.model[3].conv.weight, network.model[3].conv.weight)
    assert torch.equal(mine.detect.anchors, anchors)
    assert all(parameter.requires_grad for parameter in mine.parameters())
