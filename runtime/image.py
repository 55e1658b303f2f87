"""Reading, letterboxing and normalising images: the only preprocessing in edgestill.

Training, calibration, validation, benchmarks and the device all call this file. Images are uint8 (H, W, 3) BGR.
"""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

MAX_IMAGE_PIXELS = 178_956_970
"""Half a gigabyte decoded: twice the limit above which Pillow warns of a decompression bomb."""
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MAX_IMAGE_PIXELS))  # OpenCV reads it once, when it is loaded
os.environ.setdefault("OPENCV_LOG_LEVEL", "OFF")  # its decoders would print messages beside our one-line error
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # the same for FFmpeg, which also prints addresses

import cv2  # noqa: E402

LETTERBOX_FILL = 114
END_OF_IMAGE = b"\xff\xd9"
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
"""Inside a scan 0xff is followed by 0 (a data byte), by a restart marker, or by the marker that ends the scan;
before any marker there may be fill bytes 0xff."""
FRAME_HEADERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Second bytes of the markers of a JPEG's frame header."""
DEEP_LEAST = 4096
DEEP_HINT = "Scale its values to 8 bits first"
WRITABLE = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
IMAGE_SUFFIXES = (*WRITABLE, ".mpo")
"""The last is a stereo format that OpenCV reads and does not write."""
JPEG = b"\xff\xd8\xff"
SIGNATURES = (JPEG, b"\x89PNG\r\n\x1a\n", b"BM", b"II*\x00", b"MM\x00*", b"RIFF")
"""First bytes of JPEG (and MPO), PNG, BMP, TIFF, WebP. No other decoder of OpenCV is ever tried."""

Image = NDArray[np.uint8]


def read_image(path: str | Path) -> Image:
    """Decode an image to uint8 (H, W, 3) BGR, turned upright by its EXIF orientation.

    Of 16-bit pixels the upper 8 bits are used. Pixels that use 12 of the 16 bits or fewer would become black or nearly
    black; they are refused, as are float and 32-bit pixels, whose range the file does not give.

    Raises InputError when the file is missing, empty, cut short, larger than `MAX_IMAGE_PIXELS`, or not an image.
    """
    return decode_image(read_bytes(Path(path)), path)


def decode_image(data: bytes, origin: str | Path) -> Image:
    """`read_image` of a file's bytes; `origin` names the file in errors."""
    if not data.startswith(SIGNATURES):
        raise InputError(f"{origin}: not an image", f"Give one of {', '.join(IMAGE_SUFFIXES)}")
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    except cv2.error as error:
        if "CV_IO_MAX_IMAGE" in str(error):
            raise _too_large(origin) from error
        raise InputError(f"{origin}: cannot be decoded: {error.err}") from error
    if image is None and data.startswith(JPEG) and jpeg_bits(data) not in (8, None):
        raise InputError(f"{origin}: a JPEG of {jpeg_bits(data)} bits, expected 8", DEEP_HINT)
    if image is None or (data.startswith(JPEG) and not reaches_its_end(data)):
        raise InputError(f"{origin}: damaged or cut short ({len(data)} bytes)", "Copy or download it again")
    if image.shape[0] * image.shape[1] > MAX_IMAGE_PIXELS:  # OpenCV was loaded before this file could set its limit
        raise _too_large(origin)
    return to_8_bits(image, origin)


def to_8_bits(image: NDArray[Any], origin: str | Path) -> Image:
    """The upper 8 bits of uint16 pixels; uint8 pixels are returned as they are. Raises InputError for all others."""
    if image.dtype == np.uint8:
        return image
    if image.dtype != np.uint16:
        raise InputError(f"{origin}: {image.dtype} pixels, expected 8 or 16 bits", DEEP_HINT)
    if 0 < (largest := int(image.max())) < DEEP_LEAST:
        bits = largest.bit_length()
        raise InputError(f"{origin}: 16-bit pixels of which only {bits} bits are used, expected all 16", DEEP_HINT)
    return (image >> 8).astype(np.uint8)


def jpeg_bits(jpeg: bytes) -> int | None:
    """Bits of a sample, from the frame header; None without one."""
    position = 2
    while found := NEXT_MARKER.search(jpeg, position):
        start = found.end()
        if found[0][1] in FRAME_HEADERS:
            return jpeg[start + 2] if start + 2 < len(jpeg) else None
        position = start + int.from_bytes(jpeg[start : start + 2], "big")
    return None


def reaches_its_end(jpeg: bytes) -> bool:
    """True when the JPEG's own end marker is there: OpenCV fills a missing part with grey and reports nothing.

    Follows the markers, because a thumbnail before the image and a video behind it have end markers too.
    """
    position = 2
    while found := NEXT_MARKER.search(jpeg, position):
        if found[0] == END_OF_IMAGE:
            return True
        position = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return False


def read_bytes(path: Path) -> bytes:
    """The bytes of an image file. Raises InputError when it cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise InputError(f"{path}: the file is empty", "Copy or download it again")
    return data


def _too_large(path: str | Path) -> InputError:
    return InputError(f"{path}: has more than {MAX_IMAGE_PIXELS} pixels", "Shrink it first")


class Letterboxed(NamedTuple):
    """`image` uint8 BGR; frame pixel p is at `p * gain + pad_wh`; the pad is unrounded, as in YOLOv5."""

    image: Image
    gain: float
    pad_wh: tuple[float, float]


class Geometry(NamedTuple):
    """The place of a frame on its canvas, all in canvas pixels; `unletterbox` subtracts `pad_wh`."""

    canvas_hw: tuple[int, int]
    resized_hw: tuple[int, int]
    gain: float
    pad_wh: tuple[float, float]
    left_top: tuple[int, int]


@lru_cache(maxsize=1024)
def geometry(frame_hw: tuple[int, int], size_hw: tuple[int, int], *, scale_up: bool = True) -> Geometry:
    """Geometry of YOLOv5's letterbox: scale to fit, split the rest, the odd pixel right and below.

    `scale_up` False never enlarges.
    """
    (height, width), (canvas_height, canvas_width) = frame_hw, size_hw
    gain = min(canvas_height / height, canvas_width / width)
    if not scale_up:
        gain = min(gain, 1.0)
    resized = max(1, round(height * gain)), max(1, round(width * gain))
    pad_height, pad_width = (canvas_height - resized[0]) / 2, (canvas_width - resized[1]) / 2
    left_top = round(pad_width - 0.1), round(pad_height - 0.1)
    return Geometry(size_hw, resized, gain, (pad_width, pad_height), left_top)


def letterbox(image: Image, size_hw: tuple[int, int], *, scale_up: bool = True) -> Letterboxed:
    """Scale to fit `size_hw` (bilinear) and pad with grey 114; returns a new array. `scale_up` as for `geometry`."""
    place = geometry(_size_hw(image), size_hw, scale_up=scale_up)
    canvas = np.empty((*place.canvas_hw, 3), np.uint8)
    fill_border(canvas, place)
    paste(canvas, image, place)
    return Letterboxed(canvas, place.gain, place.pad_wh)


def paste(canvas: Image, image: Image, place: Geometry) -> None:
    """Write the resized image to its place on the canvas; the border is not touched."""
    (height, width), (left, top) = place.resized_hw, place.left_top
    window = canvas[top : top + height, left : left + width]
    if _size_hw(image) == place.resized_hw:
        window[...] = image
    else:
        cv2.resize(image, (width, height), dst=window, interpolation=cv2.INTER_LINEAR)


def fill_border(canvas: Image, place: Geometry) -> None:
    (height, width), (left, top) = place.resized_hw, place.left_top
    canvas[:top] = LETTERBOX_FILL
    canvas[top + height :] = LETTERBOX_FILL
    canvas[:, :left] = LETTERBOX_FILL
    canvas[:, left + width :] = LETTERBOX_FILL


def to_tensor(images_bgr: Image) -> NDArray[np.float32]:
    """(H, W, 3) or (B, H, W, 3) uint8 BGR -> contiguous (B, 3, H, W) float32 RGB in 0..1."""
    batch = images_bgr[None] if images_bgr.ndim == 3 else images_bgr
    tensor = np.empty((len(batch), 3, *batch.shape[1:3]), np.float32)
    for image, planes in zip(batch, tensor, strict=True):
        for plane, channel in zip(planes, reversed(cv2.split(image)), strict=True):
            np.divide(channel, np.float32(255), out=plane, dtype=np.float32)  # NumPy 1 would take float16
    return tensor


def _size_hw(image: Image) -> tuple[int, int]:
    return image.shape[0], image.shape[1]
