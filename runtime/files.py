"""Write files so that they are complete or absent, and compute their digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.errors import EdgestillError, InputError, one_line

CHUNK_BYTES = 1 << 20
MAX_JSON_BYTES = 2 << 30
REMEDIES = {
    errno.ENOSPC: "Free some space, or write to another disk",
    errno.EDQUOT: "The quota is used up: free some space, or write to another disk",
    errno.EACCES: "Check who may write there, or choose another folder",
    errno.EPERM: "Check who may write there, or choose another folder",
    errno.EROFS: "The file system is read-only: choose another folder",
    errno.ENOTDIR: "A part of the path is a file: choose another folder",
    errno.EEXIST: "A part of the path is a file: choose another folder",
    errno.EISDIR: "There is a folder of that name: choose another name",
    errno.ENAMETOOLONG: "Choose a shorter name",
}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, with its suffix; it becomes `path` when the block ends without an error.

    The parent folder is made. Readers see the old file or the new one, never a part; a failed block leaves nothing
    behind. Raises EdgestillError when the file cannot be written, with the remedy: of a folder before the block begins.
    """
    path = Path(path)
    if path.is_dir():
        raise unwritable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    temporary = path.with_name(f".{uuid.uuid4().hex}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        if _is_about(error, path, temporary):
            raise unwritable(path, error) from error
        raise
    finally:
        _remove(temporary)


def _is_about(error: OSError, path: Path, temporary: Path) -> bool:
    """True for an error of the file itself or a folder above it. The error of a full disk names no file."""
    if error.filename is None:
        return error.errno in REMEDIES
    return Path(error.filename) == temporary or path.is_relative_to(error.filename)


def _sync(path: Path) -> None:
    """Write a file or folder to the disk itself: otherwise a power cut can leave an empty file under the new name."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # the error that is already being raised says more


def unwritable(path: Path, error: OSError) -> EdgestillError:
    """The error of a file that could not be written, with the remedy."""
    return EdgestillError(f"{path}: cannot be written: {error.strerror or error}", REMEDIES.get(error.errno or 0, ""))


def is_utf8(path: Path) -> bool:
    """False for a name that C++ libraries with UTF-8 names, such as OpenCV and ONNX Runtime, cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


@contextmanager
def utf8_name(path: Path) -> Iterator[str]:
    """A name by which such libraries can open the file, there or not yet, within the block: its own, or that of a link.

    A file stays open when the link is gone.
    """
    if is_utf8(path):
        yield str(path)
        return
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        link = Path(folder, f"link{os.fsencode(path.suffix).decode(errors='ignore')}")
        link.symlink_to(path.absolute())
        yield str(link)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes, which are read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | Path, hint: str = "") -> Any:
    """A JSON document that may come from anyone. Raises InputError when it is missing, too large, or not JSON."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise InputError(f"{path} has {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}", hint)
        return json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {one_line(error)}", hint) from error


def write_text(path: str | Path, text: str) -> None:
    """Publish `text` as UTF-8, whatever the machine's own encoding is. Names that are not UTF-8 become escapes."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")


def write_json(path: str | Path, obj: Any) -> None:
    """Publish `obj` as indented JSON with a final newline. Paths become strings; NaN is refused (JSON has none)."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
