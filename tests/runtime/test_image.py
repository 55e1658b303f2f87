from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from runtime.boxes import unletterbox
from runtime.errors import InputError
from runtime.image import LETTERBOX_FILL, geometry, letterbox, read_image, to_tensor

PIXELS = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8), (5, 5), 0)


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_size(width: int, height: int) -> bytes:
    data = bytearray(encoded("JPEG"))
    start = data.find(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_every_format_decodes_to_bgr(tmp_path, kind):
    path = tmp_path / "a.img"  # the content decides, not the suffix
    path.write_bytes(encoded(kind))
    image = read_image(path)
    assert (image.shape, image.dtype) == ((60, 80, 3), np.uint8)
    assert np.abs(image[..., ::-1].astype(int) - PIXELS).mean() < 12


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "I;16", "P"])
def test_every_colour_mode_becomes_three_channels(tmp_path, mode):
    path = tmp_path / "a"
    source = Image.fromarray(PIXELS)
    pixels = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257) if mode == "I;16" else source.convert(mode)
    pixels.save(path, "JPEG" if mode == "CMYK" else "PNG")
    assert read_image(path).shape == (60, 80, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_as_imread_does(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded("JPEG", exif=exif.tobytes()))
    image = read_image(path)
    assert np.array_equal(image, cv2.imread(str(path)))
    assert image.shape[:2] == ((60, 80) if orientation < 5 else (80, 60))


def test_fill_bytes_before_a_marker_are_no_damage(tmp_path):
    """The standard allows any number of 0xff before a marker, and some cameras write them."""
    data = encoded("JPEG")
    for marker in (b"\xff\xdb", b"\xff\xda", b"\xff\xd9"):
        (tmp_path / "a.jpg").write_bytes(data.replace(marker, b"\xff\xff" + marker))
        assert read_image(tmp_path / "a.jpg").shape == (60, 80, 3)


BAD = {
    "empty": (b"", "empty"),
    "text": (b"not an image", "not an image"),
    "fits": (b"SIMPLE  =                    T" + b" " * 3000, "not an image"),
    "gif": (encoded("GIF"), "not an image"),
    "half jpeg": (encoded("JPEG")[:900], "cut short"),
    "half progressive jpeg": (encoded("JPEG", progressive=True)[:900], "cut short"),
    "jpeg without its last ten bytes": (encoded("JPEG")[:-10], "cut short"),
    "half png": (encoded("PNG")[:3000], "cut short"),
    "half bmp": (encoded("BMP")[:3000], "cut short"),
    "half webp": (encoded("WEBP")[:-200], "cut short"),
    "half tiff": (encoded("TIFF")[:3000], "cut short"),
    "png of 40000 x 40000": (png_header(40_000, 40_000), "pixels"),
    "png of 60000 x 60000": (png_header(60_000, 60_000), "pixels"),
    "jpeg of 40000 x 40000": (jpeg_of_size(40_000, 40_000), "pixels"),
    "png of 200 million pixels": (png_header(20_000, 10_000), "pixels|cut short"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_image_is_one_line_that_names_the_file(tmp_path, name):
    data, word = BAD[name]
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(InputError, match=word) as caught:
        read_image(path)
    assert "\n" not in str(caught.value)
    assert "bad.jpg" in str(caught.value)


def tiff(dtype: type, samples: int = 1, value: float = 1.0) -> bytes:
    return cv2.imencode(".tiff", np.full((6, 8) if samples == 1 else (6, 8, samples), value, dtype))[1].tobytes()


@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_the_upper_eight_bits_of_sixteen_are_read(tmp_path, kind):
    values = np.random.default_rng(0).integers(0, 65536, (6, 8, 3), np.uint16)
    (tmp_path / "a").write_bytes(cv2.imencode(kind, values)[1].tobytes())
    assert np.array_equal(read_image(tmp_path / "a"), values >> 8)


def test_a_black_image_of_sixteen_bits_is_black(tmp_path):
    (tmp_path / "a").write_bytes(tiff(np.uint16, value=0))
    assert not read_image(tmp_path / "a").any()


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (tiff(np.uint16, value=3000), "only 12 bits are used"),
        (tiff(np.float32, 3, 0.5), "float32 pixels"),
        (encoded("JPEG").replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c"), "JPEG of 12 bits"),
    ],
)
def test_deep_pixels_of_an_unknown_range_are_refused_by_name(tmp_path, data, word):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(InputError, match=word):
        read_image(tmp_path / "a")


def test_missing_files_and_folders_are_input_errors(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_image(path)


def test_letterbox_agrees_with_all_reference_cases_of_a_given_size(reference):
    table = json.loads((reference / "data_reference.json").read_text())["letterbox"]
    rows = [row for row in table["rows"] if not row[3]]  # the others pad to the next multiple of the stride only
    assert len(rows) == 112
    for height, width, size_hw, _, scale_up, out_hw, gain, pad_wh, (y0, y1, x0, x1) in rows:
        framed = letterbox(np.zeros((height, width, 3), np.uint8), tuple(size_hw), scale_up=bool(scale_up))
        assert framed.image.shape == (*out_hw, 3)
        assert (framed.gain, list(framed.pad_wh)) == (pytest.approx(gain, abs=1e-12), pad_wh)
        content = framed.image[..., 0] != LETTERBOX_FILL
        rows, columns = np.flatnonzero(content.any(1)), np.flatnonzero(content.any(0))
        assert [rows[0], rows[-1] + 1, columns[0], columns[-1] + 1] == [y0, y1, x0, x1]


def test_letterboxed_pixels_and_tensors_are_bit_equal_to_the_reference(shared, reference):
    runs = json.loads((reference / "inference_reference.json").read_text())["runs"]
    paths = {path.name: path for path in (shared / "data").rglob("*.jpg")}
    with np.load(reference / "letterboxed_bgr_uint8.npz") as canvases:
        for name, canvas in canvases.items():
            number, size = name[2:].split("_")
            framed = letterbox(read_image(paths[f"{int(number):012d}.jpg"]), (int(size), int(size)))
            assert np.array_equal(framed.image, canvas)
            digest = hashlib.sha256(to_tensor(framed.image).tobytes()).hexdigest()
            assert digest == runs[name]["input_rgb_chw_f32_sha256"]


sides = st.integers(1, 400)


@settings(max_examples=60, deadline=None)
@given(frame=st.tuples(sides, sides), size=st.tuples(st.integers(32, 320), st.integers(32, 320)), up=st.booleans())
def test_letterbox_then_unletterbox_is_identity(frame, size, up):
    place = geometry(frame, size, scale_up=up)
    assert place.canvas_hw == size
    boxes = np.array([[0, 0, frame[1], frame[0]], [0, 0, frame[1] / 2, frame[0] / 3]], np.float32)
    on_canvas = boxes * place.gain + np.array([*place.pad_wh, *place.pad_wh])
    assert np.allclose(unletterbox(on_canvas, place.gain, place.pad_wh, frame), boxes, atol=2e-3 / place.gain)


def test_letterbox_returns_memory_of_its_own():
    image = np.zeros((64, 64, 3), np.uint8)
    letterbox(image, (64, 64)).image[:] = 9
    assert not image.any()


def test_tensor_is_rgb_planes_in_0_to_1():
    image = np.zeros((2, 4, 5, 3), np.uint8)
    image[0, 1, 2] = (10, 20, 255)
    tensor = to_tensor(image)
    assert (tensor.shape, tensor.dtype, tensor.flags.c_contiguous) == ((2, 3, 4, 5), np.float32, True)
    assert tensor[0, :, 1, 2].tolist() == [1.0, np.float32(20) / np.float32(255), np.float32(10) / np.float32(255)]
    assert np.array_equal(to_tensor(image[0]), tensor[:1])
