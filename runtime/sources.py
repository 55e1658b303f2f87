"""Sources of frames: image files, folders, patterns, video files, cameras, streams and GStreamer pipelines."""

from __future__ import annotations

import glob
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

from runtime.errors import InputError
from runtime.image import IMAGE_SUFFIXES
from runtime.text import without_credentials

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
URL = re.compile(r"([a-z][a-z0-9+.-]+)(://.+)", re.IGNORECASE | re.DOTALL)
PIPELINE = " ! "
"""Between the elements of a GStreamer pipeline."""
DEVICES = Path("/dev")
MOST_CAMERAS = 1 << 31
"""Numbers from here on are none that OpenCV takes."""


SOURCES_HINT = "Give images, a folder, a video, a camera's number or device, an address, or a GStreamer pipeline"


class Source(NamedTuple):
    """`name` is the text to print, without credentials; `target` is what OpenCV opens.

    An "image" or a "video" is a file that ends; a "stream" is a camera, a device, an address or a pipeline.
    """

    name: str
    kind: Literal["image", "video", "stream"]
    target: Path | str | int


def find_sources(texts: Iterable[str | Path]) -> list[Source]:
    """Every source that the texts name, folders and patterns expanded in the order of the file names.

    Raises InputError when a text names nothing that could be opened.
    """
    return [source for text in texts for source in _sources_of(str(text))]


def _sources_of(text: str) -> list[Source]:
    if text.isdecimal() and int(text) < MOST_CAMERAS:
        return [Source(text, "stream", int(text))]
    if PIPELINE in text:
        return [Source(without_credentials(text), "stream", text)]
    if url := URL.fullmatch(text):
        return [Source(without_credentials(text), "stream", url[1].lower() + url[2])]  # FFmpeg knows "rtsp" only
    return [_file_source(path) for path in _files(text)]


def _file_source(path: Path) -> Source:
    if not path.is_file():
        return Source(str(path), "stream", path)
    return Source(str(path), "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image", path)


def _files(text: str) -> list[Path]:
    path = Path(text)
    if text == "":
        raise InputError("the name of a source is empty", SOURCES_HINT)
    if path.is_file() or _is_device(path):
        return [path]
    if path.is_dir():
        found = list(path.iterdir())
    elif glob.has_magic(text):
        found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207  it may start with a root
    elif path.is_relative_to(DEVICES):
        raise InputError(f"{text}: no such device", "Check the cable, or see /dev for the cameras that are there")
    else:
        raise InputError(f"{text}: no such file or folder", SOURCES_HINT)
    usable = sorted(file for file in found if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    if not usable:
        raise InputError(f"{text}: holds no image or video", f"Images are {', '.join(IMAGE_SUFFIXES)}")
    return usable


def image_files(folder: Path, above: tuple[Path, ...] = ()) -> Iterable[Path]:
    """Image files below `folder`. Links to folders are followed, except to a folder that holds one of `above`: a cycle.

    A broken link is listed too, so that its reader reports it.
    """
    real = folder.resolve()
    if any(one.is_relative_to(real) for one in above):
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from image_files(entry, (*above, real))
        elif entry.suffix.lower() in IMAGE_SUFFIXES and (entry.is_file() or not entry.exists()):
            yield entry


def _is_device(path: Path) -> bool:
    """True for a camera's device (/dev/video0) or a named pipe."""
    if not path.exists():
        return False
    mode = path.stat().st_mode
    return stat.S_ISCHR(mode) or stat.S_ISFIFO(mode)
