from __future__ import annotations

import os

import pytest

from runtime.child_process import how_it_ended, start_child

LISTENS = "import signal, sys, time; from runtime.child_process import end_when_closed"


def test_a_child_finds_the_package_and_the_files_that_are_passed_to_it() -> None:
    read_fd, write_fd = os.pipe()
    code = f"import os, runtime; os.write({write_fd}, os.environ['OMP_NUM_THREADS'].encode()); print('not seen')"
    with os.fdopen(read_fd, "rb") as answers:
        with os.fdopen(write_fd, "wb"):
            child = start_child(code, pass_fds=[write_fd])
        assert child.wait() == 0
        assert answers.read() == b"1"


def test_the_terminal_does_not_reach_a_child() -> None:
    child = start_child("import time; time.sleep(600)")
    assert os.getsid(child.pid) == child.pid
    child.kill()
    assert how_it_ended(child.wait()) == "signal 9 (Killed)"


def test_an_exit_code_is_told() -> None:
    assert how_it_ended(start_child("raise SystemExit(3)").wait()) == "exit code 3"


@pytest.mark.parametrize(
    ("listens", "ends"), [("lambda *_: sys.exit(3)", "exit code 3"), ("signal.SIG_IGN", "signal 9 (Killed)")]
)
def test_a_child_ends_when_nobody_holds_its_pipe_even_if_it_does_not_listen(listens: str, ends: str) -> None:
    wanted_fd, held_fd = os.pipe()
    code = f"{LISTENS}; signal.signal(signal.SIGTERM, {listens}); end_when_closed({wanted_fd}, 0.2); time.sleep(600)"
    with os.fdopen(wanted_fd, "rb"):
        child = start_child(code, pass_fds=[wanted_fd])
        os.close(held_fd)
    assert how_it_ended(child.wait(60)) == ends
