from __future__ import annotations

import pytest

from compress.cli.options import say
from compress.processes import JOBS, is_first_process, process_count, sharing_count


def test_a_process_alone_is_the_first_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first_process()
    assert process_count() == 1


def test_only_the_first_of_several_processes_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, expected in (("0", "a line\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        say("a line")
        assert capsys.readouterr().err == expected
    assert process_count() == 2


@pytest.mark.parametrize(
    ("variables", "count"), [({}, 1), ({"LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "8"}, 4), ({JOBS: "3"}, 3)]
)
def test_processes_of_torchrun_and_jobs_of_a_study_share_the_machine(
    variables: dict[str, str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", JOBS):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert sharing_count() == count
