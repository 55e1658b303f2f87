"""Frames of image files, folders, videos, streams and cameras, one source after the other."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import cv2

from runtime.errors import InputError
from runtime.image import IMAGE_SUFFIXES, Image, read_image

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
URL_SCHEMES = ("rtsp://", "rtmp://", "http://", "https://")


class Frame(NamedTuple):
    """`image` uint8 BGR; `source` is the file, URL or camera; `number` counts the frames of one source from 0."""

    source: str
    number: int
    image: Image
    is_video: bool


def frames(sources: Iterable[str | Path]) -> Iterator[Frame]:
    """Every frame of every source. A source is an image, a folder of images, a pattern, a video, a URL or a camera's
    number. Raises InputError on one that is none of these, or that cannot be opened.
    """
    for source in map(str, sources):
        if source.isdecimal() or source.startswith(URL_SCHEMES):
            yield from _video_frames(source, int(source) if source.isdecimal() else source)
            continue
        for path in expand(source):
            if path.suffix.lower() in VIDEO_SUFFIXES:
                yield from _video_frames(str(path), str(path))
            else:
                yield Frame(str(path), 0, read_image(path), is_video=False)


def expand(source: str) -> list[Path]:
    """The files of a folder or pattern in the order of their names, or the file itself."""
    path = Path(source)
    if path.is_file():
        return [path]
    if not path.exists() and glob.has_magic(source):
        found = [Path(name) for name in glob.glob(source, recursive=True)]  # noqa: PTH207  it may start with a root
    elif path.is_dir():
        found = list(path.iterdir())
    else:
        raise InputError(f"{source}: no such file or folder", "Give images, a folder, a video or a camera's number")
    usable = sorted(file for file in found if file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES))
    if not usable:
        raise InputError(f"{source}: holds no image or video", f"Images are {', '.join(IMAGE_SUFFIXES)}")
    return usable


def _video_frames(name: str, source: int | str) -> Iterator[Frame]:
    capture = cv2.VideoCapture(source)
    try:
        number = 0
        while True:
            taken, image = capture.read()
            if not taken:
                break
            yield Frame(name, number, image, is_video=True)  # type: ignore[arg-type]
            number += 1
        if number == 0:
            raise InputError(f"{name}: no frame can be read from it", "Check the address, the cable or the codec")
    finally:
        capture.release()
