"""Run work in a fresh interpreter: work that may crash, leak or never end, or that goes on beside the caller's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import NoReturn

HOME = Path(__file__).resolve().parent.parent
"""The folder that holds this package."""


def run_child(
    statement: str, *, data: bytes = b"", folder: Path | None = None, timeout_s: float | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run one Python statement that finds this package and its libraries, with `data` on its standard input.

    It never imports from the folder that the user happens to be in. Raises subprocess.TimeoutExpired.
    """
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", statement],
        input=data,
        capture_output=True,
        env=_environment(),
        cwd=folder or HOME,
        timeout=timeout_s,
        check=False,
    )


def start_child(statement: str, *, pass_fds: Collection[int] = ()) -> subprocess.Popen[bytes]:
    """Start one Python statement as `run_child` does, and let it go on beside this process.

    It has the file descriptors `pass_fds` under their numbers, and one thread in each numerical library. Only its
    standard error is seen. A Ctrl-C at the terminal does not reach it: this process decides when it ends.
    """
    return subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", statement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env=_environment() | {"OMP_NUM_THREADS": "1"},
        cwd=HOME,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )


def end_when_closed(pipe_fd: int, grace_s: float) -> None:
    """End this process, the child, when nobody has a pipe's other end open any more: with the process that started it,
    by whatever end. Returns at once.

    SIGTERM ends it; SIGKILL, where it still runs `grace_s` seconds later. `pipe_fd` is the end that is read.
    """

    def watch() -> None:
        while os.read(pipe_fd, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(grace_s)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def how_it_ended(status: int) -> str:
    """The status of a process that has ended, as `Popen.returncode` has it, in words."""
    return f"signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"exit code {status}"


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(_import_path())}


def _import_path() -> list[str]:
    own = str(HOME)
    return [own, *(entry for entry in sys.path if entry and Path(entry).is_dir() and entry != own)]


def limit(memory_bytes: int, cpu_seconds: int) -> None:
    """Limit this process, the child: allocations beyond the memory fail, and the system ends it after the CPU time."""
    try:
        import resource
    except ImportError:  # Windows: the child still keeps a crash away
        return
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def refusal(statement: str, data: bytes, cpu_seconds: float) -> str:
    """Why a child that tries to load `data` refuses it or ends on it, in one line; empty where it accepts.

    The child limits itself to `cpu_seconds`, and says its answer by `answer`.
    """
    try:
        done = run_child(statement, data=data, timeout_s=2 * cpu_seconds)
    except subprocess.TimeoutExpired:
        return f"loading it takes more than {2 * cpu_seconds} s"
    if done.returncode < 0:
        return f"loading it ends the reader (signal {-done.returncode}: a crash, or more time than allowed)"
    return last_line(done) if done.returncode else ""


def answer(reason: str) -> NoReturn:
    """End this process, the child: it refuses for a reason, or accepts without one."""
    if reason:
        print(reason, file=sys.stderr)
    sys.exit(1 if reason else 0)


def last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    """The last line of the child's standard error."""
    lines = done.stderr.decode(errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "it printed nothing"
