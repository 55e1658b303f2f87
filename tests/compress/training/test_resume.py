from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.config import StudentConfig, TrainConfig
from compress.data import Dataset
from compress.data.dataset import SplitIndex
from compress.training.resume import Origin, origin_of, read_resume
from compress.training.state import STATE, load_state, save_state
from runtime.errors import InputError, UsageError

from .toys import network

CONFIG = TrainConfig(epochs=9, batch=4, imgsz=64)


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    file = tmp_path / "teacher.safetensors"
    file.write_bytes(b"a teacher")
    return file


def begun(out: Path, origin: Origin, config: TrainConfig = CONFIG) -> Path:
    """A folder with the state of a training that began with these."""
    state = {
        "config": config.model_dump(mode="json"),
        "origin": asdict(origin),
        "architecture": network().arch.to_json(),
    }
    out.mkdir()
    save_state(state, out / STATE)
    return out


def refusal(out: Path, origin: Origin, config: TrainConfig = CONFIG) -> str:
    with pytest.raises(UsageError) as caught:
        read_resume(out, config, origin)
    text = str(caught.value)
    assert f"--weights {out / 'last.safetensors'}" in text
    assert "\n" not in text
    return text


def with_train(data: Dataset, index: SplitIndex) -> Dataset:
    return replace(data, splits={**data.splits, "train": index})


def test_the_same_start_is_resumed(tiny_data: Dataset, teacher: Path, tmp_path: Path) -> None:
    said: dict[str, Any] = {
        "teachers": [teacher],
        "start": StudentConfig(scale="p", weights=teacher, activation="silu"),
    }
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data, **said))
    assert read_resume(out, CONFIG, origin_of(CONFIG, tiny_data, **said))["config"]["epochs"] == 9
    assert read_resume(out, CONFIG, origin_of(CONFIG, tiny_data))


def test_a_teacher_is_its_content_and_not_its_name(tiny_data: Dataset, teacher: Path, tmp_path: Path) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data, teachers=[teacher]))
    moved = teacher.rename(tmp_path / "moved.safetensors")
    assert read_resume(out, CONFIG, origin_of(CONFIG, tiny_data, teachers=[moved]))
    moved.write_bytes(b"another teacher")
    assert "trained with teacher = sha256 " in refusal(out, origin_of(CONFIG, tiny_data, teachers=[moved]))


def test_other_unlabelled_images_are_told(tiny_data: Dataset, tmp_path: Path) -> None:
    one, other = (tiny_data.splits[split] for split in ("train", "val"))
    said: dict[str, Any] = {"unlabelled": tmp_path / "images", "unlabelled_images": one}
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data, **said))
    assert read_resume(out, CONFIG, origin_of(CONFIG, tiny_data, **said | {"unlabelled": tmp_path / "moved"}))
    changed = origin_of(CONFIG, tiny_data, **said | {"unlabelled_images": other})
    assert "trained with unlabelled images = sha256 " in refusal(out, changed)
    out = begun(tmp_path / "plain", origin_of(CONFIG, tiny_data))
    assert "unlabelled images = None, not sha256 " in refusal(out, origin_of(CONFIG, tiny_data, **said))


def test_fewer_images_are_counted(tiny_data: Dataset, tmp_path: Path) -> None:
    out, train = begun(tmp_path / "run", origin_of(CONFIG, tiny_data)), tiny_data.splits["train"]
    fewer = with_train(tiny_data, SplitIndex(train.samples[:3], ()))
    assert "training images = 10, not 3" in refusal(out, origin_of(CONFIG, fewer))


@pytest.mark.parametrize(
    "change", [{"labels": np.zeros((0, 5), np.float32)}, {"sha256": "0" * 64}, {"key": "other.png"}]
)
def test_as_many_images_that_are_others_are_told(tiny_data: Dataset, tmp_path: Path, change: dict[str, Any]) -> None:
    out, train = begun(tmp_path / "run", origin_of(CONFIG, tiny_data)), tiny_data.splits["train"]
    other = with_train(tiny_data, SplitIndex((*train.samples[:-1], replace(train.samples[-1], **change)), ()))
    assert "training data = sha256 " in refusal(out, origin_of(CONFIG, other))


def test_start_weights_where_there_were_none_are_told(tiny_data: Dataset, teacher: Path, tmp_path: Path) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data))
    start = StudentConfig(scale=None, weights=teacher)
    assert "start weights = None, not sha256" in refusal(out, origin_of(CONFIG, tiny_data, start=start))


def test_another_scale_than_the_networks_is_told(tiny_data: Dataset, tmp_path: Path) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data))
    assert read_resume(out, CONFIG, origin_of(CONFIG, tiny_data, start=StudentConfig(scale="p")))
    assert "scale = p, not s" in refusal(out, origin_of(CONFIG, tiny_data, start=StudentConfig(scale="s")))


@pytest.mark.parametrize(
    ("change", "expected"),
    [({"activation": "relu"}, "activation = SiLU, not ReLU"), ({"init": "scratch"}, "init = auto, not scratch")],
)
def test_another_start_is_told(tiny_data: Dataset, tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data))
    other = StudentConfig.model_validate({"scale": "p"} | change)
    assert expected in refusal(out, origin_of(CONFIG, tiny_data, start=other))


def test_another_number_of_processes_is_told(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "processes = 1, not 2" in refusal(out, origin_of(CONFIG, tiny_data))


def test_another_batch_is_a_setting(tiny_data: Dataset, tmp_path: Path) -> None:
    out, other = begun(tmp_path / "run", origin_of(CONFIG, tiny_data)), CONFIG.model_copy(update={"batch": 5})
    assert "batch = 4, not 5" in refusal(out, origin_of(other, tiny_data), other)


def test_a_setting_that_has_another_name_now_is_named(tiny_data: Dataset, tmp_path: Path) -> None:
    out = begun(tmp_path / "run", origin_of(CONFIG, tiny_data))
    state = load_state(out / STATE)
    save_state(state | {"config": state["config"] | {"amp": True}}, out / STATE)
    assert "state.pt: unknown key 'amp'" in refusal(out, origin_of(CONFIG, tiny_data))


def test_a_folder_without_a_state_has_nothing_to_resume(tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to resume"):
        read_resume(tmp_path, CONFIG, origin_of(CONFIG, tiny_data))
