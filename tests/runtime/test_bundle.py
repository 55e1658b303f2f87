from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace

import pytest

from runtime.backends import BACKENDS
from runtime.backends import tensorrt as tensorrt_backend
from runtime.bundle import card_with, folder_card, model_files, problems, read_checked
from runtime.card import Artifact, FileDigest, ModelCard
from runtime.detector import Detector
from runtime.errors import EngineError, InputError, UnavailableError, UsageError
from runtime.files import sha256
from runtime.identity import OccupiedError


def artifact(path, precision="fp32", backend="onnx", **more):
    return Artifact(path.name, sha256(path), path.stat().st_size, precision, backend, **more)


@pytest.fixture
def folder(toys, tmp_path):
    """A bundle: a plan first, then two ONNX files."""
    plan = tmp_path / "toy.fp16.plan"
    plan.write_bytes(b"vtrt" + bytes(range(256)) * 40)
    fp32, int8 = toys.canvas_model(tmp_path / "toy.onnx"), toys.canvas_model(tmp_path / "toy.int8.onnx")
    artifacts = (
        artifact(plan, "fp16", "tensorrt_rtx", targets=("sm86",), versions={"tensorrt_rtx": "1.7.1.116"}),
        artifact(fp32),
        artifact(int8, "int8-ort"),
    )
    toys.card(artifacts=artifacts).save(tmp_path / "model.json")
    return tmp_path


@pytest.fixture
def deserialised(monkeypatch):
    """Every call that would load native code, which no test here may cause."""
    calls = []
    monkeypatch.setattr(tensorrt_backend, "deserialize", lambda *arguments: calls.append(arguments))
    return calls


def test_a_bundle_offers_its_files_in_order_of_preference(folder):
    offered = model_files(folder)
    assert [item.path.name for item in offered] == ["toy.fp16.plan", "toy.onnx", "toy.int8.onnx"]
    assert [item.card.precision for item in offered] == ["fp16", "fp32", "int8-ort"]


@pytest.mark.parametrize("variant", ["int8-ort", "toy.int8.onnx", "toy.int8"])
def test_a_variant_is_picked_by_precision_or_file(folder, variant):
    assert [item.path.name for item in model_files(folder, variant)] == ["toy.int8.onnx"]


def test_an_unknown_variant_names_the_known(folder):
    with pytest.raises(UsageError, match="fp16, fp32, int8-ort"):
        model_files(folder, "int4")
    with pytest.raises(UsageError, match="bundle"):
        model_files(folder / "toy.onnx", "fp32")


def test_the_first_file_that_works_here_is_loaded_and_the_others_explained(folder, deserialised, white_frame):
    with Detector.load(folder) as detector:
        assert detector.artifact.file == "toy.onnx"
        ((file, reason),) = detector.skipped
        assert file == "toy.fp16.plan"
        assert "GPU" in reason or "tensorrt_rtx" in reason
        assert len(detector(white_frame)) == 2
    assert deserialised == []


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_reason_that_several_files_have_is_told_once(folder, device):
    with pytest.raises(UnavailableError, match="none of its 3 files runs here") as caught:
        Detector.load(folder, device=device)
    text = str(caught.value)
    assert text.count("CUDAExecutionProvider") + text.count("TensorrtExecutionProvider") == 1
    assert "toy.onnx and 1 more: device" in text
    assert text.count("toy.fp16.plan") == 1
    assert text.endswith("or use --device cpu")
    assert len(text.removeprefix(str(folder))) < 400


def test_a_bundle_survives_files_left_at_home(folder):
    (folder / "toy.fp16.plan").unlink()
    (folder / "toy.onnx").unlink()
    detector = Detector.load(folder)
    assert detector.artifact.file == "toy.int8.onnx"
    assert [reason for _, reason in detector.skipped] == ["not in the folder"] * 2


def test_a_changed_onnx_file_of_a_bundle_is_not_passed_over(folder):
    data = bytearray((folder / "toy.onnx").read_bytes())
    data[-1] ^= 1
    (folder / "toy.onnx").write_bytes(data)
    with pytest.raises(EngineError, match="sha256"):
        Detector.load(folder)


@pytest.mark.parametrize("place", [0, 5, 1000, -1])
def test_a_flipped_byte_is_refused_before_anything_is_loaded(folder, deserialised, place):
    path = folder / "toy.fp16.plan"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)
    with pytest.raises(EngineError, match="sha256"):
        Detector.load(path)
    assert deserialised == []


@pytest.mark.parametrize("length", [0, 3, 100, 10_243])
def test_a_cut_engine_is_refused_before_anything_is_loaded(folder, deserialised, length):
    path = folder / "toy.fp16.plan"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(EngineError, match="cut short"):
        Detector.load(path)
    assert deserialised == []


def test_an_engine_without_a_card_is_refused(folder, deserialised):
    (folder / "model.json").unlink()
    with pytest.raises(EngineError, match=r"no model\.json"):
        Detector.load(folder / "toy.fp16.plan")
    assert deserialised == []


def test_a_card_that_lists_other_files_is_no_card_of_the_engine(folder, toys, deserialised):
    toys.card(artifacts=(artifact(folder / "toy.onnx"),)).save(folder / "model.json")
    with pytest.raises(EngineError, match="does not list it"):
        Detector.load(folder / "toy.fp16.plan")
    shutil.copy(folder / "toy.onnx", folder / "toy.fp16.plan")
    assert deserialised == []


def test_the_bytes_that_were_hashed_are_the_bytes_that_get_loaded(folder):
    file = model_files(folder / "toy.fp16.plan")[0]
    data = read_checked(file)["toy.fp16.plan"]
    (folder / "toy.fp16.plan").write_bytes(b"swapped")
    assert data.startswith(b"vtrt")


def test_ultralytics_prefix_is_recognised_and_explained(folder):
    path = folder / "yolo.engine"
    text = json.dumps({"description": "YOLO", "stride": 32}).encode()
    path.write_bytes(struct.pack("<I", len(text)) + text + b"ptrt")
    with pytest.raises(EngineError, match=f"{len(text)} bytes of Ultralytics metadata"):
        model_files(path)


def test_paths_that_are_nothing_are_one_line(tmp_path):
    (tmp_path / "model.txt").write_text("x")
    for path in (tmp_path / "none.onnx", tmp_path / "model.txt", tmp_path):
        with pytest.raises(InputError) as caught:
            model_files(path)
        assert "\n" not in str(caught.value)


def test_every_part_of_a_file_is_checked_and_given_to_the_backend(folder, toys):
    """OpenVINO, for example, keeps a network's weights in a second file."""
    weights = folder / "toy.bin"
    weights.write_bytes(b"weights")
    parts = (FileDigest("toy.bin", sha256(weights), 7),)
    toys.card(artifacts=(replace(artifact(folder / "toy.onnx"), parts=parts),)).save(folder / "model.json")
    (file,) = model_files(folder)
    assert read_checked(file) == {"toy.onnx": file.path.read_bytes(), "toy.bin": b"weights"}
    weights.write_bytes(b"another")
    with pytest.raises(EngineError, match=r"toy\.bin: sha256"):
        Detector.load(folder)
    weights.unlink()
    with pytest.raises(InputError, match=r"toy\.bin: cannot be read"):
        Detector.load(folder)


def test_a_bundle_without_files_is_refused(folder):
    replace(model_files(folder)[0].card, artifacts=()).save(folder / "model.json")
    with pytest.raises(InputError, match="no artifacts"):
        model_files(folder)


def test_a_plan_may_not_lie_outside_its_bundle(folder):
    data = json.loads((folder / "model.json").read_text())
    data["artifacts"][1]["file"] = "../toy.onnx"
    (folder / "model.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="no folder"):
        model_files(folder)


def test_the_remedy_fits_the_kind_of_file():
    assert "python -m runtime build" in BACKENDS["tensorrt"].remedy
    assert "python -m runtime build" not in BACKENDS["onnx"].remedy


def test_a_wrong_threshold_is_wrong_usage_and_no_reason_to_skip_a_file(folder):
    with pytest.raises(UsageError, match="conf is 7"):
        Detector.load(folder, conf=7)


OTHER_MODELS = [{"weights": "6" * 64}, {"iou": 0.45}, {"max_det": 100}, {"candidates": 500}, {"names": ("bolt", "cat")}]


@pytest.mark.parametrize("changes", OTHER_MODELS)
def test_an_onnx_file_of_another_model_is_refused_where_a_bundle_lists_it(folder, toys, changes):
    stranger = toys.canvas_model(folder / "toy.int8.onnx", toys.card(**changes))
    toys.card(artifacts=(artifact(folder / "toy.onnx"), artifact(stranger, "int8-ort"))).save(folder / "model.json")
    with pytest.raises(EngineError, match="another model than its card says") as caught:
        Detector.load(folder, variant="int8-ort")
    assert "\n" not in str(caught.value)
    assert [len(problems(file)) for file in model_files(folder)] == [0, 1]


def test_a_plan_of_another_model_is_refused_before_anything_is_loaded(folder, toys, deserialised):
    plan = artifact(folder / "toy.fp16.plan", "fp16", "tensorrt_rtx", identity=toys.card(iou=0.45).identity)
    toys.card(artifacts=(plan,)).save(folder / "model.json")
    with pytest.raises(EngineError, match="was made of model"):
        Detector.load(folder)
    assert deserialised == []


def test_a_bundle_from_before_models_had_an_identity_still_loads(toys, tmp_path):
    before = toys.card(weights="")
    file = toys.canvas_model(tmp_path / "toy.onnx", before)
    replace(before, artifacts=(artifact(file),)).save(tmp_path / "model.json")
    Detector.load(tmp_path).close()


@pytest.mark.parametrize("changes", [*OTHER_MODELS, {"weights": ""}])
def test_a_folder_of_another_model_is_not_taken(folder, toys, changes):
    before = (folder / "model.json").read_bytes()
    other = toys.canvas_model(folder / "other.onnx", toys.card(**changes))
    made = artifact(folder / "toy.fp16.plan", "fp16", "tensorrt_rtx")
    with pytest.raises(OccupiedError):
        folder_card(folder, other)
    with pytest.raises(OccupiedError):
        card_with(folder, other, [made])
    assert (folder / "model.json").read_bytes() == before


def test_a_new_file_stands_before_those_that_the_card_lists_already(folder, toys):
    card = replace(ModelCard.load(folder), conf=0.5)  # chosen by the user
    card.save(folder / "model.json")
    model = toys.canvas_model(folder / "toy.fp16.onnx", toys.card(precision="fp16"))
    for _ in range(2):
        found = card_with(folder, model, [artifact(model, "fp16")])
        found.save(folder / "model.json")
    assert [item.file for item in found.artifacts] == ["toy.fp16.onnx", "toy.fp16.plan", "toy.onnx", "toy.int8.onnx"]
    assert replace(found, artifacts=()) == replace(card, artifacts=())


def test_the_first_file_in_a_folder_takes_the_card_of_its_model(toys, tmp_path):
    model = toys.canvas_model(tmp_path / "toy.onnx", toys.card(artifacts=(Artifact("x", "0" * 64, 1, "fp32", "onnx"),)))
    assert card_with(tmp_path / "new", model, []) == toys.card()
