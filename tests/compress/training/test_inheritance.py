"""Where a student's first weights come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pydantic import ValidationError

from compress.config import StudentConfig, TrainConfig
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, load_model, save_model
from compress.stages.teacher import train
from compress.training.inheritance import INHERITANCE, check_start, inherit_from, inherits, new_student, source_of
from compress.training.objective import Objective, detection_loss
from runtime.errors import UsageError

from .toys import NAMES, Noise, batch, config, network, quiet

TEACHER = Architecture.of_scale("n", NAMES, layout="v4", activation="LeakyReLU")


def student(init: str, scale: str | None, weights: Path | None = None, activation: str | None = None) -> StudentConfig:
    return StudentConfig.model_validate({"init": init, "scale": scale, "weights": weights, "activation": activation})


def own_weights(folder: Path, scale: str) -> Path:
    file = folder / f"{scale}.safetensors"
    save_model(YOLOv5(Architecture.of_scale(scale, NAMES, layout="v2", activation="Hardswish")), file)
    return file


@pytest.mark.parametrize(
    ("init", "scale", "weights", "from_slices", "layout", "activation"),
    [
        ("auto", "p", None, "teacher", "v4", "LeakyReLU"),
        ("inherit", "p", None, "teacher", "v4", "LeakyReLU"),
        ("scratch", "p", None, None, "v6", "SiLU"),
        ("auto", "s", None, None, "v6", "SiLU"),  # wider than the teacher
        ("auto", "p", "n", "weights", "v2", "Hardswish"),
        ("inherit", "p", "n", "weights", "v2", "Hardswish"),
        ("auto", "p", "p", None, "v2", "Hardswish"),  # a copy
        ("auto", None, "p", None, "v2", "Hardswish"),
        ("inherit", "p", "p", "weights", "v2", "Hardswish"),
    ],
)
def test_a_student_is_like_the_network_that_it_starts_from(
    init: str, scale: str | None, weights: str | None, from_slices: str | None, layout: str, activation: str,
    tmp_path: Path,
) -> None:  # fmt: skip
    file = own_weights(tmp_path, weights) if weights else None
    config, teacher = student(init, scale, file), YOLOv5(TEACHER)
    source = source_of(config, teacher, quiet)
    assert {None: None, teacher: "teacher"}.get(source, "weights") == from_slices
    made = new_student(config, NAMES, source=source, anchors=TEACHER.anchors, log=quiet)
    assert (made.arch.layout, made.arch.activation, made.arch.scale) == (layout, activation, scale or weights)


@pytest.mark.parametrize(("name", "kind"), [("silu", "SiLU"), ("relu", "ReLU")])
@pytest.mark.parametrize("init", ["scratch", "inherit"])
def test_the_activation_of_the_recipe_wins(init: str, name: str, kind: str) -> None:
    config = student(init, "p", activation=name)
    source = YOLOv5(TEACHER) if init == "inherit" else None
    assert new_student(config, NAMES, source=source, log=quiet).arch.activation == kind


def test_scratch_and_weights_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="give one of both"):
        StudentConfig(init="scratch", weights=tmp_path / "own.safetensors")


def test_a_student_that_is_no_slice_starts_from_scratch_unless_slices_or_weights_were_asked_for(tmp_path: Path) -> None:
    lines: list[str] = []
    assert not inherits(student("auto", "s"), TEACHER, lines.append)
    assert lines == ["the student starts from scratch: the student is wider (0.5) than the larger network (0.25)"]
    with pytest.raises(UsageError, match="is wider"):
        inherits(student("inherit", "s"), TEACHER, quiet)
    with pytest.raises(UsageError, match="is wider"):
        check_start(student("auto", "s", own_weights(tmp_path, "n")))


def test_without_any_network_there_is_nothing_to_inherit() -> None:
    assert source_of(student("auto", "p"), None, quiet) is None
    with pytest.raises(UsageError, match="no network to inherit from"):
        source_of(student("inherit", "p"), None, quiet)


@pytest.mark.usefixtures("one_thread")
def test_a_training_starts_from_slices_of_larger_weights_of_other_classes(tiny_data: Dataset, tmp_path: Path) -> None:
    """The rest is frozen: what is written is what the training began with."""
    settings = TrainConfig(
        epochs=1, batch=4, imgsz=64, val_interval=1, workers=0, tensorboard=False, freeze=24, autoanchor=False
    )
    larger = network("n")
    save_model(larger, tmp_path / "n.safetensors")
    lines: list[str] = []
    start = student("auto", "p", tmp_path / "n.safetensors", "relu")
    result = train(settings, data=tiny_data, out=tmp_path / "out", start=start, device="cpu", log=lines.append)
    assert [line for line in lines if line.startswith("inherited ")]
    found = json.loads((tmp_path / "out" / INHERITANCE).read_text())
    assert found["classes"] == []
    assert 0.9 * found["total"] < found["parameters"] < found["total"]
    own = load_model(result.last)
    assert (own.arch.names, own.arch.activation, own.arch.scale) == (tiny_data.names, "ReLU", "p")
    theirs = larger.model[0].conv.weight
    assert all(bool((theirs == kernel).all((1, 2, 3)).any()) for kernel in own.model[0].conv.weight)


@pytest.mark.usefixtures("one_thread")
def test_a_head_for_other_anchors_is_fitted_to_the_boxes_of_the_larger_network(tmp_path: Path) -> None:
    source, settings = network("n", seed=1), config(losses={}, batch=4)
    wider = tuple(tuple((2.5 * w, 2.5 * h) for w, h in level) for level in source.arch.anchors)
    rows = []
    for anchors in (source.arch.anchors, wider):
        model = new_student(student("auto", "p"), NAMES, source=source, anchors=anchors, log=quiet)
        objective = Objective(model, detection_loss(model, settings))
        inherit_from(source, objective, cast(Any, Noise(8)), settings, "cpu", tmp_path, quiet)
        with torch.no_grad():
            rows.append(model.eval().decode(model(batch(0).images / 255)))
    torch.testing.assert_close(rows[1][..., 2:4], rows[0][..., 2:4], rtol=0.15, atol=0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("labelled", [0, 8])
def test_the_label_loss_at_the_start_is_told_where_a_label_is_known(labelled: int, tmp_path: Path) -> None:
    source, settings, images = network("n", seed=1), config(losses={}, batch=4), Noise(8)
    images.labelled = labelled
    model = new_student(student("auto", "p"), NAMES, source=source, log=quiet)
    objective = Objective(model, detection_loss(model, settings))
    lines: list[str] = []
    inherit_from(source, objective, cast(Any, images), settings, "cpu", tmp_path, lines.append)
    told = json.loads((tmp_path / INHERITANCE).read_text())
    losses = [told[key] for key in ("loss_from_scratch", "loss_before_first_step")]
    assert all(part > 0 for loss in losses for part in loss.values()) if labelled else losses == [None, None]
    assert ("not known" in lines[0]) == (not labelled)
