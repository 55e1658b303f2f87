from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime.errors import EdgestillError
from runtime.frames import Frame
from runtime.results import ResultWriter, video_stem

GREY = np.full((48, 64, 3), 99, np.uint8)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_of_one_name_get_numbers_and_a_source_stays(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"the source")
    with ResultWriter(tmp_path) as writer:
        for folder in ("x", "y"):
            writer.write(Frame(f"{folder}/a.jpg", 0, GREY), GREY)
    assert names(tmp_path) == ["a-2.jpg", "a-3.jpg", "a.jpg"]
    assert (tmp_path / "a.jpg").read_bytes() == b"the source"


def test_a_video_becomes_a_video_of_its_rate_with_every_frame(tmp_path):
    with ResultWriter(tmp_path) as writer:
        for source in ("a.avi", "b/a.avi"):
            for number in range(6):
                writer.write(Frame(source, number, GREY, 5.0, repeat=2), GREY)
    assert names(tmp_path) == ["a-2.mp4", "a.mp4"]
    for path in tmp_path.iterdir():
        capture = cv2.VideoCapture(str(path))
        assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (12, 5)
        capture.release()


def test_frames_of_another_size_begin_a_new_file(tmp_path):
    with ResultWriter(tmp_path) as writer:
        writer.write(Frame("0", 0, GREY, 5.0), GREY)
        writer.write(Frame("0", 1, GREY[:24], 5.0), GREY[:24])
    assert names(tmp_path) == ["camera-0-2.mp4", "camera-0.mp4"]


def test_a_video_that_does_not_hold_every_frame_is_an_error(tmp_path):
    writer = ResultWriter(tmp_path)
    path = writer.write(Frame("0", 0, GREY, 5.0), GREY)
    writer._frames = 7  # as if the disk was full: OpenCV reports nothing
    with pytest.raises(EdgestillError, match="holds 1 of 7 frames"):
        writer.close()
    assert path.exists()


def test_a_stream_is_named_by_its_address_in_plain_characters():
    assert video_stem("rtsp://***@10.0.0.7:554/cam 1") == "rtsp-10.0.0.7-554-cam-1"
    assert video_stem("0") == "camera-0"


def test_a_folder_that_is_not_utf8_gets_its_video(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    with ResultWriter(folder) as writer:
        for number in range(3):
            writer.write(Frame("a.avi", number, GREY, 5.0), GREY)
    assert names(folder) == ["a.mp4"]


@pytest.mark.parametrize("stem", ["a" * 251, "語" * 83])
def test_a_long_name_that_is_taken_is_cut_for_its_number(tmp_path, stem):
    with ResultWriter(tmp_path) as writer:
        written = [writer.write(Frame(f"{stem}.jpg", 0, GREY), GREY).name for _ in range(3)]
    assert len(set(written)) == 3
    assert sorted(written) == names(tmp_path)
    assert all(len(os.fsencode(name)) <= 255 for name in written)
