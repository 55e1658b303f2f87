"""The two containers of `torch.save`: a zip archive (torch 1.6 on), and a sequence of pickles (before).

In: a path. Out: the object as data (see `pickle_reader`), and tensors read on demand, so that what is not needed (the
optimiser) costs nothing. No code of the file is run, nothing is decompressed, and every stated size is checked.
"""

from __future__ import annotations

import math
import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.models.pickle_reader import PickleError, StorageRef, TensorRef, brief, read_pickle
from runtime.errors import InputError

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e"
LEGACY_PROTOCOL = 1001
MAX_PICKLE_BYTES = 64 << 20
MAX_MEMBERS = 100_000


class TorchFile(NamedTuple):
    """An open file."""

    container: str
    """zip | legacy"""
    root: Any
    """The saved object: plain values, `Stub` and `TensorRef`."""
    raw: Callable[[StorageRef], bytes]
    """The bytes of a storage."""

    def tensor(self, ref: TensorRef) -> Tensor:
        """A copy of the tensor in its own dtype. Raises PickleError when its bytes are missing or damaged."""
        dtype: torch.dtype = getattr(torch, ref.storage.dtype)
        raw = self.raw(ref.storage)
        if len(raw) != ref.storage.elements * dtype.itemsize:
            raise PickleError(
                f"storage {brief(ref.storage.key)} has {len(raw)} bytes for {ref.storage.elements} of {dtype.itemsize}"
            )
        if not math.prod(ref.shape):
            return torch.empty(ref.shape, dtype=dtype)
        used = memoryview(raw)[slice(*(dtype.itemsize * index for index in ref.span))]
        return torch.frombuffer(bytearray(used), dtype=dtype).as_strided(ref.shape, ref.stride).contiguous()


def is_torch_file(head: bytes) -> bool:
    """Whether a file that begins with `head` (16 bytes) is in one of the containers."""
    return head.startswith((ZIP_MAGIC, LEGACY_MAGIC))


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """Open `path`. Raises InputError (one line) when it is not a sound file of `torch.save`, or when the `with` block
    raises a PickleError.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == ZIP_MAGIC:
                with _zip_archive(file) as archive:
                    yield _open_zip(archive, len(data))
            else:
                yield _open_legacy(data)
    except PickleError as error:
        raise InputError(f"{path} cannot be used: {error}", "Give a checkpoint of YOLOv5") from error


@contextmanager
def _zip_archive(file: Any) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except zipfile.BadZipFile as error:
        raise PickleError(f"the archive is truncated or damaged ({brief(str(error))})") from error
    except (NotImplementedError, OSError, RuntimeError, UnicodeDecodeError, struct.error) as error:
        raise PickleError(f"the archive is damaged ({type(error).__name__}: {brief(str(error))})") from error


def _open_zip(archive: zipfile.ZipFile, file_bytes: int) -> TorchFile:
    if any("/code/" in name for name in archive.namelist()):
        raise PickleError("it is a TorchScript program: only checkpoints with weights are read")
    members = _members(archive, file_bytes)
    found = [name for name in members if name.split("/")[-1] == "data.pkl"]
    if len(found) != 1:
        raise PickleError(f"the archive has {len(found)} members data.pkl instead of one: torch.save did not write it")
    top = found[0].removesuffix("data.pkl")
    if f"{top}byteorder" in members and archive.read(f"{top}byteorder") != b"little":
        raise PickleError("its numbers are big-endian")
    if members[found[0]].file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"its pickle has {members[found[0]].file_size} bytes, more than {MAX_PICKLE_BYTES}")

    @lru_cache(maxsize=1)  # for files that keep many tensors in one storage
    def raw(storage: StorageRef) -> bytes:
        name = f"{top}data/{storage.key}"
        if name not in members:
            raise PickleError(f"storage {brief(storage.key)} is missing")
        return archive.read(name)

    return TorchFile("zip", read_pickle(archive.read(found[0])).value, raw)


def _members(archive: zipfile.ZipFile, file_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Members by name. torch stores them uncompressed and without overlap; other archives are refused as unsafe."""
    listed = archive.infolist()
    members = {info.filename: info for info in listed}
    problems = {
        f"{len(listed)} members, more than {MAX_MEMBERS}": len(listed) > MAX_MEMBERS,
        "two members of one name": len(members) != len(listed),
        "compressed members": any(info.compress_type != zipfile.ZIP_STORED for info in listed),
        "encrypted members": any(info.flag_bits & 1 for info in listed),
        "members larger than the file": sum(max(i.file_size, i.compress_size) for i in listed) > file_bytes,
    }
    for problem in (text for text, holds in problems.items() if holds):
        raise PickleError(f"the archive has {problem}: torch.save did not write it")
    return members


def _open_legacy(data: mmap.mmap) -> TorchFile:
    """Magic | protocol | facts of the system | object | storage keys | for each key: int64 count, bytes."""
    at = len(LEGACY_MAGIC)
    if data[:at] != LEGACY_MAGIC:
        raise PickleError("it is no file of torch.save")
    protocol = read_pickle(data, at)
    system = read_pickle(data, protocol.end)
    if protocol.value != LEGACY_PROTOCOL or not isinstance(system.value, dict) or not system.value.get("little_endian"):
        raise PickleError(f"protocol {brief(protocol.value)}, little-endian is expected with {LEGACY_PROTOCOL}")
    saved = read_pickle(data, system.end)
    keys = read_pickle(data, saved.end)
    places = _legacy_places(data, keys.end, keys.value, saved.storages)

    @lru_cache(maxsize=1)
    def raw(storage: StorageRef) -> bytes:
        if storage.key not in places:
            raise PickleError(f"storage {brief(storage.key)} is missing")
        return data[places[storage.key]]

    return TorchFile("legacy", saved.value, raw)


def _legacy_places(data: mmap.mmap, at: int, keys: Any, storages: Any) -> dict[str, slice]:
    """The bytes of each storage, as a slice of the file."""
    places: dict[str, slice] = {}
    for key in keys if isinstance(keys, list) else ():
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or len(data) < at + 8:
            raise PickleError("its list of storages does not suit its contents")
        count = struct.unpack("<q", data[at : at + 8])[0]
        end = at + 8 + count * getattr(torch, storage.dtype).itemsize
        if count != storage.elements or end > len(data):
            raise PickleError(f"it ends before storage {brief(key)} does: the file is truncated")
        places[key] = slice(at + 8, end)
        at = end
    return places
