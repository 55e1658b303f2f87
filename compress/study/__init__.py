"""A study: which of several ways to train the student is better, over paired seeds, on images that chose nothing.

In: a recipe whose `study.arms` name the ways, each as settings of `student` and `distill`. Out, in one folder: `data/`
and `teacher/`, made once; `runs/<arm>-<seed>/`, each made by a process of its own; `study.json`, `study.md`,
`study.png`.

Every arm trains with the same seeds, and with one seed all arms see the same images in the same order, so the
difference of two arms is taken seed by seed. The weights that are measured are the average of the last epoch (EMA):
a best epoch is chosen on the val split, which favours the arm that varies most.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from compress.config import PRESETS, DistillConfig, Recipe, Settings
from compress.data import Dataset, index_dataset, load_data
from compress.data.dataset import SplitIndex
from compress.gain import STUDY, training_of
from compress.inputs import TEACHER, dataset_of
from compress.log import Log
from compress.pipeline import run_recipe, stage
from compress.processes import JOBS
from compress.recipe import parse
from compress.store import Outcome, fingerprint
from compress.study.figures import Run, summary
from compress.study.judge import kept_figures, measured_by, measured_once, split_index, teacher_accuracy_of
from compress.study.render import draw, to_markdown
from compress.training.recipe_checks import check_recipe
from runtime.child_process import how_it_ended
from runtime.errors import EdgestillError, InputError, UsageError
from runtime.files import atomic_write, read_json, sha256, write_json
from runtime.sources import image_files

ARM_KEYS = ("student", "distill")
"""Parts of the recipe that an arm may change: data and teacher are the same for all."""
JOB, RESULT, PROTOCOL = "job.json", "result.json", "log.txt"
SHOWN_LINES = 3
"""Last lines of a failed run that its error shows."""
GRACE_S = 10
"""Seconds that a run has to end when the study's time is up, or the study has ended."""
STOPPED = 128 + signal.SIGTERM
"""Exit code of a run that was asked to end."""


class Failed(NamedTuple):
    """A run that ended with an error."""

    reason: str
    """The last lines that it printed."""


End = Run | Failed | None
"""None is a run that was stopped, or not begun since the time was up."""


def run_study(recipe: Recipe, out: Path, arms: Sequence[str] = (), log: Log = print) -> Path:
    """Train every arm, or those named, with every seed, and write the study into `out`. Returns study.json's path.

    A run that is done is not repeated; one that was killed, or stopped because the time was up, goes on. Arms that are
    not named keep the runs that were made as they would be now. The runs end with this process, by whatever end. A run
    that fails costs the others nothing: the study is written without it. Raises UsageError when arms or split are
    unknown or an arm cannot be trained as it is set, InputError when no image of the split can judge, EdgestillError
    when a run failed.
    """
    limit = recipe.study.time_limit_s
    until = None if limit is None else time.monotonic() + limit
    chosen = chosen_arms(recipe, arms)
    for arm in chosen:
        check_arm(recipe, arm, out)
    plan = [(arm, seed, arm_recipe(recipe, arm, seed)) for seed in range(recipe.study.seeds) for arm in chosen]
    judges = _index_split(recipe, out)
    teacher = run_recipe(recipe, out, until="teacher", log=log)[-1]
    kept = kept_runs(recipe, [arm for arm in recipe.study.arms if arm not in chosen], out, judges)
    shown = [*plan, *((run.arm, run.seed, arm_recipe(recipe, run.arm, run.seed)) for run in kept)]
    about = _about(recipe, shown, judges, teacher, out, log)
    ends = _in_processes(plan, recipe.study.jobs, out, until, log)
    failed = {name: end.reason for name, end in ends.items() if isinstance(end, Failed)}
    unfinished = [name for name, end in ends.items() if end is None]
    known = {arm for arm, _, _ in shown}
    document = summary(
        {arm: settings for arm, settings in recipe.study.arms.items() if arm in known},
        [*(end for end in ends.values() if isinstance(end, Run)), *kept],
        seeds=max((seed for arm, seed, _ in plan if ends[f"{arm}-{seed}"]), default=0) + 1,
        failed=failed,
        **about,
    )
    write(document, out)
    if unfinished:
        log(f"{len(unfinished)} of {len(plan)} runs are not done; run the study again to go on")
    if failed:
        name, reason = next(iter(failed.items()))
        raise EdgestillError(
            f"{len(failed)} of {len(plan)} runs failed; {name}: {reason}", "Run the study again: the others are kept"
        )
    return out / STUDY


def kept_runs(recipe: Recipe, arms: Sequence[str], out: Path, judges: Dataset) -> list[Run]:
    """The runs of these arms that were made by the same settings, data and teacher as they would be now."""
    runs = (_kept_run(recipe, arm, seed, out, judges) for seed in range(recipe.study.seeds) for arm in arms)
    return [run for run in runs if run]


def _kept_run(recipe: Recipe, arm: str, seed: int, out: Path, judges: Dataset) -> Run | None:
    file = out / "runs" / f"{arm}-{seed}" / RESULT
    if not file.is_file():
        return None
    try:
        training = fingerprint(stage("distill").task(arm_recipe(recipe, arm, seed), out))
    except EdgestillError:  # the arm cannot be trained as it is set now
        return None
    found = kept_figures(file, measured_by(training, judges))
    return Run(**found) if found else None


def _about(
    recipe: Recipe, plan: Sequence[tuple[str, int, Recipe]], judges: Dataset, teacher: Outcome, out: Path, log: Log
) -> dict[str, Any]:
    """The facts that all runs share, with the teacher's accuracy on the images that judge."""
    data, judging = dataset_of(recipe, {"data": out / "data"}), judges.splits[recipe.study.split]
    shared = judging.count_in(data.splits["train"])
    if shared:
        log(f"{recipe.study.split}: {shared} of {len(judging.samples)} images are training images too")
    for folder in sorted({made.distill.unlabelled for _, _, made in plan if made.distill.unlabelled}):
        if known := count_in_folder(judging, folder):
            log(f"{recipe.study.split}: {known} of {len(judging.samples)} images lie among those of {folder}")
    accuracy = _teacher_accuracy(recipe, teacher, judges, out)
    log(f"teacher: mAP50-95 {accuracy['map50_95']:.4f} on {recipe.study.split}")
    return {
        "epochs": shared_by(made.distill.epochs for _, _, made in plan),
        "imgsz": shared_by(made.distill.imgsz for _, _, made in plan),
        "student": shared_by(made.student.scale for _, _, made in plan),
        "split": recipe.study.split,
        "images": len(judging.samples),
        "shared_images": shared,
        "data": data.sha256,
        "teacher": {"fingerprint": teacher.fingerprint, **accuracy},
        "trainings": {arm: training_of(made.student, made.distill) for arm, _, made in plan},
    }


def shared_by(values: Iterable[Any]) -> Any:
    """The value that all arms share; None where they differ."""
    first, *others = set(values)
    return None if others else first


def count_in_folder(judging: SplitIndex, folder: Path) -> int:
    """The number of images whose bytes are those of an image below `folder`; none are those of a video's frames."""
    found = {sha256(file) for file in image_files(folder)} if folder.is_dir() else set()
    return sum(sample.sha256 in found for sample in judging.samples)


def _teacher_accuracy(recipe: Recipe, teacher: Outcome, judges: Dataset, out: Path) -> Mapping[str, float]:
    """`map50_95` and `map50` of the teacher at the students' image size, in the data's classes."""
    of = {
        "teacher": teacher.fingerprint, "judges": judges.sha256, "imgsz": recipe.distill.imgsz,
        "class_map": recipe.distill.class_map,
    }  # fmt: skip
    weights = teacher.folder / TEACHER
    return measured_once(out / "teacher.json", of, lambda: teacher_accuracy_of(weights, recipe, judges))


def write(document: Mapping[str, Any], out: Path) -> None:
    """study.md, study.png and, last, study.json."""
    with atomic_write(out / "study.md") as temporary:
        temporary.write_text(to_markdown(document), encoding="utf-8")
    draw(document, out / "study.png")
    write_json(out / STUDY, document)


# ---- arms -----------------------------------------------------------------------------------------------------------


def chosen_arms(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    """The arms to run, all where none is named. Raises UsageError when there is none, or a name is unknown."""
    known = list(recipe.study.arms)
    if not known:
        raise UsageError("the recipe has no arms", "Add study: {arms: {NAME: {student: ..., distill: ...}}}")
    if unknown := [name for name in wanted if name not in known]:
        raise UsageError(f"unknown arm {unknown[0]!r}", f"The recipe has {', '.join(known)}")
    return [name for name in known if name in wanted] or known


def arm_recipe(recipe: Recipe, arm: str, seed: int) -> Recipe:
    """The recipe of one run: the arm's settings laid over the recipe's, its training seeded by `seed`.

    Raises UsageError when the arm changes what all arms share, or a setting that does not exist.
    """
    changes = recipe.study.arms[arm]
    if foreign := [key for key in changes if key not in ARM_KEYS]:
        raise UsageError(f"study.arms.{arm} changes {foreign[0]!r}", f"An arm may change {' and '.join(ARM_KEYS)}")
    raw = recipe.model_dump(exclude_unset=True)
    if "preset" in changes.get("distill", {}):
        raw["distill"] = _without_preset(raw.get("distill", {}))
    raw = _laid_over(Recipe, raw, changes)
    raw["distill"] = {**raw.get("distill", {}), "seed": seed}
    made: Recipe = parse(Recipe, raw, f"study.arms.{arm}")
    return made


def check_arm(recipe: Recipe, arm: str, out: Path) -> None:
    """Judge the settings and files of an arm before anything is trained. Raises the errors of its distillation."""
    made = arm_recipe(recipe, arm, 0)
    try:
        stage("distill").task(made, out)
        check_recipe(made)
        _require_equal_epochs(made.distill)
    except EdgestillError as error:
        raise type(error)(f"study.arms.{arm}: {error.message}", error.hint) from None


def _require_equal_epochs(training: DistillConfig) -> None:
    """Raises UsageError when a training may stop early: arms are compared over the epochs that they are given."""
    if training.patience:
        raise UsageError(
            f"patience {training.patience} may end its trainings before the last epoch, one sooner than another",
            "Set distill.patience=0 for the study",
        )


def _without_preset(training: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a training without the values that its preset gave, so that another one can give its own."""
    own = dict(training)
    for group, table in PRESETS[own.get("preset", DistillConfig().preset)].items():
        own[group] = {key: value for key, value in own.get(group, {}).items() if table.get(key, ...) != value}
    return own


def _laid_over(group: type[Settings], raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`raw` with `changes`: groups of settings are merged, any other value is replaced."""
    made = dict(raw)
    for key, value in changes.items():
        inner = group.model_fields[key].annotation if key in group.model_fields else None
        if isinstance(inner, type) and issubclass(inner, Settings) and isinstance(value, Mapping):
            made[key] = _laid_over(inner, made.get(key, {}), value)
        else:
            made[key] = value
    return made


def _index_split(recipe: Recipe, out: Path) -> Dataset:
    """The split that judges, indexed for all processes."""
    data, split = load_data(recipe.data), recipe.study.split
    if split not in data.splits:
        raise UsageError(f"{recipe.data}: no {split} split to judge the arms on", "Add one, or set study.split=val")
    try:
        judges = index_dataset(data, [split])
    except InputError as error:
        raise InputError(error.message, f"{error.hint or 'Correct the split'}, or set study.split") from None
    judges.save(split_index(out, split))
    return judges


# ---- processes ------------------------------------------------------------------------------------------------------


def _in_processes(
    plan: Sequence[tuple[str, int, Recipe]], jobs: int, out: Path, until: float | None, log: Log
) -> dict[str, End]:
    """How each run of the plan ended, by its name. `until`, on the monotonic clock, is when the time is up.

    Each run reads a pipe that only this process holds open, and ends when it is closed: a study that is interrupted or
    killed leaves no training behind.
    """
    pool = ThreadPoolExecutor(jobs)
    wanted_fd, held_fd = os.pipe()
    try:
        ends = list(pool.map(lambda job: _run_apart(*job, out=out, until=until, wanted_fd=wanted_fd, log=log), plan))
    finally:
        os.close(held_fd)
        pool.shutdown(cancel_futures=True)  # an interrupted study starts no further run
        os.close(wanted_fd)
    return {f"{arm}-{seed}": end for (arm, seed, _), end in zip(plan, ends, strict=True)}


def _run_apart(arm: str, seed: int, recipe: Recipe, *, out: Path, until: float | None, wanted_fd: int, log: Log) -> End:
    """One run in a process of its own, until it is done, the time is up, or the pipe behind `wanted_fd` is closed."""
    left = None if until is None else until - time.monotonic()
    if left is not None and left <= 0:
        return None
    folder = out / "runs" / f"{arm}-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    job = {"arm": arm, "seed": seed, "recipe": recipe.model_dump(mode="json", exclude_unset=True)}
    write_json(folder / JOB, job)
    command = [sys.executable, "-m", "compress.study", str(folder), str(out), str(wanted_fd)]
    status = _status_of(command, folder / PROTOCOL, left, [wanted_fd], jobs=recipe.study.jobs)
    if status in (None, STOPPED, -signal.SIGTERM):
        return None
    if status:
        printed = (folder / PROTOCOL).read_text(encoding="utf-8", errors="replace").splitlines()[-SHOWN_LINES:]
        log(f"{arm} seed {seed}: failed; see {folder / PROTOCOL}")
        return Failed(" / ".join(printed if printed and status > 0 else [*printed, how_it_ended(status)]))
    run = Run(**read_json(folder / RESULT)["found"])
    log(f"{arm} seed {seed}: mAP50-95 {run.map50_95:.4f}, {1e3 * run.seconds_per_step:.0f} ms a step")
    return run


def _status_of(
    command: Sequence[str], protocol: Path, seconds: float | None, pass_fds: Collection[int] = (), *, jobs: int = 1
) -> int | None:
    """Run a command, one of `jobs` that share the machine, what it prints added to `protocol`. Returns its exit status;
    None when it was stopped after `seconds`. A Ctrl-C at the terminal does not reach it.
    """
    environment = {"OMP_NUM_THREADS": "1", **os.environ, JOBS: str(jobs)}
    with (
        protocol.open("a", encoding="utf-8") as lines,
        subprocess.Popen(  # noqa: S603
            command, stdout=lines, stderr=lines, env=environment, pass_fds=tuple(pass_fds), start_new_session=True
        ) as process,
    ):
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
        return None
