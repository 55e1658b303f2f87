from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from runtime import frames
from runtime.errors import UnavailableError, UsageError
from runtime.frames import Frame, FrameReader, newest
from runtime.sources import find_sources

COUNT = 60


@pytest.fixture
def film(tmp_path) -> Path:
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    for index in range(COUNT):
        writer.write(np.full((48, 64, 3), index * 4, np.uint8))
    writer.release()
    return path


def starts(data: bytes) -> list[int]:
    return [index for index in range(len(data)) if data[index : index + 3] == b"\xff\xd8\xff"]


def read(path, **options):
    lines = []
    reader = FrameReader(find_sources([path]), log=lines.append, **options)
    return list(reader), reader.failures, lines


def test_a_whole_film_is_read_with_its_rate(film):
    found, losses, _ = read(film)
    assert ([frame.number for frame in found], losses) == (list(range(COUNT)), [])
    assert {frame.fps for frame in found} == {10.0}


def test_stride_gives_every_nth_frame(film):
    found, losses, _ = read(film, stride=25)
    assert ([frame.number for frame in found], losses, found[0].fps) == ([0, 25, 50], [], 0.4)


def test_unreadable_frames_inside_a_film_are_skipped_and_counted(film):
    data = bytearray(film.read_bytes())
    at = starts(data)
    data[at[20] : at[23] - 16] = bytes(at[23] - 16 - at[20])
    film.write_bytes(data)
    found, losses, lines = read(film)
    assert len(found) == COUNT - 3
    assert "3 frames are unreadable or missing" in losses[0]
    assert len(lines) == 1


def test_a_film_that_is_cut_short_is_reported(film):
    data = film.read_bytes()
    film.write_bytes(data[: starts(data)[30] + 100])
    found, losses, _ = read(film)
    assert len(found) == 30
    assert "30 frames are unreadable or missing, 30 were read" in losses[0]


def test_a_film_without_any_frame_and_an_unreadable_image_do_not_end_the_rest(film, tmp_path):
    (tmp_path / "a.avi").write_bytes(b"no film")
    (tmp_path / "b.png").write_bytes(b"no image")
    found, losses, _ = read(tmp_path)
    assert len(found) == COUNT
    assert ["a.avi" in losses[0], "b.png" in losses[1]] == [True, True]


def test_a_film_whose_name_is_not_utf8_is_read(film):
    path = Path(os.fsdecode(os.fsencode(film.parent) + b"/gr\xfcn.avi"))
    film.rename(path)
    found, losses, _ = read(path)
    assert (len(found), losses) == (COUNT, [])


class Camera(http.server.BaseHTTPRequestHandler):
    """Sends a few frames, then hangs up."""

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=f")
        self.end_headers()
        for index in range(5):
            jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), index * 9, np.uint8))[1].tobytes()
            head = b"--f\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
            self.wfile.write(head + jpeg + b"\r\n")


@pytest.fixture
def camera():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://admin:secret@127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def test_a_dropped_stream_is_reported_without_its_credentials(camera):
    found, losses, lines = read(camera)
    assert len(found) == 5
    assert "dropped after 5 frames" in losses[0]
    assert not any("secret" in text for text in [*losses, *lines, *(frame.source for frame in found)])


def test_a_dropped_stream_is_opened_again_as_often_as_asked_in_a_row(camera, monkeypatch):
    monkeypatch.setattr(frames, "RECONNECT_PAUSE_S", 0.0)
    reader = FrameReader(find_sources([camera]), reconnect=2, log=(lines := []).append)
    numbers = []
    for frame in reader:
        numbers.append(frame.number)
        if len(numbers) == 12:
            break
    assert numbers == list(range(12))
    assert [line.rpartition(", ")[2] for line in lines] == ["connecting again (1 of 2)"] * 2


def test_an_address_where_nothing_answers_is_reported(monkeypatch):
    monkeypatch.setattr(frames, "RECONNECT_PAUSE_S", 0.0)
    found, losses, lines = read("rtsp://u:secret@127.0.0.1:9/x", reconnect=1)
    assert (found, len(losses)) == ([], 1)
    assert "no frame can be read from it" in losses[0]
    assert "secret" not in "".join([*losses, *lines])


def test_a_pipeline_without_gstreamer_says_so(monkeypatch):
    monkeypatch.setattr(frames, "_has_gstreamer", lambda: False)
    with pytest.raises(UnavailableError, match="without GStreamer"):
        read("videotestsrc ! appsink")


def test_only_the_newest_frame_is_given_and_those_passed_over_are_counted():
    def feed():
        for number in range(40):
            time.sleep(0.005)
            yield Frame("0", number, np.zeros((2, 2, 3), np.uint8), 25.0)

    given = []
    for frame in newest(feed()):
        given.append(frame)
        time.sleep(0.05)
    assert 2 <= len(given) < 20
    assert sum(frame.repeat for frame in given) == 40
    assert given[-1].number == 39


READER_LEFT_OPEN = """
import atexit, itertools, threading, time
from runtime.frames import Frame, newest

def feed():
    for number in itertools.count():
        time.sleep(0.01)
        yield Frame("0", number, None, 25.0)

atexit.register(lambda: print(sum(thread.name == "newest-frame" for thread in threading.enumerate())))
frames = newest(feed())
next(frames)
"""


def test_the_reading_thread_ends_before_an_interpreter_whose_reader_was_left_open():
    assert subprocess.check_output([sys.executable, "-c", READER_LEFT_OPEN], text=True).strip() == "0"


@pytest.mark.timeout(60)  # a reader that the error does not reach waits for ever
@pytest.mark.parametrize("error", [UnavailableError("gone"), cv2.error("gone"), KeyError("gone")])
def test_an_error_of_the_feed_arrives_at_the_reader(error):
    def feed():
        yield Frame("0", 0, np.zeros((2, 2, 3), np.uint8), 25.0)
        raise error

    with pytest.raises(type(error), match="gone"):
        list(newest(feed()))


@pytest.mark.parametrize("options", [{"stride": 0}, {"reconnect": -1}, {"latest": True}, {"reconnect": 1}])
def test_options_that_do_not_fit_are_wrong_usage(film, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        read(film, **options)
