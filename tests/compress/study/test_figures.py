from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.formats import difference
from compress.config import DistillConfig, StudentConfig
from compress.gain import training_of
from compress.study.figures import Run, paired, summary
from compress.study.render import draw, to_markdown


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
    assert difference(found._asdict()) == "+5.0"


def test_a_seed_that_one_arm_lacks_is_no_pair() -> None:
    found = paired("soft", "scratch", RUNS[:3])
    assert found is not None
    assert found.pairs == 1
    assert paired("soft", "absent", RUNS) is None


def training(**distill: object) -> dict[str, object]:
    return training_of(StudentConfig(), DistillConfig.model_validate({"epochs": 3, "imgsz": 64, **distill}))


def document(
    runs: list[Run], failed: dict[str, str] | None = None, seeds: int = 2, **soft: object
) -> dict[str, object]:
    arms = {"scratch": {"student": {"init": "scratch"}}, "soft": {}}
    about = {"epochs": 3, "imgsz": 64, "split": "test", "student": "p", "teacher": {"map50_95": 0.625, "map50": 0.9}}
    about |= {"images": 72, "shared_images": 3}
    trainings = {"scratch": training(), "soft": training(**soft)}
    return summary(arms, runs, seeds=seeds, failed=failed or {}, trainings=trainings, **about)


def test_the_document_has_each_two_arms_once_the_later_against_the_earlier() -> None:
    found = document(RUNS)
    assert [(d["arm"], d["against"], d["pairs"]) for d in found["differences"]] == [("soft", "scratch", 2)]
    assert found["arms"] == ["scratch", "soft"]
    assert {key: found[key] for key in ("seeds", "epochs", "split")} == {"seeds": 2, "epochs": 3, "split": "test"}


def test_the_page_shows_every_run_beside_the_teacher_and_what_failed() -> None:
    page = to_markdown(document(RUNS[:3], {"soft-1": "full | disk"}))
    assert page.startswith("# Study: student p, epochs 3, pixels 64, batch 16\n")
    assert "| scratch | 50.0 | 52.0 | 51.0 | 82 % | 100 |" in page
    assert "| soft | 55.0 | – | 55.0 | 88 % | 100 |" in page
    assert "| teacher |  |  | 62.5 | 100 % |  |" in page
    assert "| soft | scratch | +5.0 | 1 of 1 |" in page
    assert "soft-1 failed: full | disk" in page
    assert "on the 72 images of the test split" in page
    assert "3 of these images are training images too." in page


def test_what_arms_do_not_share_is_a_column() -> None:
    page = to_markdown(document(RUNS, epochs=9))
    assert page.startswith("# Study: student p, pixels 64, batch 16\n")
    assert "| Arm | epochs | seed 0 |" in page
    assert "| soft | 9 | 55.0 |" in page


def test_one_seed_promises_no_interval() -> None:
    page = to_markdown(document(RUNS[:2], seeds=1))
    assert "1 paired seed." in page
    assert "One pair has no interval" in page
    assert "95 %" not in page


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_picture_is_drawn_for_any_number_of_runs(tmp_path: Path, count: int) -> None:
    draw(document(RUNS[:count]), tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_a_name_is_drawn_as_it_is_written(tmp_path: Path) -> None:
    named = json.loads(json.dumps(document(RUNS)).replace('"scratch"', '"$^$"').replace('"soft"', '"a|b_$x$"'))
    assert named["arms"] == ["$^$", "a|b_$x$"]
    draw(named, tmp_path / "study.png")
    assert r"| a\|b_$x$ |" in to_markdown(named)
