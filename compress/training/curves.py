"""The record of a training: results.csv in YOLOv5's columns, TensorBoard scalars, and an image of the curves."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.files import atomic_write

Record = dict[str, float]
"""One epoch; keys are columns of results.csv. An epoch without validation lacks the keys of `METRICS` and `VAL`."""

METRICS = ("metrics/precision", "metrics/recall", "metrics/mAP_0.5", "metrics/mAP_0.5:0.95")
VAL = ("val/box_loss", "val/obj_loss", "val/cls_loss")
TEACHER_TERM = "teacher"
"""The label loss of a teacher that trains too, among the terms of a distillation."""
RATES = ("x/lr0", "x/lr1", "x/lr2")


def columns(terms: Sequence[str]) -> tuple[str, ...]:
    """Column names in YOLOv5's order; at the end the losses beyond its three (distillation) and their shares."""
    train = tuple(f"train/{term}_loss" for term in terms)
    return ("epoch", *train[:3], *METRICS, *VAL, *RATES, *train[3:], *map(share_column, _distilled(terms)))


def _distilled(terms: Sequence[str]) -> list[str]:
    """The terms that are distillation losses."""
    return [term for term in terms[3:] if term != TEACHER_TERM]


def share_column(term: str) -> str:
    """The column of a distillation loss's gradient at the neck, as a share of the reference's (`gradient_of`)."""
    return f"share/{term}"


def gradient_of(reference: str | None) -> str:
    """The gradient that shares are parts of: the labels', or where no label is known that of the loss `reference`."""
    return f"the gradient of {reference}" if reference else "the labels' gradient"


def write_csv(history: Sequence[Mapping[str, float]], terms: Sequence[str], path: Path) -> None:
    """Publish the whole history at `path`; cells of what was not measured in an epoch stay empty."""
    text, names = io.StringIO(), columns(terms)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_cell(name, record) for name in names] for record in history)
    with atomic_write(path) as temporary:
        temporary.write_text(text.getvalue())


def _cell(name: str, record: Mapping[str, float]) -> str:
    if name not in record:
        return ""
    return str(int(record[name])) if name == "epoch" else f"{record[name]:.6g}"


def draw_curves(
    history: Sequence[Mapping[str, float]], terms: Sequence[str], path: Path, reference: str | None = None
) -> None:
    """Publish a PNG with one small chart for each loss, the accuracies and the learning rate.

    `reference` is the loss whose gradient the shares are parts of; None means the labels'.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    charts = _charts(terms, reference)
    rows = -(-len(charts) // 3)
    figure = Figure(figsize=(12, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, keys) in zip(figure.subplots(rows, 3, squeeze=False).flat, charts.items(), strict=False):
        _draw(axes, title, keys, history)
    for axes in figure.axes[len(charts) :]:
        axes.remove()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)


def _charts(terms: Sequence[str], reference: str | None) -> dict[str, dict[str, str]]:
    """`{title: {legend: column}}`."""
    losses = {f"{term} loss": {"train": f"train/{term}_loss", "val": f"val/{term}_loss"} for term in terms}
    shares = {term: share_column(term) for term in _distilled(terms)}
    return (
        losses
        | ({f"share of {gradient_of(reference)}": shares} if shares else {})
        | {
            "mAP": {"0.5": METRICS[2], "0.5:0.95": METRICS[3]},
            "precision and recall": {"precision": METRICS[0], "recall": METRICS[1]},
            "learning rate": {"biases": RATES[0], "weights": RATES[1]},
        }
    )


def _draw(axes: Any, title: str, keys: Mapping[str, str], history: Sequence[Mapping[str, float]]) -> None:
    for legend, key in keys.items():
        points = [(record["epoch"] + 1, record[key]) for record in history if key in record]
        if points:
            axes.plot(*zip(*points, strict=True), label=legend, marker=".", markersize=4, linewidth=1.5)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False, fontsize=8)


class Scalars:
    """TensorBoard scalars of each epoch under `folder`; does nothing when off."""

    def __init__(self, folder: Path, *, on: bool, start: int = 0) -> None:
        self._writer: Any = None
        if on:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides what a killed run wrote after the epoch from which the resumed one starts
            self._writer = SummaryWriter(str(folder), purge_step=start or None)

    def add(self, record: Mapping[str, float]) -> None:
        if self._writer:
            for key, value in record.items():
                if key != "epoch":
                    self._writer.add_scalar(key, value, int(record["epoch"]))
            self._writer.flush()

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer:
            self._writer.close()
