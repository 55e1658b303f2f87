from __future__ import annotations

import onnx
import pytest

from runtime.errors import InputError
from runtime.onnx_file import read_metadata


def test_it_reads_what_onnx_wrote(toys, tmp_path):
    path = toys.conv_model(tmp_path / "a.onnx")
    model = onnx.load(path)
    wanted = {"names": "{0: 'bölt'}", "empty": "", "long": "x" * 100_000}
    onnx.helper.set_model_props(model, wanted)
    onnx.save(model, path)
    assert read_metadata(path) == wanted


def test_a_file_without_metadata_has_none(toys, tmp_path):
    assert read_metadata(toys.conv_model(tmp_path / "a.onnx")) == {}


def test_a_file_cut_anywhere_is_refused_or_read_without_its_end(toys, tmp_path):
    data = toys.canvas_model(tmp_path / "a.onnx").read_bytes()
    whole = read_metadata(tmp_path / "a.onnx")
    cut = tmp_path / "cut.onnx"
    for length in range(0, len(data), 3):
        cut.write_bytes(data[:length])
        try:
            found = read_metadata(cut)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017  both outcomes are right, by where the cut falls
        else:
            assert found.items() <= whole.items()


@pytest.mark.parametrize("data", [b"hello world", b"\xff" * 40, b"\x72\xff\xff\xff\xff\x0f", b"\x0b\x0c" * 9])
def test_other_files_are_refused_in_one_line(tmp_path, data):
    (tmp_path / "a.onnx").write_bytes(data)
    with pytest.raises(InputError, match="not an ONNX file"):
        read_metadata(tmp_path / "a.onnx")


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_metadata(tmp_path / "none.onnx")
