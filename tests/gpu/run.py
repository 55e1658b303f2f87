"""All that a GPU is needed for, in two calls: `bash tests/gpu/run.sh measure`, then `bash tests/gpu/run.sh train`.

needs    the packages that must be brought to the machine; needs no GPU
measure  correctness: tests and compute-sanitizer, all at once, while the benchmark's rivals are compiled; then alone on
         the GPU: bytes of memory that each kernel moves, the benchmark, a distillation step. In DIR: summary.json,
         traffic.json, bench.json, step.json
train    `edgestill study` of bccd.yaml with ten trainings at a time until the time is up. In DIR: study.json, .md, .png

Everything that was printed is in DIR/run.log; no more than 10 000 characters of it are shown. What fails does not stop
the rest. Exit status 0 only where every check of correctness that could run has passed, or the study is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent.parent
SECONDS = {"measure": 350, "train": 400}
SHOWN = 10_000
"""Characters that are printed at most."""
RESERVED = 1500
"""Characters of `SHOWN` that are kept for lines between the parts and for the verdict."""
WIDTH = 150
"""Characters of a line that are printed."""
LEAST_S = 15
GRACE_S = 5
"""Seconds that a part has to end when it is asked to."""
TIMED_OUT, NOT_FOUND, FOUND_SOMETHING = 124, 127, 9
KERNELS = "tests/gpu/test_on_gpu.py"
COMPILED = "graphs_and_compiled"
"""A test that takes as long as all those of a loss."""
REST = "rest"
"""Tests of no single loss."""
PYTHON = sys.executable
EDGESTILL = (PYTHON, "-c", "from compress.cli import main; main()")
STUDY = ("study.json", "study.md", "study.png")


class Part(NamedTuple):
    """One program."""

    name: str
    command: Sequence[str]
    """"{seconds}" in it is the time that it has between start and end."""
    most_s: int
    least_s: int = 0
    """Seconds that earlier parts leave it."""
    spare_s: int = 15
    """Seconds of its time for its start and end."""
    shown: int = 300
    """Characters of its output that are printed, from the end."""
    lines: str = ""
    """Pattern of the lines that are printed, the last one among them in any case."""
    is_wrong: Callable[[int], bool] = lambda status: False
    """Whether an exit status says that a kernel is not correct."""
    environment: Mapping[str, str] = {}


class Ended(NamedTuple):
    part: Part
    status: int
    seconds: float
    output: str


# ---- what is there --------------------------------------------------------------------------------------------------


def names_in(file: Path) -> list[str]:
    """The names in a list of packages, in lower case, words behind # left out."""
    return " ".join(line.partition("#")[0] for line in file.read_text(encoding="utf-8").splitlines()).lower().split()


def to_bring() -> list[str]:
    """The packages that a machine with a GPU does not have."""
    there = names_in(HERE / "machine.txt")
    return [name for name in names_in(HERE / "requirements.txt") if name not in there]


def absent() -> list[str]:
    """The packages that are not on this machine."""

    def is_here(name: str) -> bool:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            return False
        return True

    return [name for name in names_in(HERE / "requirements.txt") if not is_here(name)]


def needs() -> int:
    """Say which packages to bring, and how."""
    pinned = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    brought = [line for line in pinned if line.partition("==")[0].lower() in to_bring()]
    print("bring to the machine:", *brought)
    print(
        "here:  pip download --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "
        "--platform manylinux2014_x86_64 -d WHEELS",
        *brought,
    )
    print("there: pip install --no-index --no-deps --target SITE WHEELS/*.whl && export PYTHONPATH=SITE")
    return 0


def why_not() -> str:
    """Why nothing can run here; empty if it can."""
    if names := absent():
        return f"not installed: {', '.join(names)}. Bring them along; see `bash tests/gpu/run.sh needs`"
    import torch

    return "" if torch.cuda.is_available() else f"{PYTHON} has no torch that sees an NVIDIA GPU"


def facts() -> str:
    """Versions, the GPU and its clocks."""
    import torch

    from compress.kernels.bench import clocks

    versions = f"python {sys.version.split()[0]}, torch {torch.__version__}, {torch.cuda.get_device_name()}"
    bindings = ", ".join(f"{name} {metadata.version(name)}" for name in ("cuda-bindings", "nvidia-cuda-nvrtc"))
    state = ", ".join(f"{name} {value}" for name, value in clocks().items())
    return f"{versions}, {bindings}, {os.cpu_count()} cores; {state}"


# ---- parts ----------------------------------------------------------------------------------------------------------


def builds() -> Part:
    return Part("builds", (PYTHON, "tests/gpu/builds.py"), 60, shown=400)


def correctness(losses: Sequence[str], kernels: Sequence[str]) -> list[Part]:
    """A process for each loss, since after a fault a process can do no more, and one for each kind of sanitizer. Beside
    them the benchmark's rivals are compiled, since these processes leave cores idle.

    Only launches whose kernel has one of the names `kernels` in its own are sanitized: those of torch take minutes.
    """
    apart = [*losses, COMPILED]
    return [
        *(tests(name, KERNELS, name) for name in apart),
        tests(REST, KERNELS, f"not ({' or '.join(apart)})"),
        tests("loading", "tests/gpu/test_loading.py", ""),
        Part("rivals", (PYTHON, "tests/gpu/rivals.py"), 150),
        sanitizer("memcheck", kernels, "--report-api-errors", "no"),  # asking for a newer driver's function is no fault
        sanitizer("racecheck", kernels),
    ]


def tests(name: str, file: str, chosen: str) -> Part:
    pytest = (PYTHON, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "ignore")  # torch warns of its own settings
    return Part(
        f"tests: {name}", (*pytest, file, "-k", chosen), 150, shown=400,
        lines="^(FAILED|ERROR|largest)", is_wrong=bool,
        environment={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"},
    )  # fmt: skip


def sanitizer(tool: str, kernels: Iterable[str], *options: str) -> Part:
    only = [word for name in kernels for word in ("--kernel-name", f"kns={name}")]
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND_SOMETHING), *options, *only)
    return Part(
        tool, (*command, PYTHON, "tests/gpu/small_calls.py"), 150, is_wrong=lambda status: status == FOUND_SOMETHING,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )  # fmt: skip


def timings(out: Path) -> list[Part]:
    """The measurements, which need the GPU to themselves."""
    bench = (PYTHON, "-m", "compress.kernels.bench", "--out", str(out / "bench.json"), "--seconds", "{seconds}")
    step = (PYTHON, "tests/gpu/step.py", "--out", str(out / "step.json"), "--seconds", "{seconds}")
    return [
        Part("traffic", (PYTHON, "tests/gpu/traffic.py", str(out / "traffic.json")), 45, least_s=30, shown=800),
        Part("bench", bench, 150, least_s=90, shown=2800),
        Part("step", step, 50, least_s=40, shown=500),
    ]


def study(data: Path, weights: Path, jobs: int, folder: Path) -> Part:
    changes = (f"data={data.resolve()}", f"teacher.weights={weights.resolve()}", f"study.jobs={jobs}")
    sets = [word for change in changes for word in ("--set", change)]
    command = (*EDGESTILL, "study", str(HERE / "bccd.yaml"), *sets, "--out", str(folder), "--time-limit", "{seconds}")
    return Part("study", command, 3600, spare_s=45, shown=6000)


# ---- running --------------------------------------------------------------------------------------------------------


class Console:
    """Shows as much as a short reply holds, and writes everything into the log."""

    def __init__(self, log: Path) -> None:
        self._log, self._left = log, SHOWN

    def say(self, text: str, *, shown: str | None = None) -> None:
        """Log `text`; print `shown` where it is given."""
        with self._log.open("a", encoding="utf-8") as log:
            log.write(text + "\n")
        printed = (text if shown is None else shown)[: self._left - 1]
        self._left -= len(printed) + 1
        print(printed, flush=True)

    def tell(self, ended: Ended) -> None:
        """Its whole output into the log, the end of what a person reads on the screen."""
        head = f"== {ended.part.name}: status {ended.status}, {ended.seconds:.0f} s"
        room = min(ended.part.shown, self._left - RESERVED)
        self.say(f"{head}\n{ended.output}", shown=f"{head}\n{excerpt(ended, room)}".rstrip())


def excerpt(ended: Ended, room: int) -> str:
    """The last whole lines of the output, of those that its part shows, in `room` characters."""
    lines = ended.output.strip().splitlines()
    *others, last = lines or [""]
    chosen = [*(line for line in others if re.search(ended.part.lines, line)), last]
    shown: list[str] = []
    for line in reversed(chosen):
        cut = line[:WIDTH]
        room -= len(cut) + 1
        if room < 0:
            break
        shown.insert(0, cut)
    return "\n".join(shown)


def run_part(part: Part, limit_s: int, environment: Mapping[str, str]) -> Ended:
    """Run one program for at most `limit_s` seconds, with all that it starts."""
    started = time.monotonic()
    command = [
        word.format(seconds=max(1, limit_s - part.spare_s)) if word == "{seconds}" else word for word in part.command
    ]
    with tempfile.TemporaryFile() as output:
        try:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, env={**environment, **part.environment},
                cwd=REPOSITORY, start_new_session=True,
            )  # fmt: skip
        except FileNotFoundError:
            return Ended(part, NOT_FOUND, 0.0, f"{command[0]} is not here")
        status = wait_for(process, limit_s)
        output.seek(0)
        return Ended(part, status, time.monotonic() - started, output.read().decode(errors="replace"))


def wait_for(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """The exit status; TIMED_OUT when the process and all that it started had to be ended."""
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_S)
    with suppress(ProcessLookupError):  # it and its children have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return TIMED_OUT


def limit(part: Part, left_s: float, later: Iterable[Part]) -> int:
    """Seconds that a part may take, when those after it get their least."""
    return max(LEAST_S, min(part.most_s, int(left_s) - sum(other.least_s for other in later)))


def measure(out: Path, seconds: int, console: Console, environment: Mapping[str, str]) -> int:
    """Returns 0 if no kernel was found wrong."""
    from compress.kernels.losses import FUSED

    until = time.monotonic() + seconds
    alone = timings(out)

    def run(part: Part, later: Sequence[Part]) -> Ended:
        return run_part(part, limit(part, until - time.monotonic(), later), environment)

    compiled = run(builds(), alone)
    console.tell(compiled)
    kernels = compiled.output.strip().splitlines()[-1].split() if compiled.status == 0 else []
    together = correctness([*FUSED], kernels)
    with ThreadPoolExecutor(len(together)) as pool:
        ended = list(pool.map(lambda part: run(part, alone), together))
    for one in ended:
        console.tell(one)
    for place, part in enumerate(alone):
        ended.append(run(part, alone[place + 1 :]))
        console.tell(ended[-1])
    return verdict(out, [compiled, *ended], console)


def verdict(out: Path, ended: Sequence[Ended], console: Console) -> int:
    """Say what is wrong and what was not done, and write summary.json."""
    from runtime import machine

    wrong = [one for one in ended if one.part.is_wrong(one.status)]
    undone = [one for one in ended if one.status and one not in wrong]
    parts = [{"part": one.part.name, "status": one.status, "seconds": round(one.seconds, 1)} for one in ended]
    document = {"correct": not wrong, "parts": parts, "machine": machine.facts()}
    (out / "summary.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    for words, some in (("FAILED", wrong), ("not done", undone)):
        if some:
            console.say(f"{words}: " + ", ".join(f"{one.part.name} (status {one.status})" for one in some))
    if wrong:
        console.say("until that is mended, train with EDGESTILL_KERNELS=off")
    return 1 if wrong else 0


def train(study: Part, folder: Path, out: Path, seconds: int, console: Console, environment: Mapping[str, str]) -> int:
    """Returns the study's exit status. A second call on the same machine goes on with what the first one began."""
    ended = run_part(study, seconds, environment)
    console.tell(ended)
    for name in STUDY:
        if (folder / name).is_file():
            shutil.copy(folder / name, out)
    return ended.status


def environment_of_parts(cache: str) -> dict[str, str]:
    """For every part; each source is compiled once for all of them."""
    paths = [str(REPOSITORY), str(REPOSITORY / "tests/compress/kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        "EDGESTILL_CACHE": cache,
        "OMP_NUM_THREADS": "1",
        "OPENCV_FOR_THREADS_NUM": "1",
        **os.environ,
        "PATH": f"{os.environ['PATH']}:/usr/local/cuda/bin",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests/gpu/run.sh", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("needs", help="the packages that must be brought along")
    for name in SECONDS:
        one = commands.add_parser(name)
        one.add_argument("--seconds", type=int, default=SECONDS[name], help="default: %(default)s")
        one.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or "benchmarks/results"), metavar="DIR")
        if name == "train":
            one.add_argument("data", type=Path, help="BCCD's data.yaml")
            one.add_argument("weights", type=Path, help="yolov5n.pt")
            one.add_argument("--jobs", type=int, default=10, help="trainings at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.command == "needs":
        return needs()
    sys.path.insert(0, str(REPOSITORY))
    if why := why_not():
        print(f"error: {why}", file=sys.stderr)
        return 1
    started = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(options.out / "run.log")
    console.say(facts())
    environment = environment_of_parts(str(Path(tempfile.gettempdir()) / "edgestill-gpu-cache"))
    if options.command == "train":
        folder = Path(tempfile.gettempdir()) / "edgestill-gpu-study"
        part = study(options.data, options.weights, options.jobs, folder)
        code = train(part, folder, options.out, options.seconds, console, environment)
    else:
        environment.pop("EDGESTILL_KERNELS", None)
        code = measure(options.out, options.seconds, console, environment)
    console.say(f"{time.monotonic() - started:.0f} s in all")
    return code


if __name__ == "__main__":
    sys.exit(main())
