from __future__ import annotations

import os

from runtime.child_process import how_it_ended, start_child


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
