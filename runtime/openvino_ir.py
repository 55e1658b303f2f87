"""The metadata of an OpenVINO IR file (.xml), read without OpenVINO.

`ovc model.onnx` keeps the metadata of the ONNX file, its card among them, as `<rt_info><framework>` below the root.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from runtime.errors import InputError

MAX_BYTES = 256 << 20


def read_metadata(path: str | Path) -> dict[str, str]:
    """Key -> value of the file's metadata. Raises InputError when it is missing or no IR file."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(text) > MAX_BYTES or b"<!DOCTYPE" in text:  # entities, which only a DOCTYPE declares, can grow without limit
        raise _no_ir(path, f"it has more than {MAX_BYTES} bytes, or a DOCTYPE")
    try:
        root = ElementTree.fromstring(text)  # noqa: S314
    except ElementTree.ParseError as error:
        raise _no_ir(path, str(error)) from error
    if root.tag != "net":
        raise _no_ir(path, f"its root is <{root.tag[:40]}>, expected <net>")
    return {entry.tag: entry.get("value", "") for entry in root.iterfind("rt_info/framework/*")}


def _no_ir(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: not an OpenVINO IR file: {reason}", "Convert it again, or give another file")
