"""The metadata of an ONNX file, read without an ONNX library and without looking at the graph.

An ONNX file is a protobuf message `ModelProto`; its field 14 repeats key/value pairs. Every other field is skipped, so
a file of any size costs a few reads. Source: onnx.proto, and protobuf's encoding of varints and tags.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from runtime.errors import InputError

METADATA_FIELD = 14
KEY_FIELD, VALUE_FIELD = 1, 2
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MAX_ENTRY_BYTES = 16 << 20
MAX_FIELDS = 10_000


def read_metadata(path: str | Path) -> dict[str, str]:
    """Key -> value of the file's metadata. Raises InputError when it is missing or not an ONNX file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            entries = [bytes_ for number, bytes_ in _fields(file, path.stat().st_size) if number == METADATA_FIELD]
        return dict(_pair(entry) for entry in entries)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, EOFError) as error:
        raise InputError(f"{path}: not an ONNX file: {error}", "Export it again, or give another file") from error


def _pair(entry: bytes) -> tuple[str, str]:
    import io

    values = {number: bytes_.decode() for number, bytes_ in _fields(io.BytesIO(entry), len(entry), keep_all=True)}
    return values.get(KEY_FIELD, ""), values.get(VALUE_FIELD, "")


def _fields(file: BinaryIO, size: int, *, keep_all: bool = False) -> Iterator[tuple[int, bytes]]:
    """(field number, bytes) of every length-delimited field; the bytes are empty if the field is not wanted."""
    for _ in range(MAX_FIELDS):
        if file.tell() == size:
            return
        number, kind = divmod(_varint(file), 8)
        if kind == BYTES:
            length = _varint(file)
            if length > size - file.tell():
                raise EOFError("it ends inside a field")
            wanted = keep_all or number == METADATA_FIELD
            if wanted and length > MAX_ENTRY_BYTES:
                raise ValueError(f"a metadata entry has {length} bytes")
            yield number, file.read(length) if wanted else b""
            file.seek(0 if wanted else length, 1)
        elif kind in (FIXED64, FIXED32):
            file.seek(8 if kind == FIXED64 else 4, 1)
        elif kind == VARINT:
            _varint(file)
        else:
            raise ValueError(f"field {number} is of unknown kind {kind}")
    raise ValueError(f"it has more than {MAX_FIELDS} fields")


def _varint(file: BinaryIO) -> int:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError("it ends inside a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value
    raise ValueError("a number has more than ten bytes")
