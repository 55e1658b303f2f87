from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from compress.training.state import load_state, random_state, restore_random_state, save_state
from runtime.errors import InputError


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))  # noqa: NPY002


def test_restored_generators_repeat_themselves(tmp_path: Path) -> None:
    save_state({"random": random_state()}, tmp_path / "state.pt")
    first = draws()
    restore_random_state(load_state(tmp_path / "state.pt")["random"])
    assert draws() == first


def test_tensors_return_with_their_bits_and_layout(tmp_path: Path) -> None:
    weight = torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)
    save_state({"weight": weight}, tmp_path / "state.pt")
    loaded = load_state(tmp_path / "state.pt")["weight"]
    assert torch.equal(loaded, weight)
    assert loaded.is_contiguous(memory_format=torch.channels_last)


def test_an_absent_file_is_named_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"state\.pt does not exist.*without --resume"):
        load_state(tmp_path / "state.pt")


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("ran",)


@pytest.mark.parametrize("content", [b"", b"<html>", pickle.dumps(Payload(), protocol=2)])
def test_a_damaged_or_hostile_file_is_refused_in_one_line(content: bytes, tmp_path: Path, capsys) -> None:
    (tmp_path / "state.pt").write_bytes(content)
    with pytest.raises(InputError) as caught:
        load_state(tmp_path / "state.pt")
    assert "\n" not in str(caught.value)
    assert "ran" not in capsys.readouterr().out


def test_a_state_of_another_version_is_refused(tmp_path: Path) -> None:
    torch.save({"version": 99}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="version 99"):
        load_state(tmp_path / "state.pt")


def test_a_failed_write_leaves_the_previous_state(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_state({"epoch": 1}, path)
    with pytest.raises(Exception, match=r"."):
        save_state({"epoch": lambda: None}, path)
    assert load_state(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["state.pt"]
