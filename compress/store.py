"""Keep the results of stages: fingerprint, manifest, atomic publication, skip when nothing changed.

A stage works in `<run>/.work/<stage>-<fingerprint>` and is published by one rename to `<run>/<stage>`. Its manifest
is the last file written, so a folder with a manifest is complete. A killed run finds its work folder again
and the stage may continue in it; a changed setting, input or named machine fact gives another fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.log import Log
from runtime.errors import EdgestillError, UsageError
from runtime.files import sha256, write_json

MANIFEST = "stage.json"
SECONDS = "seconds"
"""Figure of a stage that goes on after a kill: the time that its parts took together."""
PARTS = {
    "version": "the stage itself",
    "config": "settings",
    "inputs": "stages before it:",
    "digests": "files:",
    "facts": "the machine's",
}
"""Part of a stage's identity -> its name in a message, before the keys in it."""
SHOWN = 8
ABSENT = object()
Folders = Mapping[str, Path]
"""Name of a stage -> the folder of its result."""


@dataclass(frozen=True)
class Task:
    """A stage of one run, with everything that its result depends on.

    `run` works in the folder that it is given, writes nowhere else, and returns the figures that the manifest keeps.
    `inputs` are files or folders of earlier stages; `digests` stand for files of the user; `facts` are those facts of
    the machine that change the result.
    """

    name: str
    run: Callable[[Path, Log], Mapping[str, Any]]
    config: Mapping[str, Any]
    inputs: Mapping[str, Path] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    version: int = 1


@dataclass(frozen=True)
class Outcome:
    """`skipped` is true if the result was there already; `seconds` is the time that the work took when it was done.

    Of a stage that was killed and went on they are at least those that its figures count.
    """

    stage: str
    folder: Path
    skipped: bool
    seconds: float
    figures: Mapping[str, Any]
    fingerprint: str


def fingerprint(task: Task) -> str:
    """sha256 over the stage's name, version, settings, input contents and the facts it names."""
    return _fingerprint(task.name, _identity(task))


def _identity(task: Task) -> dict[str, Any]:
    """Everything that the stage's result depends on, as JSON gives it back."""
    identity = {
        "version": task.version,
        "config": task.config,
        "inputs": {name: content_digest(path) for name, path in task.inputs.items()},
        "digests": dict(task.digests),
        "facts": dict(task.facts),
    }
    found: dict[str, Any] = json.loads(json.dumps(identity, default=str))
    return found


def _fingerprint(name: str, identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps({"name": name, **identity}, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """sha256 of a file, or over path and content of every file below a folder but its manifest."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise EdgestillError(f"{path}: expected an input that an earlier stage wrote", "Run without --until first")
    lines = [f"{file.relative_to(path)} {sha256(file)}" for file in _files(path)]
    return hashlib.sha256(os.fsencode("\n".join(lines))).hexdigest()


def execute(task: Task, run_folder: Path, *, log: Log, force: bool = False) -> Outcome:
    """Bring `<run_folder>/<task.name>` up to date and say what happened.

    Raises UsageError when that folder exists and is not the result of a stage, EdgestillError when an input is missing
    or the work folder cannot be made.
    """
    target = run_folder / task.name
    identity = _identity(task)
    mark = _fingerprint(task.name, identity)
    if target.exists():
        _refuse_foreign_folder(target)
    if not force and (done := _finished(target, mark)):
        return _outcome(task.name, target, done, skipped=True)
    work = run_folder / ".work" / f"{task.name}-{mark[:16]}"
    if force:
        shutil.rmtree(work, ignore_errors=True)
    elif changed := _changed(target, identity):
        log(f"{task.name:<9} is done again, as this has changed: {changed}")
    if not work.exists() and (stopped := _stopped(work.parent, task.name)):
        log(f"{task.name:<9} begins anew: a stopped run had other settings or inputs; {stopped} stays until it is done")
    manifest = _finished(work, mark) or _run_task(task, work, identity, mark, log)
    _publish(work, target)
    _drop_stale_work(run_folder / ".work", task.name)
    return _outcome(task.name, target, manifest, skipped=False)


@contextmanager
def alone_in(run_folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold a run's folder against other processes that would work in it at the same time.

    One that is there already is waited for with `wait`. Raises UsageError without.
    """
    lock = run_folder / ".work" / "lock"
    try:
        import fcntl

        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a")
    except (ImportError, OSError):  # Windows; or nothing can be written, and a stage that has to says why it cannot
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{run_folder}: another run works there", "Wait for it, or choose another --out") from None
        yield


def _run_task(task: Task, work: Path, identity: Mapping[str, Any], mark: str, log: Log) -> dict[str, Any]:
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgestillError(
            f"{work}: cannot be made ({error.strerror})", "Choose a writable folder with --out"
        ) from None
    _delete_partial_files(work)
    start = time.monotonic()
    figures = dict(task.run(work, log))
    manifest = {
        "stage": task.name,
        "fingerprint": mark,
        **identity,
        SECONDS: round(max(time.monotonic() - start, figures.get(SECONDS, 0.0)), 3),
        "figures": figures,
        "files": {str(file.relative_to(work)): file.stat().st_size for file in _files(work)},
    }
    write_json(work / MANIFEST, manifest)
    return manifest


def _changed(folder: Path, identity: Mapping[str, Any]) -> str:
    """The parts of the identity that differ from that of the finished stage in `folder`; empty without one."""
    try:
        before = dict(json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return ""
    keys = {part: list(_differing(before[part], identity[part])) for part in PARTS if part in before}
    told = [f"{PARTS[part]} {_few(names)}".strip() for part, names in keys.items() if names]
    return "; ".join(told) or "its files, or those that it was made of"


def _differing(was: Any, now: Any, key: str = "") -> Iterator[str]:
    """The keys, apart by points, at which two JSON values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        for name in dict.fromkeys((*was, *now)):
            yield from _differing(was.get(name, ABSENT), now.get(name, ABSENT), f"{key}.{name}" if key else name)
    elif was != now:
        yield key


def _few(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _finished(folder: Path, mark: str) -> dict[str, Any] | None:
    """The manifest of a complete folder with this fingerprint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        complete = manifest["fingerprint"] == mark and all(
            (folder / name).stat().st_size == size for name, size in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete else None


def _publish(work: Path, target: Path) -> None:
    """Replace `target` by `work`. After a kill between the renames, the next run finds `work` complete and goes on."""
    old = work.parent / f"{target.name}-old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign_folder(target: Path) -> None:
    """Raises UsageError when the folder is not the result of a stage: a user's folder is never replaced."""
    if target.is_dir() and ((target / MANIFEST).is_file() or not any(target.iterdir())):
        return
    raise UsageError(f"{target} exists and is not the result of a stage", "Move it away, or choose another --out")


def _delete_partial_files(work: Path) -> None:
    """Delete the hidden files that a process killed inside `atomic_write` leaves: they must not be published."""
    for torn in work.rglob(".*"):
        if torn.is_file():
            torn.unlink()


def _drop_stale_work(folder: Path, stage: str) -> None:
    for stale in _works(folder, stage):
        shutil.rmtree(stale, ignore_errors=True)


def _stopped(folder: Path, stage: str) -> Path | None:
    """A work folder of a run of the stage that left files and was not published."""
    return next((work for work in _works(folder, stage) if any(work.iterdir())), None)


def _works(folder: Path, stage: str) -> Iterator[Path]:
    return folder.glob(f"{stage}-*")


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST)


def _outcome(name: str, folder: Path, manifest: Mapping[str, Any], *, skipped: bool) -> Outcome:
    return Outcome(name, folder, skipped, manifest["seconds"], manifest["figures"], manifest["fingerprint"])
