"""The run on a GPU as far as it needs none: what must be there, what is started, what a person reads."""

from __future__ import annotations

import ast
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import metadata
from pathlib import Path

import builds
import psutil
import pytest
import run
import shapes
import torch
from packaging.requirements import Requirement
from run import Console, Ended, Part, run_part
from shim.cases import arguments

from compress.kernels.losses import FUSED, SOURCES
from compress.kernels.toolchain import FOLDER
from compress.pipeline import ORDER

ALL_PARTS = [
    run.builds(),
    *run.correctness([*FUSED], ["cwd", "pkd"]),
    *run.timings(Path("out")),
    run.study(Path("data.yaml"), Path("n.pt"), 10, Path("study")),
]
ENVIRONMENT = dict(os.environ)


def sh(script: str, **changes) -> Part:
    return Part("part", ("sh", "-c", script), 60, **changes)


# ---- packages -------------------------------------------------------------------------------------------------------


def started_modules() -> set[str]:
    """The modules that the parts run, and those that these open by name: commands and stages."""
    commands = [part.command for part in ALL_PARTS]
    files = {Path(word).stem for command in commands for word in command if word.endswith(".py")}
    modules = {command[2] for command in commands if command[1] == "-m"} - {"pytest"}
    stages = {f"compress.stages.{name}" for name in ORDER[: ORDER.index("distill") + 1]}
    return {"run", "compress.cli", "compress.cli.runs", "compress.study.__main__"} | files | modules | stages


def file_of(module: str) -> Path | None:
    """Its source in this repository."""
    for folder in (run.REPOSITORY, run.HERE, run.REPOSITORY / "tests/compress/kernels"):
        path = folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def imports_in(file: Path) -> Iterator[str]:
    """Every module that a file may import, inside functions too, and every name that it takes from one."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def foreign_imports() -> set[str]:
    """Packages outside this repository and the standard library that a run may import."""
    seen, found, left = set(), set(), [*started_modules()]
    while left:
        module = left.pop()
        top = module.partition(".")[0]
        if module in seen:
            continue
        seen.add(module)
        if file := file_of(module):
            left += [module.rpartition(".")[0] or module, *imports_in(file)]
        elif top not in sys.stdlib_module_names and not file_of(top) and top != "shim":
            found.add(top)
    return found


def canonical(name: str) -> str:
    return name.lower().replace("_", "-")


def test_whatever_a_run_imports_is_on_the_machine_or_brought_along() -> None:
    found, known = foreign_imports(), set(run.names_in(run.HERE / "requirements.txt"))
    assert {"torch", "pydantic", "cuda", "matplotlib"} <= found, "the walk lost its way"
    by_module = metadata.packages_distributions()
    lost = {name for name in found if name in by_module and not {canonical(d) for d in by_module[name]} & known}
    assert not lost, "enter their packages in tests/gpu/requirements.txt"


def test_what_brought_packages_need_is_there_too() -> None:
    there = {*run.names_in(run.HERE / "machine.txt"), *run.to_bring()}
    assert "pydantic" in run.to_bring()
    for name in run.to_bring():
        needed = [Requirement(text) for text in metadata.requires(name) or []]
        own = {canonical(one.name) for one in needed if not one.marker or one.marker.evaluate({"extra": ""})}
        assert own <= there, name


def test_the_packages_to_bring_are_told_with_their_versions(capsys) -> None:
    assert run.main(["needs"]) == 0
    first, here, there = capsys.readouterr().out.splitlines()
    assert len(first.split(":")[1].split()) == len(run.to_bring())
    assert all(f" {name}==" in here for name in run.to_bring())
    assert "--no-index" in there


def test_a_package_that_is_missing_is_told_before_anything_runs(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(run, "HERE", tmp_path)
    (tmp_path / "requirements.txt").write_text("torch  # the first\nno-such-package\nnone-either\n")
    assert run.main(["measure", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: not installed: no-such-package, none-either. Bring them along")
    assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_one_line_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(run, "absent", list)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["measure", "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.endswith("has no torch that sees an NVIDIA GPU\n")


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_every_loss_and_what_takes_long_is_tested_by_itself_and_the_rest_once() -> None:
    chosen = [part.command[-1] for part in run.correctness(["cwd", "pkd"], []) if run.KERNELS in part.command]
    assert chosen == ["cwd", "pkd", run.COMPILED, f"not (cwd or pkd or {run.COMPILED})"]
    assert f"def test_{run.COMPILED}_" in (run.REPOSITORY / run.KERNELS).read_text()


def test_the_sanitizers_look_at_our_kernels_alone_and_forgive_questions_to_the_driver() -> None:
    memcheck, racecheck = run.correctness([], ["cwd_rows", "rescale"])[-2:]
    for part in (memcheck, racecheck):
        words = " ".join(part.command)
        assert "--kernel-name kns=cwd_rows --kernel-name kns=rescale" in words
        assert (part.is_wrong(9), part.is_wrong(1), part.is_wrong(0)) == (True, False, False)
    assert "--report-api-errors no" in " ".join(memcheck.command)
    assert "--report-api-errors" not in racecheck.command


def test_later_parts_are_left_their_least() -> None:
    bench, step = Part("bench", (), 150, least_s=90), Part("step", (), 50, least_s=40)
    assert run.limit(bench, 300, [step]) == 150
    assert run.limit(bench, 150, [step]) == 110
    assert run.limit(step, 3, []) == run.LEAST_S


def test_the_families_of_kernels_come_from_their_names() -> None:
    kernels = ["cwd_rows_f16", "cwd_rows_bf16", "cwd_rows_f32", "weight_sums"]
    assert builds.families(kernels) == ["cwd_rows", "weight_sums"]


class Recorder:
    """A device that runs nothing and keeps which sources it was asked for."""

    facts = builds.facts_of("sm_90")

    def __init__(self) -> None:
        self.asked = set()

    def launch(self, launch) -> None:
        self.asked.add(launch.source)

    def tickets(self, count: int) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_whatever_the_tests_launch_is_compiled_ahead(layout: str) -> None:
    device = Recorder()
    for maps in (*([shape] for shape in shapes.SHAPES), shapes.LEVELS, *shapes.SANITIZED.values()):
        for given in (maps, [*map(shapes.even, maps)]):
            for name, loss in FUSED.items():
                loss.run(device, arguments(name, torch.float16, given, layout))
    assert {source.path for source in SOURCES} - {FOLDER / "rescale/kernel.cu"} <= {s.path for s in device.asked}
    assert device.asked <= builds.sources("sm_90")


# ---- running --------------------------------------------------------------------------------------------------------


def test_a_part_gives_its_status_and_what_it_printed() -> None:
    ended = run_part(sh("echo out; echo err >&2; exit 3"), 50, ENVIRONMENT)
    assert (ended.status, ended.output) == (3, "out\nerr\n")


def test_a_part_learns_how_long_it_may_work() -> None:
    part = Part("part", ("echo", "{seconds}"), 60, spare_s=10)
    assert run_part(part, 50, ENVIRONMENT).output == "40\n"


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(run, "GRACE_S", 0.2)
    ended = run_part(sh(f"trap '' TERM; sleep 600 & echo $! > {tmp_path / 'child'}; wait; sleep 600"), 1, ENVIRONMENT)
    assert ended.status == run.TIMED_OUT
    child = int((tmp_path / "child").read_text())
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(child).status() != psutil.STATUS_ZOMBIE:  # for ever if it was not ended
            time.sleep(0.01)


def test_a_program_that_is_not_there_costs_the_others_nothing() -> None:
    ended = run_part(Part("memcheck", ("no-such-sanitizer", "x"), 60), 50, ENVIRONMENT)
    assert (ended.status, ended.output) == (run.NOT_FOUND, "no-such-sanitizer is not here")


def test_kernels_are_compiled_then_proven_all_at_once_and_only_then_timed(monkeypatch, tmp_path, capsys) -> None:
    trace = tmp_path / "trace"

    def noting(name: str, script: str = "true", **changes) -> Part:
        return sh(f"echo {name} >> {trace}; {script}", **changes)._replace(name=name)

    def correctness(losses, kernels) -> list[Part]:
        assert (losses, kernels) == ([*FUSED], ["cwd_rows", "rescale"])
        meet = f"while [ $(grep -c meets {trace}) -lt 2 ]; do sleep 0.01; done"  # for ever, if one came after the other
        return [noting("meets", meet), noting("meets", f"{meet}; exit 1", is_wrong=bool)]

    monkeypatch.setattr(run, "builds", lambda: noting("builds", "echo 7 builds; echo cwd_rows rescale"))
    monkeypatch.setattr(run, "correctness", correctness)
    monkeypatch.setattr(run, "timings", lambda out: [noting("traffic"), noting("bench", "exit 3"), noting("step")])
    assert run.measure(tmp_path, 300, Console(tmp_path / "run.log"), ENVIRONMENT) == 1
    assert trace.read_text().split() == ["builds", "meets", "meets", "traffic", "bench", "step"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["correct"] is False
    assert [part["status"] for part in summary["parts"]] == [0, 0, 1, 0, 3, 0]
    assert "not done: bench (status 3)" in capsys.readouterr().out


def test_no_more_is_printed_than_a_short_reply_holds(tmp_path, capsys) -> None:
    console = Console(tmp_path / "run.log")
    for part in ALL_PARTS:
        lines = "".join(f"FAILED {part.name} number {n} {'x' * 300}\n" for n in range(2000))
        console.tell(Ended(part, 1, 2.0, lines + f"the end of {part.name}"))
    run.verdict(tmp_path, [Ended(part, 1, 2.0, "") for part in ALL_PARTS], console)
    printed = capsys.readouterr().out
    assert len(printed) <= run.SHOWN
    assert all(f"== {part.name}: status 1" in printed for part in ALL_PARTS)
    assert "until that is mended" in printed
    assert (tmp_path / "run.log").read_text().count("FAILED") > 2000 * len(ALL_PARTS)


def test_the_end_and_the_lines_that_matter_are_shown() -> None:
    part = sh("", shown=100, lines="^FAILED")
    output = "noise\nFAILED a\nnoise\nFAILED b\n3 failed"
    assert run.excerpt(Ended(part, 1, 0.0, output), 100) == "FAILED a\nFAILED b\n3 failed"
    assert run.excerpt(Ended(part, 1, 0.0, output), 20) == "FAILED b\n3 failed"
    assert run.excerpt(Ended(part, 1, 0.0, ""), 20) == ""


def test_only_what_shows_a_wrong_kernel_fails_the_run(tmp_path, capsys) -> None:
    console = Console(tmp_path / "run.log")
    test, sanitizer = sh("", is_wrong=bool), sh("", is_wrong=lambda status: status == 9)
    assert run.verdict(tmp_path, [Ended(test, 0, 1.0, ""), Ended(sanitizer, 127, 1.0, "")], console) == 0
    assert "not done: part (status 127)" in capsys.readouterr().out
    assert run.verdict(tmp_path, [Ended(test, 124, 1.0, ""), Ended(sanitizer, 0, 1.0, "")], console) == 1
    assert "FAILED: part (status 124)" in capsys.readouterr().out


def test_the_files_of_a_study_are_brought_out_and_the_rest_stays(tmp_path, capsys) -> None:
    folder, out = tmp_path / "study", tmp_path / "out"
    out.mkdir()
    script = f"mkdir -p {folder}/runs; cd {folder}; touch study.json study.md runs/weights; echo '| table |'; exit 1"
    assert run.train(sh(script, shown=100), folder, out, 60, Console(tmp_path / "run.log"), ENVIRONMENT) == 1
    assert {path.name for path in out.iterdir()} == {"study.json", "study.md"}
    assert "| table |" in capsys.readouterr().out
