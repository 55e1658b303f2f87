"""study.md and study.png: pure functions of study.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.formats import NOTHING, difference, points
from benchmarks.render import markdown_table
from compress.study.figures import means
from runtime.files import atomic_write

Document = Mapping[str, Any]

FACTS = {
    "student": ("student", "scale"),
    "activation": ("student", "activation"),
    "epochs": ("distill", "epochs"),
    "pixels": ("distill", "imgsz"),
    "batch": ("distill", "batch"),
}
"""Facts of a training that a reader must know -> where the study has them. Those that all arms share are the title."""
BLUE, GREY = "tab:blue", "dimgrey"


def to_markdown(study: Document) -> str:
    """Every run beside the teacher, and every two arms compared."""
    seeds, own = study["seeds"], _own_facts(study)
    titles = ("Arm", *own, *(f"seed {seed}" for seed in range(seeds)), "mean", "of the teacher", "ms a step")
    lines = [
        f"# Study: {', '.join(f'{name} {value}' for name, value in _shared_facts(study).items())}",
        "",
        f"mAP50-95 in points of 100 on the {study['images']} images of the {study['split']} split, averaged weights "
        f"(EMA) of the last epoch; {seeds} paired {'seed' if seeds == 1 else 'seeds'}.",
        *([f"{study['shared_images']} of these images are training images too."] if study["shared_images"] else []),
        "",
        *markdown_table(titles, [*_arms(study, own), _teacher(study, own)]),
        "",
        "One pair has no interval: two trainings that differ in nothing but the seed may be as far apart."
        if seeds == 1
        else "Differences, with the 95 % interval of their mean by Student's t in brackets:",
        "",
        *markdown_table(("Arm", "against", "difference", "better in"), list(_differences(study))),
    ]
    lines += ["", *(f"- {name} failed: {reason}" for name, reason in study["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _fact(study: Document, arm: str, name: str) -> Any:
    group, key = FACTS[name]
    return study["trainings"][arm][group][key]


def _shared_facts(study: Document) -> dict[str, Any]:
    """The facts that all arms share, without those that nobody set."""
    first, own = study["arms"][0], _own_facts(study)
    values = {name: _fact(study, first, name) for name in FACTS if name not in own}
    return {name: value for name, value in values.items() if value is not None}


def _own_facts(study: Document) -> tuple[str, ...]:
    """The facts in which arms differ."""
    return tuple(name for name in FACTS if len({_fact(study, arm, name) for arm in study["arms"]}) > 1)


def _arms(study: Document, own: Sequence[str]) -> Iterator[Sequence[str]]:
    reached = {(run["arm"], run["seed"]): run["map50_95"] for run in study["runs"]}
    for arm in study["arms"]:
        mean, seconds = means(study["runs"], arm), means(study["runs"], arm, "seconds_per_step")
        yield (
            arm,
            *(str(_fact(study, arm, name) or "as at the start") for name in own),
            *(points(reached.get((arm, seed))) for seed in range(study["seeds"])),
            points(mean),
            _share(study, mean),
            NOTHING if seconds is None else f"{1e3 * seconds:.0f}",
        )


def _teacher(study: Document, own: Sequence[str]) -> Sequence[str]:
    reached = study["teacher"]["map50_95"]
    return ("teacher", *[""] * (len(own) + study["seeds"]), points(reached), _share(study, reached), "")


def _share(study: Document, reached: float | None) -> str:
    """An accuracy as a share of the teacher's."""
    teacher = study["teacher"]["map50_95"]
    return f"{100 * reached / teacher:.0f} %" if reached is not None and teacher else NOTHING


def _differences(study: Document) -> Iterator[Sequence[str]]:
    for entry in study["differences"]:
        yield entry["arm"], entry["against"], difference(entry), f"{entry['wins']} of {entry['pairs']}"


def draw(study: Document, file: Path) -> None:
    """Left, every run of every arm with the mean, and the teacher; right, each arm against the first."""
    from matplotlib.figure import Figure

    arms = study["arms"]
    figure = Figure((10, 1.6 + 0.55 * len(arms)), layout="constrained")
    runs, gaps = figure.subplots(1, 2, sharey=True)
    for row, arm in enumerate(arms):
        _draw_runs(runs, row, [100 * run["map50_95"] for run in study["runs"] if run["arm"] == arm])
    _draw_teacher(runs, 100 * study["teacher"]["map50_95"])
    for entry in study["differences"]:
        if entry["against"] == arms[0]:
            _draw_difference(gaps, arms.index(entry["arm"]), entry)
    runs.set_yticks(range(len(arms)), arms, parse_math=False)  # a name may hold dollars
    runs.set_ylim(len(arms) - 0.4, -0.75)
    runs.set_xlabel(f"mAP50-95 in points of 100 on {study['split']}: seeds, and their mean")
    gaps.axvline(0, color=GREY, linewidth=0.8)
    unit = ", 95 % interval" if study["seeds"] > 1 else ", one pair"
    gaps.set_xlabel(f"points against {arms[0]}{unit}", parse_math=False)
    for axes in (runs, gaps):
        axes.margins(x=0.12)
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.suptitle(", ".join(f"{name} {value}" for name, value in _shared_facts(study).items()), fontsize=10)
    with atomic_write(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})


def _draw_runs(axes: Any, row: int, values: Sequence[float]) -> None:
    if not values:
        axes.annotate("no run", (0.02, row), xycoords=("axes fraction", "data"), va="center", color=GREY)
        return
    mean = sum(values) / len(values)
    axes.plot(values, [row] * len(values), "o", alpha=0.5, color=BLUE)
    axes.plot(mean, row, "|", markersize=18, color="black")
    _label(axes, f"{mean:.1f}", (mean, row))


def _draw_teacher(axes: Any, value: float) -> None:
    axes.axvline(value, color=GREY, linewidth=1, linestyle="--")
    at = {"xytext": (-4, 0), "textcoords": "offset points", "ha": "right", "fontsize": 8}
    axes.annotate(f"teacher {value:.1f}", (value, -0.45), **at)


def _draw_difference(axes: Any, row: int, entry: Mapping[str, Any]) -> None:
    ends = [entry["low"], entry["high"]]
    axes.plot(100 * entry["mean"], row, "o", color=BLUE)
    if None not in ends:
        axes.plot([100 * end for end in ends], [row, row], color=BLUE)
    _label(axes, difference(entry), (100 * entry["mean"], row))


def _label(axes: Any, text: str, at: tuple[float, float]) -> None:
    axes.annotate(text, at, xytext=(0, 9), textcoords="offset points", ha="center", va="bottom", fontsize=8)
