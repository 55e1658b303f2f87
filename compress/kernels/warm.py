"""Compile the kernels ahead of their first use, on all cores: `python -m compress.kernels.warm [ARCHITECTURE]`.

Without it, the first batch of a training waits a second or two for each source.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from compress.kernels.toolchain import ARCHITECTURES, Source, architecture_for, code_for, kernel_names
from runtime.errors import UnavailableError
from runtime.machine import compute_threads
from runtime.terminal import exit_code_of, print_line


def warm(sources: Iterable[Source], architecture: str) -> list[str]:
    """Compile what the cache lacks, as many sources at a time as there are cores; NVRTC's threads share no lock.

    Returns the names of all kernels. Raises the errors of `toolchain.code_for`.
    """
    with ThreadPoolExecutor(compute_threads()) as pool:
        codes = pool.map(lambda source: code_for(source, architecture), sources)
        return sorted({name for code in codes for name in kernel_names(code)})


def architecture_here() -> str:
    """The `architecture_for` the first GPU. Raises UnavailableError when torch sees none."""
    import torch

    if not torch.cuda.is_available():
        raise UnavailableError("torch sees no NVIDIA GPU here", f"Name an architecture, such as {ARCHITECTURES[-1]}")
    return architecture_for(torch.cuda.get_device_capability(0))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compress.kernels.warm", description=__doc__.splitlines()[0])
    parser.add_argument("architecture", nargs="?", choices=ARCHITECTURES, help="default: that of the GPU here")
    asked = parser.parse_args(arguments)
    return exit_code_of(lambda: run(asked.architecture))


def run(architecture: str | None) -> None:
    from compress.kernels.losses import SOURCES

    started, built_for = time.monotonic(), architecture or architecture_here()
    kernels = warm(SOURCES, built_for)
    print_line(f"{len(kernels)} kernels for {built_for} in {time.monotonic() - started:.1f} s")


if __name__ == "__main__":
    sys.exit(main())
