"""Compile CUDA C++ sources by NVRTC: no compiler, no torch headers, no GPU and no network are needed.

Code is compiled once for each source, architecture, set of defines and compiler version, and kept on disk; then it is
read from the file. The cache's folder is `EDGESTILL_CACHE`, else the user's cache folder.
"""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from runtime.errors import EdgestillError, UnavailableError, one_line
from runtime.files import atomic_write

FOLDER = Path(__file__).parent
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
"""The tests compile for these: Turing to Blackwell, Jetson Orin (sm_87) included."""
OPTIONS = ("--std=c++17", "--ptxas-options=-v")
REMEDY = "pip install 'edgestill[kernels]'"
_DIGEST_BYTES = 32
_KERNEL = re.compile(rb"(?:\0\.text\.|\.entry )(\w+)[\0(]")
"""A section of a cubin, an entry of PTX."""
_REPORTED = re.compile(r"(\d+) (registers|bytes spill stores|bytes smem)")


class Source(NamedTuple):
    """A CUDA source, and the constants of its launcher, which it gets as defines."""

    folder: str
    """The folder of this package that holds its `kernel.cu`."""
    defines: tuple[str, ...] = ()
    """As "NAME=value"."""

    @property
    def path(self) -> Path:
        return FOLDER / self.folder / "kernel.cu"

    def replaced(self, **constants: float) -> Source:
        """The same source with other constants; a constant that it does not have yet is added."""
        values = dict(define.split("=", 1) for define in self.defines)
        values |= {name: str(value) for name, value in constants.items()}
        return Source(self.folder, tuple(f"{name}={value}" for name, value in values.items()))


def architecture_for(capability: tuple[int, int]) -> str:
    """The target to compile for: "sm_90" for a GPU of compute capability (9, 0). For one too new for the compiler it is
    the newest that it knows, as "compute_120": PTX, of which the GPU's driver makes machine code.

    Raises UnavailableError when NVRTC is not installed.
    """
    own, known = 10 * capability[0] + capability[1], _checked(load_nvrtc(), "nvrtcGetSupportedArchs")
    older = [number for number in known if number < own]
    return f"sm_{own}" if own in known or not older else f"compute_{max(older)}"


def code_for(source: Source, architecture: str) -> bytes:
    """The code of `source` for `architecture`, as `architecture_for` gives it, from the cache or compiled now.

    Raises UnavailableError when NVRTC or the CUDA headers are not installed, and EdgestillError with the compiler's
    first error.
    """
    path = cache_folder() / f"{source.folder}-{architecture}-{_key(source, architecture)[:24]}.bin"
    return _read(path) or _keep(path, compile_for(source, architecture).code)


def kernel_names(code: bytes) -> list[str]:
    """The kernels of a cubin or of PTX."""
    return sorted({name.decode() for name in _KERNEL.findall(code)})


class Resources(NamedTuple):
    """The resources of a multiprocessor that one kernel takes."""

    registers: int
    """Per thread."""
    spill_bytes: int
    """Bytes per thread that are spilled to local memory."""
    shared_bytes: int
    """Static, per block."""


class Compiled(NamedTuple):
    """Machine code of a source, with the compiler's log."""

    code: bytes
    """A cubin; PTX for an architecture as "compute_120"."""
    log: str

    @property
    def resources(self) -> dict[str, Resources]:
        """The resources of each kernel of a cubin, from the assembler's log, which has a paragraph per kernel."""
        found = {}
        for paragraph in self.log.split("Compiling entry function ")[1:]:
            numbers = {name: int(value) for value, name in _REPORTED.findall(paragraph)}
            found[paragraph.split("'")[1]] = Resources(
                numbers["registers"], numbers.get("bytes spill stores", 0), numbers.get("bytes smem", 0)
            )
        return found


def compile_for(source: Source, architecture: str) -> Compiled:
    """As `code_for`, compiled now."""
    nvrtc = load_nvrtc()
    options = [*OPTIONS, f"--gpu-architecture={architecture}"]
    options += [f"--include-path={folder}" for folder in (FOLDER, *header_folders())]
    options += [f"--define-macro={define}" for define in source.defines]
    name = f"{source.folder}/kernel.cu"
    program = _checked(nvrtc, "nvrtcCreateProgram", source.path.read_bytes(), name.encode(), 0, [], [])
    try:
        encoded = [option.encode() for option in options]
        (code,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if int(code) != 0:
            raise EdgestillError(f"{name} does not compile for {architecture}: {_first_error(_log(nvrtc, program))}")
        kind = "CUBIN" if architecture.startswith("sm_") else "PTX"
        return Compiled(_output(nvrtc, program, kind), _log(nvrtc, program))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def compiler_version() -> str:
    """As "13.0". Raises UnavailableError when NVRTC is not installed."""
    return ".".join(map(str, _checked(load_nvrtc(), "nvrtcVersion")))


@lru_cache(maxsize=1)
def load_nvrtc() -> Any:
    """The bindings to NVRTC, whose library was found. Raises UnavailableError when one of them is missing."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # opens the library
    except (ImportError, RuntimeError, OSError) as error:
        raise UnavailableError(f"the CUDA compiler NVRTC is not here: {one_line(error)}", REMEDY) from error
    return nvrtc


@lru_cache(maxsize=1)
def header_folders() -> tuple[str, ...]:
    """The folder of cuda_fp16.h: NVIDIA's package, else an installed toolkit. Raises UnavailableError without both."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory
    except ImportError as error:  # cuda-bindings 13.0 is content with one that is too old
        raise UnavailableError(f"CUDA's headers cannot be looked for: {one_line(error)}", REMEDY) from error
    found = find_nvidia_header_directory("cudart") or f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/include"
    if not (Path(found) / "cuda_fp16.h").is_file():
        raise UnavailableError("CUDA's headers (cuda_fp16.h) are not here", REMEDY)
    return (found,)


def cache_folder() -> Path:
    if named := os.environ.get("EDGESTILL_CACHE"):
        return Path(named) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgestill" / "kernels"


def _key(source: Source, architecture: str) -> str:
    """A digest of everything that the machine code depends on."""
    digest = hashlib.sha256()
    for path in [source.path, *sorted(FOLDER.glob("*.cuh"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(repr((architecture, source, OPTIONS, compiler_version(), header_folders())).encode())
    return digest.hexdigest()


def _read(path: Path) -> bytes | None:
    """Code of the cache; None if there is none, or if its digest is wrong."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    digest, code = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> bytes:
    """`code`, after writing it to the cache if the folder can be written."""
    with suppress(EdgestillError), atomic_write(path) as temporary:  # a read-only home costs time at each start
        temporary.write_bytes(hashlib.sha256(code).digest() + code)
    return code


def _checked(nvrtc: Any, name: str, *arguments: Any) -> Any:
    code, *values = getattr(nvrtc, name)(*arguments)
    if int(code) != 0:
        raise EdgestillError(f"NVRTC {name}: {nvrtc.nvrtcGetErrorString(code)[1].decode()}")
    return values[0] if len(values) == 1 else values


def _output(nvrtc: Any, program: Any, what: str) -> bytes:
    """The program's CUBIN, PTX or ProgramLog."""
    # NVRTC writes into what it is given: b" " of one byte is an object of the interpreter, which all of Python shares
    buffer = bytearray(_checked(nvrtc, f"nvrtcGet{what}Size", program))
    _checked(nvrtc, f"nvrtcGet{what}", program, buffer)
    return bytes(buffer)


def _log(nvrtc: Any, program: Any) -> str:
    return _output(nvrtc, program, "ProgramLog").decode(errors="replace").strip("\0 \n")


def _first_error(log: str) -> str:
    lines = [line for line in log.splitlines() if "error" in line]
    return (lines or log.splitlines() or ["the compiler gave no reason"])[0]


def resource_table() -> str:
    """Registers per thread of every kernel on every architecture, with the bytes that it spills if it does."""
    from compress.kernels.losses import SOURCES  # imports torch, which nothing else here needs

    found: dict[str, dict[str, Resources]] = {architecture: {} for architecture in ARCHITECTURES}
    for architecture, source in product(ARCHITECTURES, SOURCES):
        found[architecture] |= compile_for(source, architecture).resources
    names = sorted(set().union(*found.values()))
    lines = [f"{'registers':24}" + "".join(f"{architecture:>8}" for architecture in ARCHITECTURES)]
    lines += [f"{name:24}" + "".join(_cell(found[a].get(name)) for a in ARCHITECTURES) for name in names]
    return "\n".join(lines)


def _cell(resources: Resources | None) -> str:
    if resources is None:
        return f"{'-':>8}"
    spills = f"+{resources.spill_bytes}" if resources.spill_bytes else ""
    return f"{resources.registers}{spills}".rjust(8)


def flow_table() -> str:
    """Blocks of a multiprocessor and loads under way of every kernel on sm_90, and the times that follow from them."""
    from compress.kernels import model  # imports torch, as above

    return model.kernels_table(model.found_kernels())


if __name__ == "__main__":
    print(resource_table(), end="\n\n")
    try:
        print(flow_table())
    except UnavailableError as error:
        print(f"loads under way are not counted: {error}")
