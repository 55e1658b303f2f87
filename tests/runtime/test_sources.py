from __future__ import annotations

import os

import pytest

from runtime.errors import InputError
from runtime.sources import find_sources


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("0", 0),
        ("RTSP://10.0.0.7/x", "rtsp://10.0.0.7/x"),
        ("rtsps://10.0.0.7/x", "rtsps://10.0.0.7/x"),
        ("udp://127.0.0.1:5000", "udp://127.0.0.1:5000"),
        ("srt://127.0.0.1:9000", "srt://127.0.0.1:9000"),
        ("http://10.0.0.7/video", "http://10.0.0.7/video"),
        ("nvarguscamerasrc ! appsink", "nvarguscamerasrc ! appsink"),
    ],
)
def test_cameras_addresses_and_pipelines_reach_opencv(text, target):
    (source,) = find_sources([text])
    assert (source.kind, source.target) == ("stream", target)


def test_a_device_is_a_stream_and_a_missing_one_is_named():
    (source,) = find_sources(["/dev/null"])
    assert (source.kind, str(source.target)) == ("stream", "/dev/null")
    with pytest.raises(InputError, match="no such device"):
        find_sources(["/dev/video987"])


def test_a_named_pipe_is_a_stream(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert [source.kind for source in find_sources([tmp_path / "pipe"])] == ["stream"]


def test_the_name_of_a_source_has_no_credentials_and_its_target_has_them():
    (source,) = find_sources(["rtsp://admin:secret@host/cam"])
    assert (source.name, source.target) == ("rtsp://***@host/cam", "rtsp://admin:secret@host/cam")


def test_a_text_that_names_nothing_is_one_line(tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        find_sources([tmp_path / "none.jpg"])
    with pytest.raises(InputError, match="no image or video"):
        find_sources([tmp_path])
