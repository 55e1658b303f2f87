"""Count the loads that a thread has under way, in a kernel's machine code (SASS); the compiler does not report them.

A kernel that moves memory is as fast as the bytes it has under way allow. The compiler decides about them: it moves a
load down to its first use where that saves registers. So they are counted in the disassembly.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

from runtime.errors import EdgestillError, UnavailableError

REMEDY = "pip install nvidia-cuda-nvdisasm"
_KERNEL = re.compile(r"^\.text\.(\w+):$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L_x_\d+):")
_JUMP = re.compile(r"\bBRA\b.*`\((\.L_x_\d+)\)")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?P<guard>@\S+ )?(?P<name>\S+)\s*(?P<operands>.*?);")
_REGISTER = re.compile(r"\bR(\d+)\b")
_VECTOR_REGISTERS = 4
"""Registers of 16 bytes."""
_LEAVES = ("BRA", "EXIT", "RET")
"""Instructions after which, if they have no condition, the next one is reached from elsewhere only."""
_COPIES_ARRIVE = "DEPBAR"
"""Waits for asynchronous copies."""


@lru_cache(maxsize=1)
def disassembler() -> str:
    """Path of nvdisasm: in PATH, in NVIDIA's package, or in a CUDA toolkit. Raises UnavailableError without one."""
    found = shutil.which("nvdisasm")
    if found is None:
        try:
            from cuda.pathfinder import find_nvidia_binary_utility
        except ImportError as error:
            raise UnavailableError("NVIDIA's disassembler nvdisasm cannot be looked for", REMEDY) from error
        found = find_nvidia_binary_utility("nvdisasm")
    if found is None:
        raise UnavailableError("NVIDIA's disassembler nvdisasm is not here", REMEDY)
    return found


def disassemble(code: bytes) -> str:
    """The instructions of a cubin. Raises EdgestillError with the disassembler's reason if it refuses the file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        done = subprocess.run([disassembler(), "-c", str(path)], capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise EdgestillError(f"nvdisasm: {done.stderr.strip() or done.returncode}")
    return done.stdout


def loads_under_way(sass: str) -> dict[str, int]:
    """By kernel, the most 16-byte reads of global memory in a loop that a thread starts before it needs the first.

    Followed in the order of the code: a load ends where its registers are named again, an asynchronous copy to shared
    memory at the next wait for copies, and all of them at a jump without a condition.
    """
    _, *parts = _KERNEL.split(sass)
    return {name: _loads_of(code.splitlines()) for name, code in zip(parts[::2], parts[1::2], strict=True)}


def _loads_of(lines: list[str]) -> int:
    """`loads_under_way` of one kernel."""
    inside = _lines_in_loops(lines)
    most, copies = 0, 0
    loads: dict[int, range] = {}
    for index, line in enumerate(lines):
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        name, operands = instruction["name"], instruction["operands"]
        named = [int(register) for register in _REGISTER.findall(operands)]
        loads = {first: held for first, held in loads.items() if not any(register in held for register in named)}
        if name.startswith("LDGSTS") and ".128" in name:
            copies += index in inside
        elif name.startswith("LDG") and ".128" in name and index in inside:
            loads[named[0]] = range(named[0], named[0] + _VECTOR_REGISTERS)
        elif name.startswith(_COPIES_ARRIVE):
            copies = 0
        elif name.split(".")[0] in _LEAVES and not instruction["guard"]:
            loads, copies = {}, 0
        most = max(most, len(loads) + copies)
    return most


def _lines_in_loops(lines: list[str]) -> set[int]:
    """Places of the lines between a label and a jump back to it."""
    labels = {label[1]: index for index, line in enumerate(lines) if (label := _LABEL.match(line))}
    found: set[int] = set()
    for index, line in enumerate(lines):
        if (jump := _JUMP.search(line)) and labels.get(jump[1], index) < index:
            found.update(range(labels[jump[1]], index))
    return found
