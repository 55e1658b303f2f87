from __future__ import annotations

import math

import pytest

from compress.study.figures import Run, paired, summary
from compress.study.render import draw, interval, to_markdown


def run(arm: str, seed: int, value: float) -> Run:
    return Run(arm, seed, value, value + 0.2, 0.1)


RUNS = [run("scratch", 0, 0.50), run("soft", 0, 0.55), run("scratch", 1, 0.52), run("soft", 1, 0.55)]


def test_the_difference_is_taken_seed_by_seed_with_students_interval() -> None:
    found = paired("soft", "scratch", RUNS)
    assert found is not None
    assert (found.pairs, found.wins) == (2, 2)
    assert found.mean == pytest.approx(0.04)
    half = 12.706204736 * math.sqrt(2e-4) / math.sqrt(2)  # t of 1 degree of freedom, deviation of 0.05 and 0.03
    assert (found.low, found.high) == (pytest.approx(0.04 - half), pytest.approx(0.04 + half))


def test_a_single_pair_has_no_interval() -> None:
    found = paired("soft", "scratch", RUNS[:2])
    assert found is not None
    assert (found.low, found.high, found.pairs) == (None, None, 1)
    assert interval(found._asdict()) == "+5.0"


def test_a_seed_that_one_arm_lacks_is_no_pair() -> None:
    found = paired("soft", "scratch", RUNS[:3])
    assert found is not None
    assert found.pairs == 1
    assert paired("soft", "absent", RUNS) is None


def document(runs: list[Run], failed: dict[str, str] | None = None) -> dict[str, object]:
    arms = {"scratch": {"student": {"init": "scratch"}}, "soft": {}}
    about = {"epochs": 3, "imgsz": 64, "split": "test", "student": "p"}
    return summary(arms, runs, seeds=2, failed=failed or {}, **about)


def test_the_document_has_each_two_arms_once_the_later_against_the_earlier() -> None:
    found = document(RUNS)
    assert [(d["arm"], d["against"], d["pairs"]) for d in found["differences"]] == [("soft", "scratch", 2)]
    assert found["arms"] == ["scratch", "soft"]
    assert {key: found[key] for key in ("seeds", "epochs", "split")} == {"seeds": 2, "epochs": 3, "split": "test"}


def test_the_page_shows_every_run_and_what_failed() -> None:
    page = to_markdown(document(RUNS[:3], {"soft-1": "full | disk"}))
    assert "| scratch | 50.0 | 52.0 | 51.0 | 100 |" in page
    assert "| soft | 55.0 | – | 55.0 | 100 |" in page
    assert "| soft | scratch | +5.0 | 1 of 1 |" in page
    assert "soft-1 failed: full | disk" in page


def test_the_picture_is_drawn_for_any_number_of_runs(tmp_path) -> None:
    for count in (0, 1, 4):
        draw(document(RUNS[:count]), tmp_path / "study.png")
        assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
