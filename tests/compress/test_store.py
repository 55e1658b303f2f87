from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from compress.store import MANIFEST, Task, alone_in, execute, fingerprint
from runtime.errors import EdgestillError, UsageError


def silent(_: str) -> None:
    pass


def counting_task(calls: list[str], *, config: dict[str, object] | None = None, **extra: object) -> Task:
    def run(out: Path, _log: object) -> dict[str, object]:
        calls.append("run")
        (out / "result.txt").write_text(f"run {len(calls)}")
        return {"answer": 42}

    return Task("count", run, config or {"epochs": 1}, **extra)  # type: ignore[arg-type]


def test_an_unchanged_stage_is_skipped_and_keeps_its_figures(tmp_path: Path) -> None:
    calls: list[str] = []
    first = execute(counting_task(calls), tmp_path, log=silent)
    second = execute(counting_task(calls), tmp_path, log=silent)
    assert (first.skipped, second.skipped, calls) == (False, True, ["run"])
    assert second.figures == {"answer": 42}


def test_a_changed_setting_input_or_fact_runs_it_again(tmp_path: Path) -> None:
    given = tmp_path / "given.txt"
    given.write_text("one")
    calls: list[str] = []
    marks = {fingerprint(counting_task(calls, inputs={"given": given}))}
    given.write_text("two")
    marks.add(fingerprint(counting_task(calls, inputs={"given": given})))
    marks.add(fingerprint(counting_task(calls, inputs={"given": given}, config={"epochs": 2})))
    marks.add(fingerprint(counting_task(calls, inputs={"given": given}, facts={"tensorrt": "11.4"})))
    assert len(marks) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"config": {"distill": {"precision": "auto", "batch": 4}}}, "settings distill.amp, distill.precision"),
        ({"config": {"distill": {"amp": None, "batch": 4}}}, "settings distill.amp"),
        ({"facts": {"tensorrt": "11.4"}, "version": 2}, "the stage itself; the machine's tensorrt"),
        ({"digests": {"teachers": "b"}}, "files: teachers"),
        ({"inputs": {}}, "stages before it: given"),
        ({"config": {"distill": {str(key): 0 for key in range(9)}}}, "settings distill.amp, .* and 3 more"),
    ],
)
def test_a_stage_that_is_done_again_says_what_changed(tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    given = tmp_path / "given.txt"
    given.write_text("one")
    first: dict[str, Any] = {
        "config": {"distill": {"amp": True, "batch": 4}}, "inputs": {"given": given}, "digests": {"teachers": "a"},
        "facts": {"tensorrt": "10.1"},
    }  # fmt: skip
    lines: list[str] = []
    execute(counting_task([], **first), tmp_path, log=lines.append)
    execute(counting_task([], **first), tmp_path, log=lines.append)
    assert lines == []
    execute(counting_task([], **first | changes), tmp_path, log=lines.append)
    assert re.fullmatch(f"count     is done again, as this has changed: {told}", lines[0])
    execute(counting_task([], **first | changes), tmp_path, log=lines.append, force=True)
    assert len(lines) == 1


def test_a_stage_whose_files_were_damaged_says_so(tmp_path: Path) -> None:
    lines: list[str] = []
    (execute(counting_task([]), tmp_path, log=silent).folder / "result.txt").unlink()
    execute(counting_task([]), tmp_path, log=lines.append)
    assert "its files" in lines[0]


def test_the_time_of_a_stage_counts_the_parts_before_a_kill_where_the_stage_knows_them(tmp_path: Path) -> None:
    def resumed(_out: Path, _log: object) -> dict[str, float]:
        return {"seconds": 1000.0}

    assert execute(Task("resumed", resumed, {}), tmp_path, log=silent).seconds == 1000
    assert execute(counting_task([]), tmp_path, log=silent).seconds < 100


def test_force_runs_a_finished_stage_again(tmp_path: Path) -> None:
    calls: list[str] = []
    execute(counting_task(calls), tmp_path, log=silent)
    execute(counting_task(calls), tmp_path, log=silent, force=True)
    assert calls == ["run", "run"]


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    execute(counting_task(calls), tmp_path, log=silent)
    (tmp_path / "count" / "result.txt").write_text("cut off")
    assert not execute(counting_task(calls), tmp_path, log=silent).skipped


def test_a_failed_stage_leaves_the_last_good_result_in_place(tmp_path: Path) -> None:
    calls: list[str] = []
    execute(counting_task(calls), tmp_path, log=silent)

    def fail(out: Path, _log: object) -> dict[str, object]:
        (out / "result.txt").write_text("half")
        raise EdgestillError("full disk")

    with pytest.raises(EdgestillError):
        execute(Task("count", fail, {"epochs": 2}), tmp_path, log=silent)
    assert (tmp_path / "count" / "result.txt").read_text() == "run 1"


def test_a_killed_stage_finds_its_work_again(tmp_path: Path) -> None:
    def killed(out: Path, _log: object) -> dict[str, object]:
        (out / "epoch-3").touch()
        raise KeyboardInterrupt

    def resumed(out: Path, _log: object) -> dict[str, object]:
        return {"found": (out / "epoch-3").exists()}

    with pytest.raises(KeyboardInterrupt):
        execute(Task("train", killed, {}), tmp_path, log=silent)
    assert execute(Task("train", resumed, {}), tmp_path, log=silent).figures == {"found": True}


def test_the_work_of_a_killed_stage_with_other_settings_is_told_and_kept_until_the_stage_is_done(
    tmp_path: Path,
) -> None:
    def killed(out: Path, _log: object) -> dict[str, object]:
        (out / "epoch-3").touch()
        raise KeyboardInterrupt

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        execute(Task("train", killed, {"lr": 1}), tmp_path, log=lines.append)
    (left,) = (tmp_path / ".work").glob("train-*")
    with pytest.raises(KeyboardInterrupt):
        execute(Task("train", killed, {"lr": 2}), tmp_path, log=lines.append)
    assert lines == [
        f"train     begins anew: a stopped run had other settings or inputs; {left} stays until it is done"
    ]
    assert left.is_dir()
    with pytest.raises(KeyboardInterrupt):
        execute(Task("train", killed, {"lr": 1}), tmp_path, log=lines.append)
    assert len(lines) == 1
    execute(Task("train", lambda _out, _log: {}, {"lr": 2}), tmp_path, log=lines.append)
    assert not list((tmp_path / ".work").glob("train-*"))


def test_work_finished_but_not_yet_published_is_published_without_running(tmp_path: Path) -> None:
    calls: list[str] = []
    outcome = execute(counting_task(calls), tmp_path, log=silent)
    outcome.folder.rename(tmp_path / ".work" / f"count-{outcome.fingerprint[:16]}")
    execute(counting_task(calls), tmp_path, log=silent)
    assert calls == ["run"]
    assert json.loads((tmp_path / "count" / MANIFEST).read_text())["figures"] == {"answer": 42}


def test_a_folder_of_the_user_is_never_replaced(tmp_path: Path) -> None:
    mine = tmp_path / "count" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("keep")
    with pytest.raises(UsageError, match="--out"):
        execute(counting_task([]), tmp_path, log=silent)
    assert mine.read_text() == "keep"


def test_a_run_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(EdgestillError, match="--out"):
        execute(counting_task([]), blocked, log=silent)


def test_a_folder_is_held_against_a_second_run_and_free_after_the_first(tmp_path: Path) -> None:
    with alone_in(tmp_path / "run"):
        with pytest.raises(UsageError, match="another run works there"), alone_in(tmp_path / "run"):
            pytest.fail("two at once")
        with alone_in(tmp_path / "other"):
            pass
    with alone_in(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_written_is_not_held(tmp_path: Path) -> None:
    (tmp_path / ".work").touch()
    with alone_in(tmp_path), alone_in(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".work"]


@pytest.mark.parametrize("files", [[], {"result.txt": "5"}, None, 3])
def test_a_manifest_of_another_form_is_that_of_no_result(tmp_path: Path, files: object) -> None:
    calls: list[str] = []
    execute(counting_task(calls), tmp_path, log=silent)
    manifest = tmp_path / "count" / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"files": files}))
    assert not execute(counting_task(calls), tmp_path, log=silent).skipped
