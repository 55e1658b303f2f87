"""A backend is a module and a row of the table: nothing else in the runtime knows its name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from runtime import backends, machine
from runtime.__main__ import main
from runtime.backends import BACKENDS, BackendSpec, RawOutput, TensorSpec, backend_of
from runtime.card import Artifact, FileDigest
from runtime.detector import Detector
from runtime.errors import InputError
from runtime.files import sha256

SPEC = BackendSpec(
    name="toyvino",
    module="toyvino_backend",
    suffixes=(".xml",),
    distributions=("toyvino",),
    remedy="Convert it again",
    devices=("npu",),
)


class Toy:
    """A model whose weights are its output."""

    input = TensorSpec("canvas", np.dtype(np.uint8), (1, 64, 64, 3))
    output = TensorSpec("boxes", np.dtype(np.float32), (1, 1, 6))
    providers = ("toyvino",)

    def __init__(self, request):
        assert request.contents[request.path.name] == b"<network/>"
        self.boxes = np.frombuffer(request.contents["toy.bin"], np.float32).reshape(1, 1, 6)

    def run(self, array):
        return RawOutput(self.boxes)

    def close(self):
        pass


@pytest.fixture
def bundle(toys, tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(backends.BACKENDS, SPEC.name, SPEC)
    monkeypatch.setitem(sys.modules, SPEC.module, SimpleNamespace(load=Toy))
    (tmp_path / "toy.xml").write_bytes(b"<network/>")
    (tmp_path / "toy.bin").write_bytes(np.array([8, 16, 24, 32, 0.9, 1], np.float32).tobytes())
    part = FileDigest("toy.bin", sha256(tmp_path / "toy.bin"), 24)
    artifact = Artifact("toy.xml", sha256(tmp_path / "toy.xml"), 10, "fp32", SPEC.name, parts=(part,))
    onnx = toys.canvas_model(tmp_path / "toy.onnx")
    other = Artifact("toy.onnx", sha256(onnx), onnx.stat().st_size, "fp32", "onnx")
    toys.card(artifacts=(artifact, other)).save(tmp_path / "model.json")
    return tmp_path


def test_a_new_backend_is_loaded_from_a_bundle_with_all_parts_of_its_file(bundle, white_frame):
    with Detector.load(bundle) as detector:
        assert (detector.providers, detector.artifact.backend) == (("toyvino",), "toyvino")
        assert detector(white_frame).xyxy.tolist() == [[80, 80, 240, 240]]


def test_a_device_that_it_does_not_serve_passes_to_the_next_file(bundle):
    with Detector.load(bundle, device="cpu") as detector:
        assert detector.artifact.file == "toy.onnx"
        assert detector.skipped == [("toy.xml", "a file for toyvino, device is cpu")]


def test_info_describes_it(bundle, capsys):
    assert main(["info", str(bundle)]) == 0
    assert json.loads(capsys.readouterr().out)["runs_here"]["toy.onnx"] == "yes"


def test_a_suffix_finds_its_backend_and_an_unknown_one_names_the_known():
    assert backend_of(Path("a.ONNX")).name == "onnx"
    assert backend_of(Path("a.plan")).name == "tensorrt"
    with pytest.raises(InputError, match=r"Give \.onnx, .*\.plan"):
        backend_of(Path("a.txt"))


def test_every_library_is_among_the_facts_of_the_machine():
    assert {spec.library for spec in BACKENDS.values()} <= set(machine.PACKAGES)
