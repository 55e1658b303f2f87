"""Write drawn frames to a folder: an image for an image, a video for a video. Nothing that exists is overwritten."""

from __future__ import annotations

import os
import re
from itertools import count
from pathlib import Path
from typing import NamedTuple

import cv2

from runtime.errors import EdgestillError
from runtime.files import atomic_write, unwritable, utf8_name
from runtime.frames import Frame
from runtime.image import WRITABLE, Image
from runtime.sources import VIDEO_SUFFIXES

CODECS = ((".mp4", "mp4v"), (".avi", "MJPG"))
"""Tried in this order: builds of OpenCV without FFmpeg write only the second."""
MAX_NAME = 100
"""Characters of the name that is made of an address."""
MAX_NAME_BYTES = 255
"""File systems take no longer names."""
HINT = "Free some space, or choose another folder"


class OpenVideo(NamedTuple):
    source: str
    path: Path
    writer: cv2.VideoWriter
    size_wh: tuple[int, int]


class ResultWriter:
    """Writes drawn frames into `folder`; close it, or use it as a context manager, so that videos are complete.

    A name that is taken, by a source, an earlier run or another result, gets a number: `a.jpg`, `a-2.jpg`. Raises
    EdgestillError when a file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._video: OpenVideo | None = None
        self._frames = 0

    def write(self, frame: Frame, drawn: Image) -> Path:
        """Write one drawn frame and return its file; `drawn` has the size of the frame."""
        if frame.fps is None:
            return self._write_image(Path(frame.source), drawn)
        return self._write_video(frame, frame.fps, drawn)

    def _write_image(self, source: Path, drawn: Image) -> Path:
        suffix = source.suffix if source.suffix.lower() in WRITABLE else ".jpg"
        path = free_path(self._folder, source.stem, suffix)
        encoded, data = cv2.imencode(suffix, drawn)
        if not encoded:
            raise EdgestillError(f"{path}: the image cannot be encoded", "Choose another format for the source")
        with atomic_write(path) as temporary:
            temporary.write_bytes(data.tobytes())
        return path

    def _write_video(self, frame: Frame, fps: float, drawn: Image) -> Path:
        size_wh = drawn.shape[1], drawn.shape[0]
        video = self._video
        if video is None or video.source != frame.source or video.size_wh != size_wh:  # a writer drops other sizes
            self.close()
            video = self._video = self._open_video(frame.source, fps, size_wh)
        for _ in range(frame.repeat):  # so that the video plays as fast as its source
            video.writer.write(drawn)
        self._frames += frame.repeat
        return video.path

    def _open_video(self, source: str, fps: float, size_wh: tuple[int, int]) -> OpenVideo:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        for suffix, codec in CODECS:
            path = free_path(self._folder, video_stem(source), suffix)
            with utf8_name(path) as name:
                writer = cv2.VideoWriter(name, cv2.VideoWriter_fourcc(*codec), fps, size_wh)  # type: ignore[attr-defined]
            if writer.isOpened():
                return OpenVideo(source, path, writer, size_wh)
        raise EdgestillError(f"{path}: the video cannot be written", HINT)

    def close(self) -> None:
        """Complete the open video. Raises EdgestillError when it does not hold every frame: OpenCV reports nothing."""
        video, frames = self._video, self._frames
        self._video, self._frames = None, 0
        if video is None:
            return
        video.writer.release()
        with utf8_name(video.path) as name:
            written = cv2.VideoCapture(name)
        held = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
        written.release()
        if held != frames:
            raise EdgestillError(f"{video.path}: holds {max(held, 0)} of {frames} frames", HINT)

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def video_stem(source: str) -> str:
    """A file name for the video of a source: the stem of a file, the address of a stream in plain characters."""
    path = Path(source)
    text = f"camera-{source}" if source.isdecimal() else path.stem if path.suffix.lower() in VIDEO_SUFFIXES else source
    return re.sub(r"[^\w.-]+|[\ud800-\udfff]", "-", text).strip("-.")[:MAX_NAME] or "video"


def free_path(folder: Path, stem: str, suffix: str) -> Path:
    """`folder/stem.suffix`, or the first of `stem-2`, `stem-3`, ... that does not exist; a long stem is cut short."""
    endings = (suffix if number == 1 else f"-{number}{suffix}" for number in count(1))
    paths = (folder / (_shortened(stem, MAX_NAME_BYTES - len(os.fsencode(ending))) + ending) for ending in endings)
    return next(path for path in paths if not os.path.lexists(path))


def _shortened(text: str, most_bytes: int) -> str:
    """As many whole characters of the text as fit."""
    while len(os.fsencode(text)) > most_bytes:
        text = text[:-1]
    return text
