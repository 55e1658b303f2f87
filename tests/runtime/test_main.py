from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import runtime
from runtime import engine, machine
from runtime.__main__ import main
from runtime.card import Artifact, Batches, ModelCard
from runtime.files import sha256
from runtime.layers import EngineLayer, TensorType, save_layers

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def model(toys, tmp_path):
    return str(toys.canvas_model(tmp_path / "toy.onnx"))


@pytest.fixture
def images(tmp_path, white_frame):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("b.jpg", "a.png"):
        cv2.imwrite(str(folder / name), white_frame)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_detect_prints_a_line_an_image_in_order(model, images, capsys):
    assert main(["detect", str(images), "--model", model]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split(" ")[0]).name for line in lines] == ["a.png", "b.jpg"]
    assert all("1 bolt, 1 nut" in line for line in lines)


def test_detect_fills_the_batch_of_a_file_and_reports_images_of_another_size(toys, images, tmp_path, capsys):
    for name, height in (("c.png", 240), ("d.png", 480), ("e.png", 480)):
        cv2.imwrite(str(images / name), np.full((height, 640, 3), 255, np.uint8))
    card = toys.card(batches=Batches(2, 2), input="frame", frame_hw=(480, 640))
    model = str(toys.canvas_model(tmp_path / "toy.onnx", card))
    assert main(["detect", str(images), "--model", model]) == 1
    told = capsys.readouterr()
    assert [Path(line.split(" ")[0]).name for line in told.out.splitlines()] == ["a.png", "b.jpg", "d.png", "e.png"]
    assert all("1 bolt, 1 nut" in line for line in told.out.splitlines())
    assert "c.png: frame has (height, width) (240, 640)" in told.err


def test_detect_says_where_boxes_may_be_missing(toys, images, tmp_path, capsys):
    model = str(toys.canvas_model(tmp_path / "toy.onnx", cutoff=0.5))
    assert main(["detect", str(images / "*.png"), "--model", model]) == 0
    assert "(more than fit: boxes up to 0.50 may be missing)" in capsys.readouterr().out
    for conf, told in (("0.25", {"cutoff": 0.5}), ("0.6", {})):
        assert main(["detect", str(images / "*.png"), "--model", model, "--json", "--conf", conf]) == 0
        line = json.loads(capsys.readouterr().out)
        assert {key: value for key, value in line.items() if key == "cutoff"} == told


def test_detect_prints_json_and_saves_images(model, images, tmp_path, capsys):
    out = tmp_path / "drawn"
    assert main(["detect", str(images / "*.png"), "--model", model, "--json", "--save", str(out), "--conf", "0.6"]) == 0
    captured = capsys.readouterr()
    (line,) = map(json.loads, captured.out.splitlines())
    assert [found["name"] for found in line["detections"]] == ["nut"]
    assert "CPUExecutionProvider" in captured.err
    drawn = cv2.imread(str(out / "a.png"))
    assert drawn.shape == (480, 640, 3)
    assert (drawn != 255).any()


def test_an_image_of_a_name_that_cannot_be_written_is_saved_as_jpeg(model, images, tmp_path):
    for name in ("plain", "photo.jfif"):
        (tmp_path / name).write_bytes((images / "b.jpg").read_bytes())
        assert main(["detect", str(tmp_path / name), "--model", model, "--save", str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["photo.jpg", "plain.jpg"]


def test_detect_reads_every_frame_of_a_video(model, tmp_path, capsys):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (64, 64))
    for value in (255, 0, 255):
        writer.write(np.full((64, 64, 3), value, np.uint8))
    writer.release()
    assert main(["detect", str(path), "--model", model, "--json", "--save", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["frame"], len(line["detections"])) for line in lines] == [(0, 2), (1, 0), (2, 2)]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["film.mp4"]


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["detect", "none.jpg", "--model", "{model}"], 1, "none.jpg"),
        (["detect", "{folder}", "--model", "none.onnx"], 1, "none.onnx"),
        (["detect", "{folder}", "--model", "{model}", "--device", "tpu"], 2, "tpu"),
        (["detect", "{folder}", "--model", "{model}", "--conf", "7"], 2, "conf"),
        (["detect", "{folder}", "--model", "{model}", "--device", "cuda"], 1, "CUDAExecutionProvider"),
        (["build", "none.onnx"], 1, "none.onnx"),
        (["build", "{model}", "--backend", "tvm"], 2, "tvm"),
        (["info", "none"], 1, "none"),
        (["info", "x" * 5000], 1, "too long"),
    ],
)
def test_every_failure_is_one_line_and_its_exit_code(model, tmp_path, capsys, arguments, code, word):
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((9, 9, 3), np.uint8))
    filled = [argument.format(model=model, folder=tmp_path) for argument in arguments]
    assert main(filled) == code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("running")]
    assert len(error) == 1
    assert error[0].startswith("error: ")
    assert word in error[0]


def test_an_unreadable_image_does_not_end_the_run_and_is_told_by_the_exit_code(model, images, capsys):
    (images / "a.png").write_bytes(b"damaged")
    assert main(["detect", str(images), "--model", model]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "a.png" in captured.err.splitlines()[-1]


def test_a_file_name_that_is_not_utf8_is_printed_and_read_back_from_json(model, images, tmp_path):
    name = os.fsencode(images) + b"/gr\xfcn.png"
    (images / "a.png").rename(os.fsdecode(name))
    for options in ([], ["--json"]):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "runtime",
                "detect",
                name,
                "--model",
                model,
                "--save",
                str(tmp_path / "o"),
                *options,
            ],
            cwd=REPOSITORY,
            capture_output=True,
            env=os.environ | {"PYTHONIOENCODING": "utf-8"},
        )
        assert done.returncode == 0, done.stderr
    assert os.fsencode(json.loads(done.stdout)["source"]) == name


def test_a_reader_that_goes_away_ends_the_run_quietly(model, images):
    command = (
        f"{sys.executable} -m runtime detect {images}/* {images}/* --model {model} | head -1; exit ${{PIPESTATUS[0]}}"
    )
    for run in range(40):
        cv2.imwrite(str(images / f"{run}.png"), np.zeros((9, 9, 3), np.uint8))
    (images / "notes.txt").unlink()
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, len(done.stdout.splitlines())) == (0, 1)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


def test_credentials_are_not_printed_where_the_usage_is_wrong(capsys):
    assert main(["detect", "a.jpg", "--model", "m.onnx", "--fly", "rtsp://admin:secret@host/x"]) == 2
    assert "secret" not in capsys.readouterr().err
    assert main(["detect", "0", "--model", "rtsp://admin:secret@host/m.onnx"]) == 1
    assert "secret" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("harm", "word"), [(lambda path: path.unlink(), "cannot be read"), (lambda path: path.write_bytes(b"x"), "1 bytes")]
)
def test_info_and_verify_find_a_file_that_is_not_the_one_that_was_built(toys, tmp_path, capsys, harm, word):
    files = [toys.canvas_model(tmp_path / name) for name in ("a.onnx", "b.onnx")]
    artifacts = tuple(Artifact(path.name, sha256(path), path.stat().st_size, "fp32", "onnx") for path in files)
    toys.card(artifacts=artifacts).save(tmp_path / "model.json")
    assert main(["verify", str(tmp_path)]) == 0
    harm(files[1])
    capsys.readouterr()
    assert main(["verify", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "b.onnx" in line
    assert word in line
    assert "from its ONNX file" not in line
    assert main(["info", str(tmp_path)]) == 0
    runs = json.loads(capsys.readouterr().out)["runs_here"]
    assert runs == {"a.onnx": "yes", "b.onnx": [line]}


def test_info_tells_what_a_file_needs_that_is_not_here(toys, tmp_path, capsys, monkeypatch):
    facts = {**machine.facts(), "gpus": [], "packages": {"onnxruntime": "1.20.0"}}
    monkeypatch.setattr(machine, "facts", lambda: facts)
    made = {"a.onnx": ("onnx", ()), "b.onnx": ("onnx", ("cuda", "tensorrt")), "c.onnx": ("openvino", ("cpu",))}
    for name in made:
        toys.canvas_model(tmp_path / name)
    files = {name: tmp_path / name for name in made}
    artifacts = tuple(
        Artifact(name, sha256(files[name]), files[name].stat().st_size, "fp32", backend, devices=devices)
        for name, (backend, devices) in made.items()
    )
    toys.card(artifacts=artifacts).save(tmp_path / "model.json")
    assert main(["info", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["runs_here"] == {
        "a.onnx": "yes",
        "b.onnx": ["it is made for cuda or tensorrt on an NVIDIA GPU, and nvidia-smi shows none"],
        "c.onnx": ["it needs openvino, which is not installed"],
    }


def test_verify_wants_a_card_with_hashes(model, capsys):
    assert main(["verify", model]) == 1
    assert "Give a bundle folder" in capsys.readouterr().err


def test_verify_finds_a_file_of_another_model(toys, tmp_path, capsys):
    files = [toys.canvas_model(tmp_path / f"{iou}.onnx", toys.card(iou=iou)) for iou in (0.6, 0.45)]
    artifacts = tuple(Artifact(path.name, sha256(path), path.stat().st_size, "fp32", "onnx") for path in files)
    toys.card(artifacts=artifacts[:1]).save(tmp_path / "model.json")
    assert main(["verify", str(tmp_path)]) == 0
    assert f"of model {toys.card().identity[:12]}" in capsys.readouterr().out
    toys.card(artifacts=artifacts).save(tmp_path / "model.json")
    assert main(["verify", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert "0.45.onnx: is another model than its card says: iou 0.45 instead of 0.6" in line


def test_verify_says_where_a_card_has_no_identity(toys, tmp_path, capsys):
    path = toys.canvas_model(tmp_path / "a.onnx", toys.card(weights=""))
    artifacts = (Artifact(path.name, sha256(path), path.stat().st_size, "fp32", "onnx"),)
    toys.card(weights="", artifacts=artifacts).save(tmp_path / "model.json")
    assert main(["verify", str(tmp_path)]) == 0
    assert "the card has no identity" in capsys.readouterr().out


def test_build_refuses_the_folder_of_another_model_before_it_builds(toys, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("runtime.engine.build_engine", lambda *_, **__: pytest.fail("built"))
    toys.card(artifacts=()).save(tmp_path / "model.json")
    other = toys.canvas_model(tmp_path / "other.onnx", toys.card(max_det=100))
    assert main(["build", str(other), "--out", str(tmp_path / "other.plan")]) == 1
    assert "max_det 100 instead of 300" in capsys.readouterr().err
    assert not (tmp_path / "other.plan").exists()


def test_build_writes_plan_and_card_and_info_explains_them(model, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    assert main(["build", model, "--backend", "tensorrt_rtx", "--targets", "sm86,sm89"]) == 0
    assert "sm86, sm89" in capsys.readouterr().out
    assert main(["info", str(tmp_path / "toy.plan")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["card"]["artifacts"][0]["file"] == "toy.plan"
    assert "toy.plan" in told["runs_here"]


@pytest.mark.parametrize("first", ["fp16", "int8-trt"])
def test_build_keeps_no_int8_plan_that_moves_more_than_fp16_in_either_order(toys, tmp_path, monkeypatch, capsys, first):
    types = {"fp16": ("Half", "Half"), "int8-trt": ("Int8", "Float")}

    def build(onnx, out, **_):
        out.write_bytes(b"vtrt")
        kind, made = (TensorType(name, (1, 8)) for name in types[out.name.split(".")[1]])
        layers = (EngineLayer("c", "CaskConvolution", (), (kind,), (made,)),)
        save_layers(out, sha256(out), layers)
        return engine.BuildReport("tensorrt", {}, 1.0, 4, sha256(out), ("sm86",), (), layers=layers)

    monkeypatch.setattr(engine, "build_engine", build)
    codes = {}
    for precision in (first, *(types.keys() - {first})):
        model = toys.canvas_model(tmp_path / f"toy.{precision}.onnx", toys.card(precision=precision))
        codes[precision] = main(["build", str(model), "--backend", "tensorrt"])
    assert [artifact.precision for artifact in ModelCard.load(tmp_path).artifacts] == ["fp16"]
    assert not list(tmp_path.glob("toy.int8-trt.plan*"))
    reason = "its INT8 moves 0.0 MB a call, FP16 moves 0.0"
    told = capsys.readouterr().err
    assert codes == {"fp16": 0, "int8-trt": int(first == "fp16")}
    assert f"toy.int8-trt.{f'onnx: {reason}. Use' if first == 'fp16' else f'plan is removed: {reason}'}" in told


def test_build_gives_a_plan_of_an_open_batch_its_profile(toys, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    model = toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=Batches(1, None)))
    assert main(["build", str(model), "--targets", "sm86", "--batches", "2,2,4"]) == 0
    capsys.readouterr()
    assert main(["info", str(tmp_path / "toy.plan")]) == 0
    assert json.loads(capsys.readouterr().out)["card"]["artifacts"][0]["batches"] == [2, 4]
    assert main(["build", str(model), "--batches", "4,2,1"]) == 2
    assert "such as 1,4,8" in capsys.readouterr().err


def test_a_profile_given_for_a_file_of_fixed_batch_is_refused_before_it_is_built(toys, tmp_path, capsys):
    model = toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=Batches(1, 1)))
    assert main(["build", str(model), "--targets", "sm86", "--batches", "1,4,8"]) == 2
    assert f"--batches: {model} takes 1 in one call, always" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["toy.onnx"]


def test_info_tells_of_the_machine_and_of_foreign_models(toys, tmp_path, capsys):
    assert main(["info"]) == 0
    assert json.loads(capsys.readouterr().out)["packages"]["numpy"] == np.__version__
    assert main(["info", str(toys.rows_model(tmp_path / "a.onnx", np.zeros((9, 7), np.float32)))]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["names"] == "{0: 'bolt', 1: 'nut'}"


def test_the_version_is_told(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"edgestill {runtime.__version__}\n"


def test_wrong_usage_exits_with_two():
    done = subprocess.run([sys.executable, "-m", "runtime", "fly"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["build", ""], ["info", ""], ["verify", ""], ["detect", "a.jpg", "--model", ""], ["build", "m.onnx", "--out", ""]],
)
def test_an_empty_path_is_wrong_usage(arguments, capsys):
    assert main(arguments) == 2
    assert "a path is empty" in capsys.readouterr().err


def test_a_source_without_a_name_is_no_folder(model, images, monkeypatch, capsys):
    monkeypatch.chdir(images)
    assert main(["detect", "", "--model", model]) == 1
    assert "the name of a source is empty" in capsys.readouterr().err


def test_a_number_that_no_camera_has_is_one_line(model, capsys):
    assert main(["detect", "99999999999999999999", "--model", model]) == 1
    assert "no such file" in capsys.readouterr().err


def test_a_folder_is_nothing_to_build(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["build", "."]) == 1
    assert "no backend runs a file without suffix" in capsys.readouterr().err


def test_a_closed_standard_output_is_no_error():
    command = f"{sys.executable} -m runtime info >&-"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
