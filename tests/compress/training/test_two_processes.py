from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from . import two_processes

pytestmark = pytest.mark.slow
WORLD = 2
REPOSITORY = Path(__file__).parents[3]


def run_together(*module_and_arguments: str, seconds: float = 300) -> tuple[list[int], list[str]]:
    """Exit codes and outputs of two processes that exchange gradients by gloo. A process that hangs is a failure."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", *module_and_arguments], cwd=REPOSITORY,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        output = [child.communicate(timeout=seconds)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    return [child.returncode for child in children], output


@pytest.fixture(scope="module", params=["offline", "joint"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def together(strategy: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("together")
    codes, output = run_together("tests.compress.training.two_processes", strategy, str(folder))
    assert codes == [0, 0], "\n".join(output)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.fixture(scope="module")
def alone(strategy: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return two_processes.train(strategy, tmp_path_factory.mktemp("alone"))


def test_both_processes_end_with_the_same_bits(together: list[dict[str, Any]]) -> None:
    one, other = together
    assert one["processes"] == other["processes"] == WORLD
    for part in ("weights", "ema"):
        assert all(torch.equal(value, other[part][name]) for name, value in one[part].items())
    assert all(torch.equal(a, b) for a, b in zip(one["gradients"], other["gradients"], strict=True))


def test_two_processes_train_as_one_does_on_the_same_batches(
    together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    one = together[0]
    assert one["steps"] == alone["steps"] == 4
    for name, value in alone["weights"].items():
        torch.testing.assert_close(one["weights"][name], value, rtol=1e-4, atol=1e-6)
    for name, value in alone["ema"].items():
        torch.testing.assert_close(one["ema"][name], value, rtol=1e-4, atol=1e-6)


def test_gradients_that_are_pending_at_the_end_are_those_of_one_process(
    together: list[dict[str, Any]], alone: dict[str, Any]
) -> None:
    for found, wanted in zip(together[0]["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_the_processes_losses_average_to_those_of_one(together: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    mean = torch.stack([process["losses"] for process in together]).mean(0)
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-4, atol=1e-6)


LOST = "another process of this training has ended, so this one ends too. Its own message says why"


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("validation", "an image cannot be read", "the first process failed: an image cannot be read"),
        ("bug in validation", "ValueError: a bug", "the first process failed: a bug"),
        ("step of the second", LOST, "not finite"),
        ("step of the first", "not finite", LOST),
        ("interrupt", "KeyboardInterrupt", LOST),
        ("early stop", "epochs 3", "epochs 3"),
    ],
)
def test_both_processes_end_where_one_does(how: str, first: str, second: str, tmp_path: Path) -> None:
    _, output = run_together("tests.compress.training.two_endings", how, str(tmp_path), seconds=120)
    last_lines = [text.strip().splitlines()[-1].removeprefix("[rank0]: ") for text in output]
    assert last_lines == [first, second]
