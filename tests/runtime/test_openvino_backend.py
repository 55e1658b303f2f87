"""OpenVINO runs the files of ONNX Runtime, and IR files; the toys have known boxes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from runtime.backends import LoadOptions, LoadRequest, load_backend
from runtime.card import METADATA_KEY, Artifact, Batches, FileDigest
from runtime.detector import Detector
from runtime.errors import InputError, UnavailableError, UsageError
from runtime.files import sha256

openvino = pytest.importorskip("openvino")


def load(path, **options):
    return load_backend(LoadRequest("openvino", path, options=LoadOptions(**options)))


@pytest.fixture
def ir(toys, tmp_path) -> Path:
    """The toy as an IR file, converted as `ovc` does it."""
    onnx = toys.canvas_model(tmp_path / "toy.onnx", cutoff=0.2)
    openvino.save_model(openvino.Core().read_model(str(onnx)), str(tmp_path / "toy.xml"), compress_to_fp16=False)
    onnx.unlink()
    return tmp_path / "toy.xml"


def artifact(path: Path, backend: str, parts: tuple[FileDigest, ...] = ()) -> Artifact:
    return Artifact(path.name, sha256(path), path.stat().st_size, "fp32", backend, parts=parts)


@pytest.mark.parametrize("batches", [Batches(1, 1), Batches(2, 2), Batches(1, None)], ids=str)
def test_it_finds_what_onnx_runtime_finds(toys, tmp_path, white_frame, batches):
    path = toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=batches), cutoff=0.3)
    frames = [white_frame, white_frame // 2, white_frame]
    with Detector.load(path, backend="onnx") as one, Detector.load(path, backend="openvino") as other:
        assert other.providers == ("OpenVINO on the CPU",)
        for expected, found in zip(one(frames), other(frames), strict=True):
            np.testing.assert_allclose(found.xyxy, expected.xyxy)
            np.testing.assert_allclose(found.score, expected.score, rtol=1e-6)
            assert found.cutoff == pytest.approx(expected.cutoff)


def test_an_export_of_yolov5_runs_without_a_card(toys, tmp_path, white_frame):
    rows = np.array([[16, 24, 16, 16, 0.9, 0.1, 0.9]], np.float32)
    path = toys.rows_model(tmp_path / "yolov5.onnx", rows)
    with Detector.load(path, backend="openvino") as detector:
        assert detector(white_frame).score.tolist() == pytest.approx([0.81])


def test_an_ir_file_carries_the_card_of_its_onnx_file(ir, white_frame):
    with Detector.load(ir) as detector:
        assert detector.card.names == ("bolt", "nut")
        assert detector(white_frame).score.tolist() == pytest.approx([0.9, 0.5])


def test_a_bundle_gives_an_ir_file_with_its_weights_checked(toys, ir, white_frame):
    weights = ir.with_suffix(".bin")
    part = FileDigest(weights.name, sha256(weights), weights.stat().st_size)
    toys.card(artifacts=(artifact(ir, "openvino", (part,)),)).save(ir.parent / "model.json")
    with Detector.load(ir.parent) as detector:
        assert detector(white_frame).score.tolist() == pytest.approx([0.9, 0.5])
    toys.card(artifacts=(artifact(ir, "openvino"),)).save(ir.parent / "model.json")
    with pytest.raises(InputError, match=r"toy\.bin is not beside it, or not listed in its card"):
        Detector.load(ir.parent)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no element found"),
        (b"<html/>", "its root is <html>"),
        (b'<!DOCTYPE net [<!ENTITY a "b">]><net/>', "a DOCTYPE"),
    ],
)
def test_what_is_no_ir_file_is_one_line(tmp_path, text, reason):
    (tmp_path / "a.xml").write_bytes(text)
    with pytest.raises(InputError, match=f"not an OpenVINO IR file: .*{reason}") as caught:
        Detector.load(tmp_path / "a.xml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("has_card", [True, False])
def test_a_damaged_file_is_one_line_with_openvinos_reason(toys, tmp_path, has_card):
    path = toys.conv_model(tmp_path / "a.onnx", model_card=toys.card() if has_card else None)
    path.write_bytes(path.read_bytes().replace(b"Sigmoid", b"Sagmoid"))
    with pytest.raises(InputError, match=r"a\.onnx: OpenVINO cannot load it: .*Sagmoid") as caught:
        Detector.load(path, backend="openvino")
    assert "\n" not in str(caught.value)


def test_it_computes_in_float32_for_the_latency_of_one_call(toys, tmp_path):
    """By default it takes bfloat16 where the CPU has it, and boxes move by 1.5 px."""
    backend = load(toys.canvas_model(tmp_path / "toy.onnx"), threads=1)
    compiled = backend._request.get_compiled_model()
    found = [compiled.get_property(name) for name in ("INFERENCE_NUM_THREADS", "NUM_STREAMS", "ENABLE_CPU_PINNING")]
    assert found == [1, 1, False]
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == openvino.Type.f32
    assert compiled.get_property("PERFORMANCE_HINT") == "LATENCY"


def test_calls_of_several_threads_do_not_share_memory(toys, tmp_path, white_frame):
    canvases = [np.full((1, toys.SIZE, toys.SIZE, 3), value, np.uint8) for value in (0, 51, 255)] * 20
    backend = load(toys.canvas_model(tmp_path / "toy.onnx"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(backend.run, canvases))
    expected = [0.9 * canvas.flat[0] / 255 for canvas in canvases]
    np.testing.assert_allclose([raw.array[0, 0, 4] for raw in found], expected, atol=1e-6)
    backend.close()
    backend.close()
    with pytest.raises(UsageError, match="closed"):
        backend.run(canvases[0])


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"device": "cuda"}, UsageError, "device is cuda, openvino runs it on the CPU"),
        ({"as_written": True}, UsageError, "openvino has integer kernels only"),
        (
            {"backend": "tensorrt"},
            UsageError,
            r"a file for onnx, backend is tensorrt. It reads \.engine, \.plan, \.trt",
        ),
        ({"backend": "openvno"}, UsageError, "backend is 'openvno', expected auto, onnx, openvino, tensorrt"),
    ],
)
def test_what_it_cannot_do_is_refused(toys, tmp_path, options, error, reason):
    with pytest.raises(error, match=reason):
        Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), **{"backend": "openvino", **options})


def quantised(toys, path: Path, kind: type) -> Path:
    """A pair of QuantizeLinear and DequantizeLinear, whose zero point has this type, before a convolution."""
    zero = kind(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "step", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "step", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "step", "signed"], ["weights"]),
        helper.make_node("Conv", ["x", "weights"], ["out"]),
    ]
    constants = {
        "step": np.float32(0.1), "zero": np.array(zero), "signed": np.int8(0), "w": np.ones((8, 3, 1, 1), np.int8)
    }  # fmt: skip
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 8, 8, 8])
    constants = {name: np.asarray(value) for name, value in constants.items()}
    return toys.save(path, nodes, [images], [out], constants, {METADATA_KEY: toys.card().to_json()})


def test_signed_activations_are_refused_because_it_computes_them_wrongly(toys, tmp_path):
    load(quantised(toys, tmp_path / "unsigned.onnx", np.uint8)).close()
    with pytest.raises(InputError, match="its activations are signed integers") as caught:
        load(quantised(toys, tmp_path / "signed.onnx", np.int8))
    assert "--backend onnx" in caught.value.hint


@pytest.fixture
def bundle(toys, tmp_path) -> Path:
    """Two files, the second of them for OpenVINO."""
    files = [toys.canvas_model(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    listed = tuple(map(artifact, files, ("onnx", "openvino")))
    toys.card(artifacts=listed).save(tmp_path / "model.json")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "file", "library"),
    [
        ({}, "a.onnx", "CPUExecutionProvider"),
        ({"backend": "openvino"}, "b.onnx", "OpenVINO on the CPU"),
        ({"variant": "b"}, "b.onnx", "OpenVINO on the CPU"),
        ({"variant": "b", "backend": "onnx"}, "b.onnx", "CPUExecutionProvider"),
        ({"variant": "a", "backend": "openvino"}, "a.onnx", "OpenVINO on the CPU"),
    ],
)
def test_of_a_bundle_a_named_backend_takes_its_own_file_first(bundle, options, file, library):
    with Detector.load(bundle, device="cpu", **options) as detector:
        assert (detector.artifact.file, detector.providers[0]) == (file, library)


def test_without_openvino_its_files_are_skipped_with_the_command_that_installs_it(toys, bundle, no_openvino):
    card = toys.card()
    listed = replace(card, artifacts=tuple(map(artifact, (bundle / "b.onnx", bundle / "a.onnx"), ("openvino", "onnx"))))
    listed.save(bundle / "model.json")
    with Detector.load(bundle) as detector:
        assert detector.artifact.file == "a.onnx"
        ((file, reason),) = detector.skipped
    assert (file, reason) == ("b.onnx", "openvino is not installed. pip install 'edgestill[openvino]', or openvino")
    with pytest.raises(UnavailableError, match="openvino is not installed"):
        Detector.load(bundle / "b.onnx", backend="openvino")
