"""Builds a .cu with the host shim and launches its kernels on the CPU.

    library = build(Path("compress/kernels/mse/kernel.cu"), ["T=__half"])
    counters = library.launch("mse", grid=4, block=256, args=bytes_of_the_struct, seed=1)

Pointers inside ``args`` are plain addresses (``tensor.data_ptr()``, ``array.ctypes.data``). ``cluster=grid`` makes all
blocks resident at once, so that they interleave; otherwise blocks (clusters) run one after another. The
fixture ``shim`` gives this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parents[3]
KERNELS = REPOSITORY / "compress" / "kernels"

# A GPU has no type-based aliasing (float memory read as uint4) and the host must not contract a*b+c on some CPUs only.
# Hidden, because an exported kernel named like a function of libc would be that function. Vague-linkage statics of two
# libraries must stay apart: they differ in size when the defines differ.
FLAGS = ("-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DEDGESTILL_HOST")
FLAGS += ("-fno-strict-aliasing", "-ffp-contract=off")
GNU_FLAGS = ("-fno-gnu-unique", "-Wno-unknown-pragmas")
SANITIZE_FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")
KEEP_SECONDS = 7 * 24 * 3600
SEEDS = range(6)  # every schedule, with lanes forward and backward


class ShimError(RuntimeError):
    """A kernel broke a rule of CUDA (deadlock, divergent barrier, bad mask ...), or its launch did."""


@dataclass(frozen=True)
class Counters:
    """Counts of one launch. Bytes are those that the load and store wrappers report; the rest is per warp or block."""

    read: int
    written: int
    barriers: int
    shuffles: int
    atomics: int
    cluster_barriers: int
    matrix: int
    switches: int


class _Options(ctypes.Structure):
    _fields_ = (("seed", ctypes.c_uint), ("cluster", ctypes.c_uint))


@dataclass
class Library:
    """The kernels of one built .cu."""

    path: Path
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # the shim runs one launch at a time

    @functools.cached_property
    def _dll(self) -> ctypes.CDLL:
        dll = ctypes.CDLL(str(self.path))
        dll.shim_error.restype = ctypes.c_char_p
        return dll

    def _function(self, name: str) -> Any:
        try:
            return self._dll[name]
        except AttributeError:
            kernel = name.partition("_")[2]
            raise ValueError(f"{self.path.stem} has no kernel {kernel}; register it by SHIM_KERNEL") from None

    def size_of(self, kernel: str) -> int:
        """Bytes of the kernel's argument struct."""
        size = self._function(f"size_{kernel}")
        size.restype = ctypes.c_ulong
        return size()

    def launch(
        self, kernel: str, grid: int, block: int, args: bytes, *, shared: int = 0, cluster: int = 1, seed: int = 0
    ) -> Counters:
        """Run the kernel to its end; raises ShimError when it, or the launch, is wrong."""
        args = bytes(args)
        if len(args) != self.size_of(kernel):
            raise ValueError(f"{kernel} takes {self.size_of(kernel)} bytes of arguments, got {len(args)}")
        run = self._function(f"host_{kernel}")
        run.argtypes = (ctypes.POINTER(_Options), ctypes.c_uint, ctypes.c_uint, ctypes.c_uint, ctypes.c_char_p)
        with self._lock:
            if run(_Options(seed, cluster), grid, block, shared, args):
                raise ShimError(f"{kernel}, seed {seed}: {self._dll.shim_error().decode(errors='replace')}")
            values = (ctypes.c_ulonglong * 8)()
            self._dll.shim_counters(values)
        return Counters(*values)


def compiler() -> str | None:
    """The C++ compiler, $CXX or g++; None if there is none."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(
    source: Path,
    defines: Iterable[str] = (),
    *,
    optimise: str = "-O2",
    sanitize: bool = False,
    text: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Library:
    """Compile ``source`` for the host; a build is kept and used again as long as nothing it is made of changes.

    ``defines`` are "NAME" or "NAME=value". ``text`` replaces the text of the source, ``headers`` that of headers
    ({"common.cuh": ...}): a mutation test plants its faults so. A sanitized library loads only in ``run_child(...,
    sanitize=True)``.
    """
    source = source.resolve()
    text = source.read_text() if text is None else text
    headers = dict(headers or {})
    flags = [*_flags(optimise, sanitize), *(f"-D{define}" for define in defines)]
    target = _cache() / f"{source.parent.name}-{source.stem}-{_key(source, text, headers, flags)}.so"
    if not target.exists():
        _compile(source, text, headers, flags, target)
    return _library(target)


@functools.cache
def _library(path: Path) -> Library:
    """One object per file: its lock guards the shim's state, of which a file has one."""
    return Library(path)


def run_child(
    code: str, *arguments: str, sanitize: bool = False, timeout_s: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python code, which may import `shim`, in a child: for kernels that crash, and for sanitized libraries."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), str(REPOSITORY)])}
    if sanitize:
        libraries = [_runtime_library(name) for name in ("libasan.so", "libstdc++.so.6")]
        environment |= {
            "LD_PRELOAD": ":".join(library for library in libraries if library),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)


def can_sanitize() -> bool:
    return compiler() is not None and bool(_runtime_library("libasan.so"))


def _flags(optimise: str, sanitize: bool) -> list[str]:
    gnu = () if "clang" in _version() else GNU_FLAGS
    return [*FLAGS, *gnu, optimise, *(SANITIZE_FLAGS if sanitize else ()), f"-I{FOLDER}"]


def _key(source: Path, text: str, headers: Mapping[str, str], flags: Sequence[str]) -> str:
    digest = hashlib.sha256()
    found = {path.name: path.read_text() for path in _headers_of(source)}
    shim = (FOLDER / "shim.h").read_text()
    parts = [_version(), *flags, str(source), text, shim, *map(str, sorted((found | dict(headers)).items()))]
    for part in parts:
        digest.update(f"{len(part)}:{part}".encode())
    return digest.hexdigest()[:24]


def _headers_of(source: Path) -> list[Path]:
    """The kernels' headers, and those beside the source."""
    return sorted({*KERNELS.glob("*.cuh"), *source.parent.glob("*.cuh"), *source.parent.glob("*.h")})


def _compile(source: Path, text: str, headers: Mapping[str, str], flags: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{source.stem}-") as work:
        # A quoted include looks beside its file first, so replaced headers must be beside a copy of the source.
        for path in _headers_of(source):
            (Path(work) / path.name).write_text(headers.get(path.name, path.read_text()))
        (Path(work) / source.name).write_text(f'#line 1 "{source.name}"\n{text}')
        output = Path(work) / target.name
        command = [compiler() or "g++", *flags, "-x", "c++", source.name, "-o", output.name]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ShimError(f"{source.parent.name}/{source.name} does not compile for the host:\n{done.stderr[-6000:]}")
        output.replace(target)


@functools.cache
def _version() -> str:
    return subprocess.run([compiler() or "g++", "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _runtime_library(name: str) -> str:
    """Full path of a library of the compiler; empty if it is absent."""
    command = [compiler() or "g++", f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return path if Path(path).is_absolute() else ""


@functools.cache
def _cache() -> Path:
    """If built libraries are kept, those of a week without use removed."""
    folder = Path(os.environ.get("EDGESTILL_SHIM_CACHE", REPOSITORY / ".pytest_cache" / "d" / "edgestill-shim"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="edgestill-shim-"))
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another process may be removing it too
            if max(path.stat().st_atime, path.stat().st_mtime) < time.time() - KEEP_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder
