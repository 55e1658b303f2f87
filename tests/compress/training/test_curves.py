from __future__ import annotations

import csv
from pathlib import Path

import cv2
import pytest

from compress.training.curves import Scalars, columns, draw_curves, write_csv

PLAIN = ("box", "obj", "cls")
HISTORY = [
    {"epoch": 0.0, "train/box_loss": 0.1, "train/obj_loss": 0.02, "train/cls_loss": 0.03, "x/lr0": 0.1, "x/lr1": 0.0},
    {
        "epoch": 1.0, "train/box_loss": 0.09, "train/obj_loss": 0.02, "train/cls_loss": 0.02, "x/lr0": 0.05,
        "x/lr1": 0.01, "x/lr2": 0.01, "metrics/mAP_0.5": 0.5, "metrics/mAP_0.5:0.95": 0.3,
    },
]  # fmt: skip


def test_columns_are_those_of_yolov5() -> None:
    assert ",".join(columns(PLAIN)) == (
        "epoch,train/box_loss,train/obj_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
        "metrics/mAP_0.5:0.95,val/box_loss,val/obj_loss,val/cls_loss,x/lr0,x/lr1,x/lr2"
    )


def test_distillation_terms_stand_behind_yolov5s_columns() -> None:
    assert columns((*PLAIN, "soft"))[:14] == columns(PLAIN)
    assert columns((*PLAIN, "soft"))[14:] == ("train/soft_loss", "share/soft")


def test_what_was_not_measured_is_empty_in_the_table(tmp_path: Path) -> None:
    write_csv(HISTORY, PLAIN, tmp_path / "results.csv")
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert [row["metrics/mAP_0.5"] for row in rows] == ["", "0.5"]


@pytest.mark.parametrize("terms", [PLAIN, (*PLAIN, "soft", "feat_mse")])
def test_curves_are_a_picture_that_opens(terms: tuple[str, ...], tmp_path: Path) -> None:
    draw_curves(HISTORY, terms, tmp_path / "curves.png", "soft" if len(terms) > 3 else None)
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None
    assert picture.std() > 1


def test_scalars_are_written_only_when_wanted(tmp_path: Path) -> None:
    for on in (True, False):
        with Scalars(tmp_path / str(on), on=on) as scalars:
            scalars.add(HISTORY[1])
    assert list((tmp_path / "True").glob("events.*"))
    assert not (tmp_path / "False").exists()
