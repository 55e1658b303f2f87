from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from onnx import TensorProto

from runtime import Detector, machine
from runtime.backends import RawOutput
from runtime.backends import onnx as onnx_backend
from runtime.card import Artifact, Batches
from runtime.errors import EngineError, InputError, UnavailableError, UsageError
from runtime.files import sha256
from runtime.machine import compute_threads

ROWS = np.array(
    [[32, 32, 10, 10, 0.9, 0.1, 0.8], [33, 32, 10, 10, 0.8, 0.1, 0.8], [10, 40, 8, 8, 0.5, 0.9, 0.1]] + 9 * [7 * [0]],
    np.float32,
)
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def detector(toys, tmp_path):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx")) as loaded:
        yield loaded


def test_boxes_come_back_in_frame_pixels(detector, white_frame):
    found = detector(white_frame)  # 640x480 on a 64x64 canvas: gain 0.1, 8 rows of border above
    assert found.xyxy.tolist() == [[80, 80, 240, 240], [300, 120, 500, 320]]
    assert found.score.tolist() == pytest.approx([0.9, 0.5])
    assert found.class_id.tolist() == [1, 0]
    assert detector.card.names == ("bolt", "nut")
    assert detector.providers[0] == "CPUExecutionProvider"


def test_a_call_is_its_three_steps(detector, white_frame):
    prepared = detector.preprocess([white_frame])
    raw = detector.infer(prepared)
    assert (prepared.array.shape, prepared.array.dtype, raw.array.shape) == ((1, 64, 64, 3), np.uint8, (1, 4, 6))
    (found,) = detector.postprocess(raw, prepared)
    assert found.to_list() == detector(white_frame).to_list()


@pytest.mark.parametrize(
    ("cutoff", "conf", "told"), [(None, 0.25, 0), (0.2, 0.25, 0), (0.25, 0.25, 0), (0.5, 0.25, 0.5)]
)
def test_detections_tell_the_cutoff_where_boxes_over_conf_may_be_missing(
    toys, tmp_path, white_frame, cutoff, conf, told
):
    detector = Detector.load(toys.canvas_model(tmp_path / "toy.onnx", cutoff=cutoff), conf=conf)
    found = detector(white_frame)
    assert len(found) == 2
    assert found.cutoff == found[:1].cutoff == told


@pytest.mark.parametrize(("max_det", "found", "cutoff"), [(1, 1, 0.45), (2, 2, 0)])
def test_more_boxes_than_max_det_are_told_where_the_host_does_the_nms(
    toys, tmp_path, white_frame, max_det, found, cutoff
):
    detector = Detector.load(toys.rows_model(tmp_path / "rows.onnx", ROWS))
    detector.card = replace(detector.card, max_det=max_det)
    detections = detector(white_frame)
    assert len(detections) == found
    assert detections.cutoff == pytest.approx(cutoff)


def test_conf_is_strict_and_may_be_set_for_one_call(toys, tmp_path, white_frame):
    path = toys.canvas_model(tmp_path / "toy.onnx")
    assert len(Detector.load(path, conf=0.5)(white_frame)) == 1
    detector = Detector.load(path, conf=0.05)
    assert len(detector(white_frame)) == 3
    prepared = detector.preprocess([white_frame])
    assert len(detector.postprocess(detector.infer(prepared), prepared, conf=0.8)[0]) == 1
    assert len(detector.postprocess(detector.infer(prepared), prepared, conf=0.0)[0]) == 3  # empty rows stay out
    for conf in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="conf"):
            Detector.load(path, conf=conf)


FRAMES = [np.full((60 + 20 * index, 100, 3), (255, 128, 0)[index % 3], np.uint8) for index in range(5)]
"""Frames of five sizes: white, grey, black, white, grey."""


def shapes_of_calls(detector, monkeypatch):
    shapes, run = [], detector._backend.run
    monkeypatch.setattr(detector._backend, "run", lambda array: shapes.append(array.shape[0]) or run(array))
    return shapes


@pytest.mark.parametrize(
    ("batches", "count", "calls"),
    [
        ((1, 1), 3, [1, 1, 1]),
        ((3, 3), 5, [3, 3]),
        ((3, 3), 1, [3]),
        ((1, None), 5, [5]),
        ((1, None), 0, []),
        ((1, 2), 5, [2, 2, 1]),
        ((2, 4), 5, [4, 2]),
    ],
)
@pytest.mark.parametrize("kind", ["canvas", "frame"])
def test_a_list_of_frames_gives_what_each_gives_alone(toys, tmp_path, monkeypatch, batches, count, calls, kind):
    """In as few calls as the file takes, which grey images fill where it takes more than there are."""
    batches, frames = Batches(*batches), FRAMES[:count]
    if kind == "frame":
        frames = [cv2.resize(frame, (100, 50)) for frame in frames]
    card = toys.card(batches=batches, input=kind, frame_hw=(50, 100))
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx", card, cutoff=0.9), conf=0.3) as detector:
        ran = shapes_of_calls(detector, monkeypatch)
        found = detector(frames)
        assert ran == calls
        assert [(one.to_list(), one.cutoff) for one in found] == [
            (alone.to_list(), alone.cutoff) for alone in map(detector, frames)
        ]
        assert [len(one) for one in found] == [2, 1, 0, 2, 1][:count]
        assert len({one.cutoff for one in found}) == min(count, 3)
        assert [one.to_list() for one in detector(tuple(frames))] == [one.to_list() for one in found]


@pytest.mark.parametrize("batch", [4, "batch"])
def test_a_conventional_export_takes_lists_too(toys, tmp_path, monkeypatch, batch):
    path = toys.rows_model(tmp_path / "rows.onnx", ROWS, input_shape=[batch, 3, 32, 64])
    with Detector.load(path) as detector:
        calls = shapes_of_calls(detector, monkeypatch)
        assert detector.card.size_hw == (32, 64)
        assert [len(found) for found in detector(FRAMES)] == [2] * 5
        assert calls == ([4, 4] if batch == 4 else [5])


def test_a_file_of_any_number_of_images_takes_a_long_list_in_calls_of_sixteen(toys, tmp_path, monkeypatch):
    card = toys.card(batches=Batches(1, None))
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx", card)) as detector:
        calls = shapes_of_calls(detector, monkeypatch)
        assert len(detector(FRAMES * 7)) == 35
        assert calls == [16, 16, 3]


def test_a_plans_own_batches_go_before_those_of_its_card(toys, tmp_path, monkeypatch):
    path = toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=Batches(1, None)))
    artifact = Artifact(path.name, sha256(path), path.stat().st_size, "fp32", "onnx", batches=Batches(1, 2))
    toys.card(batches=Batches(1, None), artifacts=(artifact,)).save(tmp_path / "model.json")
    with Detector.load(tmp_path) as detector:
        calls = shapes_of_calls(detector, monkeypatch)
        assert len(detector(FRAMES)) == 5
    assert calls == [2, 2, 1]


def test_a_list_with_something_else_in_it_is_one_line(detector, white_frame):
    for odd in ([white_frame, None], [white_frame, [white_frame]], [white_frame, white_frame.astype(float)]):
        with pytest.raises(InputError, match="frame is") as caught:
            detector(odd)
        assert "\n" not in str(caught.value)


def test_one_call_takes_no_more_frames_than_its_file(detector, white_frame):
    for frames in ([], [white_frame] * 2):
        with pytest.raises(UsageError, match=f"{len(frames)} frames, toy takes 1 in one call"):
            detector.preprocess(frames)


def test_an_output_for_too_few_images_is_an_error(toys, tmp_path, monkeypatch):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=Batches(2, 2)))) as detector:
        run = detector._backend.run
        monkeypatch.setattr(detector._backend, "run", lambda array: RawOutput(run(array).array[:1]))
        with pytest.raises(EngineError, match="1 outputs for 2 frames"):
            detector(FRAMES[:2])


def test_a_file_of_another_batch_than_its_card_is_refused(toys, tmp_path):
    import onnx

    path = toys.canvas_model(tmp_path / "toy.onnx", toys.card(batches=Batches(4, 4)))
    for batches in (Batches(1, 1), Batches(1, None), Batches(2, 4)):
        model = onnx.load(path)
        onnx.helper.set_model_props(model, {"edgestill": toys.card(batches=batches).to_json()})
        onnx.save(model, path)
        with pytest.raises(InputError, match="card says canvas"):
            Detector.load(path)


def test_prepared_frames_stay_what_they_are(detector, white_frame):
    """A queue of prepared frames is common; a shared canvas would give every one the last frame's pixels."""
    first = detector.preprocess([white_frame])
    second = detector.preprocess([np.zeros((100, 30, 3), np.uint8)])
    assert len(detector.postprocess(detector.infer(first), first)[0]) == 2
    assert len(detector.postprocess(detector.infer(second), second)[0]) == 0


def test_a_model_with_the_letterbox_inside_takes_the_frame_as_it_is(toys, tmp_path, white_frame):
    card = toys.card(input="frame", frame_hw=(480, 640))
    detector = Detector.load(toys.canvas_model(tmp_path / "toy.onnx", card))
    prepared = detector.preprocess([white_frame])
    assert np.shares_memory(prepared.array, white_frame)
    assert detector(white_frame).xyxy[0].tolist() == [8, 16, 24, 32]
    with pytest.raises(InputError, match=r"\(240, 320\).*\(480, 640\)"):
        detector(white_frame[::2, ::2])


@pytest.mark.parametrize(
    "frame",
    [
        "a.jpg",
        None,
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
    ],
)
def test_anything_but_a_bgr_frame_is_refused_in_one_line(detector, frame):
    with pytest.raises(InputError, match="frame is") as caught:
        detector(frame)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 2000), (2000, 1), (63, 65), (64, 64), (37, 999)])
def test_every_frame_size_is_served(detector, size_hw):
    found = detector(np.full((*size_hw, 3), 255, np.uint8))
    assert len(found) > 0
    assert found.xyxy.min() >= 0
    assert (found.xyxy[:, 2] <= size_hw[1]).all()


def test_a_frame_that_is_a_view_works(detector, white_frame):
    white_frame[:100] = 7
    for view in (white_frame[::-1, ::2], white_frame[..., ::-1], np.asfortranarray(white_frame)):
        assert detector(view).to_list() == detector(view.copy(order="C")).to_list()


def test_scores_that_are_not_finite_are_an_error_not_silence(toys, tmp_path, white_frame):
    boxes = toys.BOXES.copy()
    boxes[0, 4] = np.nan
    detector = Detector.load(toys.canvas_model(tmp_path / "toy.onnx", boxes=boxes))
    with pytest.raises(EngineError, match="not finite"):
        detector(white_frame)


@pytest.mark.parametrize("value", [np.nan, 7.0])
def test_an_output_that_is_no_detectors_is_one_line(toys, tmp_path, white_frame, value):
    boxes = toys.BOXES.copy()
    boxes[0, 0 if np.isnan(value) else 4] = value
    detector = Detector.load(toys.canvas_model(tmp_path / "toy.onnx", boxes=boxes))
    with pytest.raises(EngineError, match="not a detector's"):
        detector(white_frame)


def test_a_card_that_does_not_fit_its_file_is_refused(toys, tmp_path):
    path = toys.canvas_model(tmp_path / "toy.onnx", toys.card(input="frame", frame_hw=(48, 64)))
    import onnx

    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"edgestill": toys.card().to_json()})
    onnx.save(model, path)
    with pytest.raises(InputError, match="card says canvas"):
        Detector.load(path)


def test_a_conventional_export_runs_with_suppression_on_the_host(toys, tmp_path, white_frame):
    detector = Detector.load(toys.rows_model(tmp_path / "yolov5n.onnx", ROWS))
    found = detector(white_frame)
    assert found.xyxy.tolist() == [[270, 190, 370, 290], [60, 280, 140, 360]]
    assert found.score.tolist() == pytest.approx([0.72, 0.45])
    assert (detector.card.names, detector.card.stride, detector.card.input) == (("bolt", "nut"), 32, "tensor")
    assert (detector.card.iou, detector.card.max_det) == (0.45, 1000)


def test_a_half_precision_export_gets_half_precision_input(toys, tmp_path, white_frame):
    detector = Detector.load(toys.rows_model(tmp_path / "h.onnx", ROWS, dtype=TensorProto.FLOAT16))
    assert detector.preprocess([white_frame]).array.dtype == np.float16
    assert detector.card.precision == "fp16"
    assert detector(white_frame).class_id.tolist() == [1, 0]


def test_open_dimensions_mean_one_image_of_640(toys, tmp_path, white_frame):
    path = toys.rows_model(tmp_path / "d.onnx", ROWS, input_shape=["batch", 3, "height", "width"])
    detector = Detector.load(path)
    assert detector.preprocess([white_frame]).array.shape == (1, 3, 640, 640)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("['bolt', 'nut']", ("bolt", "nut")),
        ("{1: 'nut', 0: 'bolt'}", ("bolt", "nut")),
        (None, ("class0", "class1")),
    ],
)
def test_names_are_read_in_every_spelling(toys, tmp_path, names, expected):
    assert Detector.load(toys.rows_model(tmp_path / "a.onnx", ROWS, names=names)).card.names == expected


@pytest.mark.parametrize(
    "names", ["__import__('os').system('x')", "{0: 'bolt'}", "{5: 'a', 6: 'b'}", "[1, 2]", "{", "(" * 5000]
)
def test_names_that_are_no_names_are_refused_and_never_run(toys, tmp_path, names):
    with pytest.raises(InputError, match="names"):
        Detector.load(toys.rows_model(tmp_path / "a.onnx", ROWS, names=names))


@pytest.mark.parametrize("stride", ["wide", "nan", "inf", "-32"])
def test_a_stride_that_is_no_size_is_refused(toys, tmp_path, stride):
    import onnx

    path = toys.rows_model(tmp_path / "a.onnx", ROWS)
    model = onnx.load(path)
    onnx.helper.set_model_props(model, {"stride": stride})
    onnx.save(model, path)
    with pytest.raises(InputError, match="stride"):
        Detector.load(path)


def test_later_yolos_are_refused_by_their_shapes(toys, tmp_path):
    with pytest.raises(InputError, match="YOLOv5"):
        Detector.load(toys.rows_model(tmp_path / "v8.onnx", np.zeros((6, 84), np.float32), grid=False))


FINISHED = np.array([[4, 4, 40, 40, 0.92, 0], [10, 20, 30, 60, 0.81, 0]], np.float32)


@pytest.mark.parametrize("names", ["{0: 'bolt'}", "{0: 'bolt', 1: 'nut'}"], ids=["one class", "two classes"])
@pytest.mark.parametrize("count", [100, 300, 1000])
@pytest.mark.parametrize("open_output", [False, True], ids=["fixed", "open"])
def test_a_file_with_nms_inside_is_refused_and_not_read_as_rows(toys, tmp_path, names, count, open_output):
    """Both are [1, N, 6]: x1 y1 x2 y2 score class, and xywh objectness class score."""
    boxes = np.pad(FINISHED, ((0, count - len(FINISHED)), (0, 0)))
    path = toys.rows_model(tmp_path / "e2e.onnx", boxes, names=names, grid=False, open_output=open_output)
    with pytest.raises(InputError, match=r"at 64x64 YOLOv5 has 252 rows: NMS seems to be inside") as caught:
        Detector.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("anchors", "strides"),
    [(3, (8, 16, 32)), (3, (8, 16, 32, 64)), (3, (4, 8, 16, 32)), (3, (16, 32)), (1, (16, 32, 64)), (5, (8, 16, 32))],
    ids=["P5", "P6", "P2", "two levels", "one anchor", "five anchors"],
)
def test_a_head_with_other_levels_or_anchors_is_read(toys, tmp_path, anchors, strides):
    rows = np.zeros((anchors * sum((64 // stride) ** 2 for stride in strides), 6), np.float32)
    path = toys.rows_model(tmp_path / "head.onnx", rows, names="{0: 'bolt'}", grid=False)
    assert Detector.load(path).card.names == ("bolt",)


def test_the_number_of_classes_of_an_open_output_is_seen(toys, tmp_path):
    path = toys.rows_model(tmp_path / "open.onnx", ROWS, names=None, open_output=True)
    assert Detector.load(path).card.names == ("class0", "class1")


@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_a_device_that_is_not_there_is_an_error_never_a_fallback(toys, tmp_path, device):
    with pytest.raises(UnavailableError, match=device):
        Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), device=device)


def test_a_provider_that_does_not_start_is_an_error():
    """ONNX Runtime itself warns and goes on with the CPU."""
    with pytest.raises(UnavailableError, match="CUDAExecutionProvider did not start"):
        onnx_backend.require_provider("cuda", onnx_backend.PROVIDERS["cuda"], ["CPUExecutionProvider"])
    onnx_backend.require_provider("auto", onnx_backend.PROVIDERS["cuda"], ["CPUExecutionProvider"])


def test_auto_takes_cuda_where_it_is_built_in():
    assert onnx_backend.choose_providers("auto", ["CUDAExecutionProvider", "CPUExecutionProvider"])[0].startswith(
        "CUDA"
    )
    assert onnx_backend.choose_providers("auto", ["CPUExecutionProvider"]) == ("CPUExecutionProvider",)


def test_an_unknown_device_is_wrong_usage(toys, tmp_path):
    with pytest.raises(UsageError, match="tpu"):
        Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), device="tpu")


def test_less_than_one_thread_is_wrong_usage(toys, tmp_path):
    with pytest.raises(UsageError, match="threads is 0"):
        Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), threads=0)


def test_a_broken_onnx_file_is_one_line(toys, tmp_path):
    path = toys.canvas_model(tmp_path / "toy.onnx")
    data = bytearray(path.read_bytes())
    start = data.find(b"Cast")
    data[start : start + 4] = b"Cost"
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot load it") as caught:
        Detector.load(path)
    assert "\n" not in str(caught.value)


def test_threads_share_a_detector_without_mixing_frames(detector):
    frames = [np.full((40 + 8 * index, 64, 3), 255 if index % 2 else 0, np.uint8) for index in range(8)]
    wrong = []

    def work(index):
        for _ in range(30):
            if len(detector(frames[index])) != (2 if index % 2 else 0):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("asked", [None, 1, 3])
def test_the_number_of_threads_is_always_set_so_that_no_worker_is_pinned_to_a_core(toys, tmp_path, asked):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), threads=asked) as detector:
        chosen = detector._backend._session.get_session_options().intra_op_num_threads
    assert chosen == (asked or compute_threads())


@pytest.mark.parametrize("spin", [True, False])
def test_threads_wait_actively_only_where_asked_for(toys, tmp_path, spin):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), spin=spin) as detector:
        session = detector._backend._session.get_session_options()
        assert session.get_session_config_entry("session.intra_op.allow_spinning") == str(int(spin))


@pytest.mark.parametrize("as_written", [True, False])
def test_quantised_layers_are_computed_in_float_only_where_asked_for(toys, tmp_path, as_written):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), as_written=as_written) as detector:
        session = detector._backend._session.get_session_options()
        assert session.get_session_config_entry("session.disable_quant_qdq") == str(int(as_written))


@pytest.mark.parametrize(
    ("flags", "expected"), [("sse avx512_vnni", "0"), ("sse avx_vnni", "0"), ("sse avx2", "1"), ("", "1")]
)
def test_weights_of_8_bits_are_exact_on_every_cpu(toys, tmp_path, monkeypatch, flags, expected):
    text = f"processor: 0\nflags\t\t: {flags}\n"
    read = machine._read_text
    monkeypatch.setattr(machine, "_read_text", lambda path: text if path == Path("/proc/cpuinfo") else read(path))
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx")) as detector:
        session = detector._backend._session.get_session_options()
        assert session.get_session_config_entry("session.x64quantprecision") == expected


def test_a_closed_detector_is_one_line(toys, tmp_path, white_frame):
    with Detector.load(toys.canvas_model(tmp_path / "toy.onnx")) as detector:
        pass
    with pytest.raises(UsageError, match="closed"):
        detector(white_frame)


def test_a_model_whose_name_is_not_utf8_is_loaded(toys, tmp_path, white_frame):
    for make in (toys.canvas_model, lambda path: toys.rows_model(path, ROWS)):
        source = make(tmp_path / "plain.onnx")
        path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/gr\xfcn.onnx"))
        source.replace(path)
        with Detector.load(path) as detector:
            assert len(detector(white_frame)) == 2


def test_closing_twice_is_harmless(toys, tmp_path):
    detector = Detector.load(toys.canvas_model(tmp_path / "toy.onnx"), threads=1)
    detector.close()
    detector.close()


def test_importing_runtime_is_quick_and_loads_no_opencv():
    code = (
        "import time; t = time.perf_counter(); import runtime, sys; "
        "print(time.perf_counter() - t, 'cv2' in sys.modules)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True) for _ in range(3)
    ]
    answers = [run.stdout.split() for run in runs]
    assert min(float(seconds) for seconds, _ in answers) < 0.2
    assert {loaded for _, loaded in answers} == {"False"}


def test_a_detection_loads_neither_torch_nor_onnx(toys, tmp_path):
    path = toys.canvas_model(tmp_path / "toy.onnx")
    code = (
        "import sys, numpy as np; from runtime import Detector; "
        f"Detector.load({str(path)!r})(np.zeros((9, 9, 3), np.uint8)); "
        "print({'torch', 'onnx', 'click'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_a_model_that_fails_on_its_input_is_one_line(toys, tmp_path, white_frame, backend):
    """The card allows more images than the graph does: its weights are reshaped to one."""
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    path = toys.one_image_model(tmp_path / "toy.onnx")
    told = r"cannot run it on uint8 \[2, 64, 64, 3\]|1 outputs for 2 frames"  # OpenVINO may reshape without an error
    with Detector.load(path, backend=backend) as detector:
        assert len(detector([white_frame])) == 1
        with pytest.raises(EngineError, match=told) as caught:
            detector([white_frame, white_frame])
    assert "\n" not in str(caught.value)
