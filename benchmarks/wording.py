"""Names of rows, and the sentences of a report. Pure functions of the report's JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.formats import (
    accuracy,
    count,
    difference,
    digest_start,
    fraction,
    moment,
    number,
    percent,
)
from benchmarks.rows import (
    FULL,
    Row,
    ap,
    has_rounds,
    identities,
    is_clearly_faster,
    is_kept,
    is_timed_here,
    preference,
    shared_settings,
    spread,
    time_over,
    time_text,
)

FEW_IMAGES = 100
USELESS = 0.01
"""mAP50-95 below which a student is no detector."""
MAIN_SETTINGS = ("imgsz", "batch", "conf", "iou", "max_det")


def label(row: Row, rows: Sequence[Row] = ()) -> str:
    """Shortest name of a row: its role and precision, with backend or file if that is not enough."""
    options = (
        lambda other: f"{other['role']} {other['precision']}",
        lambda other: f"{other['role']} {other['precision']} {other['backend']}",
        lambda other: other["file"],
    )
    own = [name(row) for name in options]
    unique = (text for name, text in zip(options, own, strict=True) if [name(other) for other in rows].count(text) <= 1)
    return next(unique, own[-1])


def summary(data: Mapping[str, Any]) -> list[str]:
    """The facts to know before the figures are compared with others."""
    settings, dataset = shared_settings(data["models"]), data["dataset"]
    lines = [f"Measured {moment(data['created'])} on {machine_name(data['machine'])}"]
    if dataset:
        lines.append(f"Data: {dataset['name']}, {count(dataset['images'])} images{labelled(dataset)}")
    shared = [f"{key} {number(settings[key])}" for key in MAIN_SETTINGS if key in settings]
    lines += ["Settings: " + ", ".join(shared)] if shared else []
    turns = ", the files in turns" if any(map(has_rounds, data["models"])) else ""
    return [*lines, f"Latency is milliseconds from {timed_span(data['models'])}{turns}"]


def timed_span(rows: Sequence[Row]) -> str:
    """The time that one latency covers: that of a frame, or of all frames of a call."""
    if _one_frame_a_call(rows):
        return "decoded frame to final boxes"
    return "the decoded frames of a call to the final boxes of all"


def short_span(rows: Sequence[Row]) -> str:
    """`timed_span` in the words that fit the axis of a chart."""
    return "frame to boxes" if _one_frame_a_call(rows) else "all frames of a call to boxes"


def _one_frame_a_call(rows: Sequence[Row]) -> bool:
    return all(row["settings"]["batch"] == 1 for row in rows)


def labelled(dataset: Mapping[str, Any]) -> str:
    return "" if dataset["instances"] is None else f", {count(dataset['instances'])} objects"


def machine_name(machine: Mapping[str, Any]) -> str:
    gpus = [gpu["name"] for gpu in machine.get("gpus", [])]
    cpu = str(machine.get("cpu", "an unknown CPU"))
    return ", ".join([*gpus, cpu]) + (f" ({machine['cores']} cores)" if machine.get("cores") else "")


# ---------------------------------------------------------------------------------------------------------- sentences


def findings(data: Mapping[str, Any]) -> list[str]:
    """Conclusions from the figures; those against a file come first."""
    rows = data["models"]
    parts = (weak_student, choice, _models, _settings, _refusals, _quantised, _slower_students, _unsteady)
    sentences = [sentence for part in parts for sentence in part(rows)]
    sentences += [*_gain(data.get("gain")), *_idle_engines(data.get("engines", ())), *_few_images(data)]
    return [*sentences, *data.get("notes", ())]


def weak_student(rows: Sequence[Row]) -> Iterator[str]:
    """A student that was hardly trained is small and fast, and its report would look like a success."""
    best = max((row for row in rows if row["role"] == "student" and row["accuracy"]), key=ap, default=None)
    if best and ap(best) < USELESS:
        found = f"{best['file']} has an mAP50-95 of {fraction(ap(best))}"
        yield f"The student finds next to nothing: {found}. Train longer, and check the labels, before anything else."


def choice(rows: Sequence[Row]) -> Iterator[str]:
    """The file of a gated student that a user of the measured machine should take, and why none of the others."""
    students = [row for row in rows if row["role"] == "student"]
    offered = [row for row in students if is_kept(row) and is_timed_here(row) and has_rounds(row)]
    several = any(len(found) > 1 for found in (identities(students), {row["device"] for row in students}))
    if several or not offered or not any(row["gate"] for row in students):
        return
    best = min(offered, key=preference)
    where = f"{best['device']} in {best['backend']}"
    yield f"Of the files that passed their gates take {best['file']} here: on {where} it has {_figures(best)}."
    if others := [row for row in students if row is not best]:
        reasons = (f"{row['file']} {_against(row, best)}" for row in others)
        yield f"Not the others: {'; '.join(reasons)}."


def _against(row: Row, best: Row) -> str:
    """Why a file is not the one to take."""
    if not is_kept(row):
        return "was refused by its gate"
    if not is_timed_here(row):
        return "is made for another library or device, so its time here says nothing"
    found = time_over(row, best)
    return f"{'is slower' if found and found.low > 1 else 'is not clearly faster'}, with {_figures(row)}"


def _figures(row: Row) -> str:
    """Latency, and the loss against FP32 that the gate measured."""
    drop = (row["gate"] or {}).get("drop")
    loss = "" if drop is None else f", a loss of {accuracy(drop)} mAP50-95 {spread(row)}".rstrip()
    return time_text(row) + loss


def inherited(found: Row | None) -> str:
    """The sentence on a student that started from slices, with its label loss at the start; empty for others."""
    if not found:
        return ""
    parts = [f"{percent(found['parameters'] / found['total'])} of its parameters"]
    start, scratch = (found.get(key) for key in ("loss_before_first_step", "loss_from_scratch"))
    if start and scratch:
        each = (f"{name} {fraction(loss)} ({fraction(scratch[name])})" for name, loss in start.items())
        parts.append(f"label loss before the first step (from scratch) {', '.join(each)}")
    if found.get("fresh"):
        parts.append(f"new blocks {', '.join(found['fresh'])}")
    return f"The student started from slices of a larger network: {'; '.join(parts)}."


def first_gain(gain: Row | None) -> str:
    """The gain over the labels-alone arm that is nearest to the run, with its name; empty where none was measured."""
    first = next(iter(gain["over"]), None) if gain else None
    return f"{difference(first)} points over labels alone ({first['against']})" if first else ""


def _gain(gain: Row | None) -> Iterator[str]:
    """The gain over the same student on labels alone, or why nobody knows it."""
    if gain is None:
        return
    for entry in gain["over"]:
        pairs = f"{entry['pairs']} paired seeds" if entry["pairs"] > 1 else "a single pair, which has no interval"
        yield (
            f"{difference(entry)} points of mAP50-95 over the same student trained on labels alone "
            f"({entry['against']}; {pairs}, {gain['split']} split, study {gain['study']})."
        )
    if gain["missing"]:
        yield f"Not measured: what the student gains over the same student trained on labels alone; {gain['missing']}."


def _models(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each role whose files are of several models, which says which is which."""
    for role in ("teacher", "student"):
        of_role = [row for row in rows if row["role"] == role]
        found = identities(of_role)
        if len(found) > 1:
            files = (", ".join(row["file"] for row in of_role if row.get("identity") == one) for one in found)
            each = "; ".join(f"{names}: {digest_start(one)}" for names, one in zip(files, found, strict=True))
            yield f"The {role} files are {len(found)} models, so none of them stands for the others: {each}."


def _settings(rows: Sequence[Row]) -> Iterator[str]:
    """One sentence for each setting in which the files differ, apart from `as_written`: each row's note tells that."""
    shared = {"as_written", *shared_settings(rows)}
    for key in rows[0]["settings"] if rows else ():
        if key not in shared:
            files: dict[str, list[str]] = {}
            for row in rows:
                files.setdefault(number(row["settings"][key]), []).append(row["file"])
            each = "; ".join(f"{value} for {', '.join(names)}" for value, names in files.items())
            yield f"{key} differs, so the files are not directly comparable: {each}."


def _refusals(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if not is_kept(row):
            yield f"{row['file']} was refused by its gate: {row['gate']['reason']}."


def _quantised(rows: Sequence[Row]) -> Iterator[str]:
    """Each reduced precision against FP32 of the same role and device, where its latency says something."""
    for row in filter(is_timed_here, rows):
        full = _full_precision(row, rows)
        found = time_over(row, full) if full else None
        if full is None or found is None:
            continue
        figures = " against ".join(map(time_text, (row, full)))
        answer = "is faster than" if is_clearly_faster(found) else "is not clearly faster than"
        backends = " against ".join(dict.fromkeys((row["backend"], full["backend"])))
        yield f"{row['precision']} {answer} fp32 on this machine ({row['role']}, {backends}): {figures}."


def _full_precision(row: Row, rows: Sequence[Row]) -> Row | None:
    """FP32 beside a row of another precision; in the same backend, if it was measured there too."""
    same = [other for other in rows if all(other.get(key) == row.get(key) for key in ("role", "device", "identity"))]
    full = sorted((r for r in same if r["precision"] == FULL), key=lambda other: other["backend"] != row["backend"])
    return full[0] if full and row["precision"] != FULL else None


def _slower_students(rows: Sequence[Row]) -> Iterator[str]:
    timed = [row for row in rows if is_timed_here(row)]
    for teacher in (row for row in timed if row["role"] == "teacher"):
        for row in timed:
            comparable = row["role"] == "student" and row["device"] == teacher["device"]
            found = time_over(row, teacher) if comparable else None
            if found and found.ratio >= 1:
                yield f"{row['file']} is not faster than the teacher's {teacher['file']}."


def _unsteady(rows: Sequence[Row]) -> Iterator[str]:
    timed = [row for row in rows if row["latency"]]
    drifted = [row["file"] for row in timed if not (row["latency"]["steady"] and row["latency"]["warmup"]["settled"])]
    if drifted:
        files = "all files" if len(drifted) == len(timed) > 1 else ", ".join(drifted)
        yield f"The latency of {files} drifted while it was measured: repeat it on a quiet machine."


def _idle_engines(engines: Sequence[Row]) -> Iterator[str]:
    for engine in engines:
        if not engine["ran"]:
            built = f"built for {', '.join(engine['targets'])} and " if engine["targets"] else ""
            state = "not built" if engine["bytes"] is None else f"{built}not run on this machine"
            yield f"{engine['file']} was {state}: {engine.get('note') or 'it does not match'}."


def _few_images(data: Mapping[str, Any]) -> Iterator[str]:
    images = [row["accuracy"]["images"] for row in data["models"] if row["accuracy"]]
    if images and min(images) < FEW_IMAGES:
        yield f"Accuracy is measured on {min(images)} images: differences of a few points are noise."
