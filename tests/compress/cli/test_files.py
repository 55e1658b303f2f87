"""The folder into which a command writes if it was given none, and its refusal of one that holds another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli.files import into
from runtime.errors import InputError
from runtime.identity import OccupiedError


class Work:
    """Fails in the folders that hold another model, and remembers where it was tried."""

    def __init__(self, *occupied: str) -> None:
        self.occupied = occupied
        self.tried: list[str] = []

    def __call__(self, folder: Path) -> None:
        self.tried.append(folder.name)
        if folder.name in self.occupied:
            raise OccupiedError(f"{folder} holds another model")


def test_without_a_folder_the_next_number_is_taken_where_another_model_lies(capsys: pytest.CaptureFixture[str]) -> None:
    work = Work("export", "export2")
    assert into(None, Path("runs/export"), work) == Path("runs/export3")
    assert work.tried == ["export", "export2", "export3"]
    assert "runs/export2 holds another model; trying the next folder" in capsys.readouterr().err


def test_without_another_model_the_folder_is_taken_again() -> None:
    assert into(None, Path("runs/export"), Work()) == Path("runs/export")


def test_a_folder_that_was_named_is_used_or_refused() -> None:
    work = Work("mine")
    with pytest.raises(OccupiedError):
        into(Path("mine"), Path("runs/export"), work)
    assert work.tried == ["mine"]
    assert into(Path("own"), Path("runs/export"), work) == Path("own")


def test_another_error_ends_the_work() -> None:
    def fail(_: Path) -> None:
        raise InputError("no such file")

    with pytest.raises(InputError, match="no such file"):
        into(None, Path("runs/export"), fail)
