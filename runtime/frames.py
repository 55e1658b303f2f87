"""Read the frames of sources one after the other, and count what could not be read."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import cv2

from runtime.errors import InputError, UnavailableError, UsageError
from runtime.files import utf8_name
from runtime.image import Image, read_image
from runtime.sources import PIPELINE, Source

MAX_FAILURES = 30
"""Most successive frames that may fail. A damaged part of a file has a few; after its end, every frame fails."""
STREAM_PATIENCE_S = 5.0
"""A stream that gives no frame for this long, and does not block, counts as dropped."""
RECONNECT_PAUSE_S = 1.0
TOLERANCE = 0.02
"""A container's frame count may be an estimate: a file is cut short if more than this share and one are missing."""
USUAL_FPS = 25.0
"""The rate of a stream that does not give one."""
MAX_FPS = 1000.0


class Frame(NamedTuple):
    """`image` uint8 (H, W, 3) BGR; `number` counts the frames of a source from 0; `fps` is None for an image file.

    `repeat` is 1 plus the number of frames that were skipped before this one.
    """

    source: str
    number: int
    image: Image
    fps: float | None = None
    repeat: int = 1


class FrameReader:
    """Iterates over the frames of sources. `stride` N gives every Nth frame of a video; with `latest` a stream's frames
    are read in a thread and only the newest is given; `reconnect` is how often a dropped stream is opened again.

    A file or frame that cannot be read is logged, added to `failures` and skipped. Raises UsageError when an
    option is out of range or does not fit the sources.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        stride: int = 1,
        latest: bool = False,
        reconnect: int = 0,
        log: Callable[[str], None] = print,
    ) -> None:
        if stride < 1:
            raise UsageError(f"stride is {stride}, expected 1 or more")
        if reconnect < 0:
            raise UsageError(f"reconnect is {reconnect}, expected 0 or more")
        files = [source.name for source in sources if source.kind != "stream"]
        if files and (latest or reconnect):
            option = "latest" if latest else "reconnect"
            raise UsageError(f"{option} is for cameras and streams, {files[0]} is a file", "Leave it out")
        self.failures: list[str] = []
        self._sources, self._stride, self._latest, self._reconnect = sources, stride, latest, reconnect
        self._log = log

    def __iter__(self) -> Iterator[Frame]:
        for source in self._sources:
            if source.kind == "image":
                yield from self._image(source)
            elif source.kind == "video":
                yield from self._video(source)
            elif self._latest:
                yield from newest(self._stream(source))
            else:
                yield from self._stream(source)

    def report_failure(self, reason: str) -> None:
        """Report and count something that could not be read."""
        self.failures.append(reason)
        self._log(f"skipped: {reason}")

    def _image(self, source: Source) -> Iterator[Frame]:
        try:
            image = read_image(Path(source.target))  # type: ignore[arg-type]
        except InputError as error:
            self.report_failure(str(error))
            return
        yield Frame(source.name, 0, image)

    def _video(self, source: Source) -> Iterator[Frame]:
        with opened(source) as capture:
            total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
            reading = Reading(source, capture, self._stride)
            yield from reading
        self._judge_end(source, reading, total)

    def _judge_end(self, source: Source, reading: Reading, total: int) -> None:
        missing = total - reading.number
        if reading.number == 0:
            self.report_failure(f"{source.name}: no frame can be read from it, damaged or of an unknown codec")
        elif reading.unreadable or missing > max(1, TOLERANCE * total):
            lost = max(reading.unreadable, missing)
            self.report_failure(f"{source.name}: {lost} frames are unreadable or missing, {reading.number} were read")

    def _stream(self, source: Source) -> Iterator[Frame]:
        number = attempts = 0
        while True:
            with opened(source) as capture:
                total = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
                reading = Reading(source, capture, self._stride, number, STREAM_PATIENCE_S)
                for frame in reading:
                    attempts = 0
                    yield frame
            if total > 0 and reading.number > number:  # a file behind an address: it has an end
                self._judge_end(source, reading, total)
                return
            if reading.unreadable:
                self.report_failure(f"{source.name}: {reading.unreadable} frames are unreadable")
            number = reading.number
            state = f"dropped after {number} frames" if number else "no frame can be read from it"
            if attempts == self._reconnect:
                hint = "Check the address, the cable or the codec"
                self.report_failure(f"{source.name}: {state}" + ("" if number else f". {hint}"))
                return
            attempts += 1
            self._log(f"{source.name}: {state}, connecting again ({attempts} of {self._reconnect})")
            time.sleep(RECONNECT_PAUSE_S)


class Reading:
    """One pass over an opened capture. `number` frames were read; `unreadable` ones failed between two that did not."""

    def __init__(
        self, source: Source, capture: cv2.VideoCapture, stride: int, number: int = 0, patience_s: float | None = None
    ) -> None:
        self.number, self.unreadable = number, 0
        self._source, self._capture, self._stride, self._patience_s = source, capture, stride, patience_s
        fps = capture.get(cv2.CAP_PROP_FPS)
        self._fps = (fps if 0 < fps <= MAX_FPS else USUAL_FPS) / stride

    def __iter__(self) -> Iterator[Frame]:
        failures, since = 0, time.monotonic()
        while failures < MAX_FAILURES:
            taken = self._capture.grab()
            wanted = taken and self.number % self._stride == 0
            image = None
            if wanted:
                taken, image = self._capture.retrieve()
            if not taken:
                failures += 1
                if self._patience_s is not None and time.monotonic() - since > self._patience_s:
                    return
                continue
            self.unreadable += failures
            self.number += 1
            if image is not None:
                yield Frame(self._source.name, self.number - 1, image, self._fps)  # type: ignore[arg-type]
            failures, since = 0, time.monotonic()


@contextmanager
def opened(source: Source) -> Iterator[cv2.VideoCapture]:
    """A capture of the source, released at the end.

    Raises UnavailableError when the source is a GStreamer pipeline and OpenCV was built without GStreamer.
    """
    capture = _capture(source.target)
    try:
        yield capture
    finally:
        capture.release()


def _capture(target: Path | str | int) -> cv2.VideoCapture:
    if isinstance(target, Path):
        with utf8_name(target) as name:
            return cv2.VideoCapture(name)
    if isinstance(target, str) and PIPELINE in target:
        if not _has_gstreamer():
            hint = "Use the OpenCV of JetPack or of your Linux, or an rtsp:// address"
            raise UnavailableError("this OpenCV is built without GStreamer", hint)
        return cv2.VideoCapture(target, cv2.CAP_GSTREAMER)
    return cv2.VideoCapture(target)


def _has_gstreamer() -> bool:
    lines = cv2.getBuildInformation().splitlines()
    return any(line.split()[:2] == ["GStreamer:", "YES"] for line in lines)


def newest(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Read frames in a thread as they arrive, and give the newest one each time; those in between are skipped.

    Raises what `frames` raises.
    """
    changed = threading.Condition()
    waiting: list[Frame] = []
    ended: list[BaseException | None] = []
    stopped = threading.Event()

    def read() -> None:
        error = None
        try:
            for frame in frames:
                with changed:
                    passed_over = waiting[0].repeat if waiting else 0
                    waiting[:] = [frame._replace(repeat=frame.repeat + passed_over)]
                    changed.notify()
                if stopped.is_set():
                    break
        except BaseException as caught:  # also a bug, or the reader would wait for ever
            error = caught
        with changed:
            ended.append(error)
            changed.notify()

    def stop() -> None:
        stopped.set()
        thread.join(timeout=STREAM_PATIENCE_S)

    thread = threading.Thread(target=read, name="newest-frame", daemon=True)
    thread.start()
    # a generator that is still referred to is not closed before the interpreter ends, and a thread that returns from
    # OpenCV's code after that aborts the process
    atexit.register(stop)
    try:
        while True:
            with changed:
                changed.wait_for(lambda: waiting or ended)
                frame = waiting.pop() if waiting else None
            if frame is None:
                break
            yield frame
    finally:
        atexit.unregister(stop)
        stop()
    if ended[0] is not None:
        raise ended[0]
