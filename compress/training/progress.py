"""Progress of a training for the user: a progress bar on a terminal, one plain line per epoch elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping


class Progress:
    """Follows the batches of one training, as a context manager; this one shows nothing.

    It is for log files, which get only the epoch lines, and for processes that are not the first.
    """

    def epoch(self, number: int, batches: int) -> None:
        """Epoch `number` (from 1) begins; it has this many batches."""

    def batch(self, losses: Mapping[str, float] | None) -> None:
        """One batch is done; `losses` are the means so far, if they are known without waiting for a device."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        return None


class Bar(Progress):
    """A rich bar over the batches of the running epoch."""

    def __init__(self, epochs: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self._epochs = epochs
        self._rich = RichProgress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"), console=Console(file=sys.stdout), transient=True,
        )  # fmt: skip
        self._task = self._rich.add_task("", losses="")

    def epoch(self, number: int, batches: int) -> None:
        self._rich.reset(self._task, total=batches, description=f"epoch {number}/{self._epochs}")

    def batch(self, losses: Mapping[str, float] | None) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in (losses or {}).items())
        self._rich.update(self._task, advance=1, losses=shown)

    def __enter__(self) -> Bar:
        self._rich.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._rich.stop()


def open_progress(epochs: int, *, shown: bool) -> Progress:
    """The bar if there is a terminal and `shown` is true; else a progress that shows nothing."""
    return Bar(epochs) if shown and sys.stdout.isatty() else Progress()


def epoch_line(record: Mapping[str, float], epochs: int, seconds: float, images: int) -> str:
    """One epoch in one line: losses, accuracy if measured, speed. `record` is a row of results.csv."""
    losses = "  ".join(
        f"{key.removeprefix('train/').removesuffix('_loss')} {value:.4f}"
        for key, value in record.items()
        if key.startswith("train/")
    )
    measured = ""
    if "metrics/mAP_0.5" in record:
        measured = f"  mAP50 {record['metrics/mAP_0.5']:.4f}  mAP50-95 {record['metrics/mAP_0.5:0.95']:.4f}"
    return f"epoch {int(record['epoch']) + 1}/{epochs}  {losses}{measured}  {images / max(seconds, 1e-9):.1f} images/s"
