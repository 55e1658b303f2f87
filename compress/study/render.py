"""study.md and study.png: pure functions of study.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.render import markdown_table
from compress.study.figures import means
from runtime.files import atomic_write

Document = Mapping[str, Any]
NOTHING = "–"


def points(fraction: float | None, *, sign: bool = False) -> str:
    """An mAP, or a difference of two, in points of 100."""
    return NOTHING if fraction is None else f"{round(100 * fraction, 1) + 0.0:{'+' if sign else ''}.1f}"


def interval(difference: Mapping[str, Any]) -> str:
    """A difference with its interval, as in +5.1 [3.9, 6.3]; without brackets for a single pair."""
    mean = points(difference["mean"], sign=True)
    ends = [points(difference[end]) for end in ("low", "high")]
    return mean if NOTHING in ends else f"{mean} [{', '.join(ends)}]"


def to_markdown(study: Document) -> str:
    """Every run, and every two arms compared."""
    titles = ("Arm", *(f"seed {seed}" for seed in range(study["seeds"])), "mean", "ms a step")
    lines = [
        f"# Study: student {study['student']}, {study['epochs']} epochs, {study['imgsz']} pixels",
        "",
        f"mAP50-95 in points on the {study['split']} split, averaged weights (EMA) of the last epoch; "
        f"{study['seeds']} paired seeds.",
        "",
        *markdown_table(titles, list(_arms(study))),
        "",
        "Differences; in brackets the 95 % interval of the mean by Student's t, which needs two seeds:",
        "",
        *markdown_table(("Arm", "against", "difference", "better in"), list(_differences(study))),
    ]
    lines += ["", *(f"- {name} failed: {reason}" for name, reason in study["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _arms(study: Document) -> Iterator[Sequence[str]]:
    reached = {(run["arm"], run["seed"]): run["map50_95"] for run in study["runs"]}
    for arm in study["arms"]:
        seconds = means(study["runs"], arm, "seconds_per_step")
        own = [points(reached.get((arm, seed))) for seed in range(study["seeds"])]
        yield arm, *own, points(means(study["runs"], arm)), NOTHING if seconds is None else f"{1e3 * seconds:.0f}"


def _differences(study: Document) -> Iterator[Sequence[str]]:
    for entry in study["differences"]:
        yield entry["arm"], entry["against"], interval(entry), f"{entry['wins']} of {entry['pairs']}"


def draw(study: Document, file: Path) -> None:
    """Left, every run of every arm with the mean; right, each arm against the first with its interval."""
    from matplotlib.figure import Figure

    arms = study["arms"]
    figure = Figure((9, 1.2 + 0.45 * len(arms)), layout="constrained")
    runs, gaps = figure.subplots(1, 2, sharey=True)
    for row, arm in enumerate(arms):
        values = [100 * run["map50_95"] for run in study["runs"] if run["arm"] == arm]
        runs.plot(values, [row] * len(values), "o", alpha=0.5, color="tab:blue")
        if values:
            runs.plot(sum(values) / len(values), row, "|", markersize=18, color="black")
    for entry in study["differences"]:
        if entry["against"] == arms[0]:
            row, ends = arms.index(entry["arm"]), [entry["low"], entry["high"]]
            gaps.plot(100 * entry["mean"], row, "o", color="tab:blue")
            if None not in ends:
                gaps.plot([100 * end for end in ends], [row, row], color="tab:blue")
    runs.set_yticks(range(len(arms)), arms)
    runs.set_ylim(len(arms) - 0.5, -0.5)
    runs.set_xlabel(f"mAP50-95 in points of 100 on {study['split']}, one dot per seed")
    gaps.axvline(0, color="grey", linewidth=0.8)
    gaps.set_xlabel(f"points against {arms[0]}, 95 % interval")
    for axes in (runs, gaps):
        axes.grid(axis="x", alpha=0.3)
        axes.spines[["top", "right", "left"]].set_visible(False)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})
