from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from compress.config import DistillConfig
from compress.data.dataset import SplitIndex
from compress.data.unlabelled import open_unlabelled, thumbnail, unlabelled_digest
from runtime.errors import EdgestillError, InputError
from tests.compress.data.conftest import write_image


def config(source: Path, **changes: object) -> DistillConfig:
    return DistillConfig.model_validate({"imgsz": 64, "unlabelled": source, "strategy": "label_free"} | changes)


def found(settings: DistillConfig, out: Path, lines: list[str] | None = None) -> SplitIndex:
    index = open_unlabelled(settings, out, (lines if lines is not None else []).append)
    assert index is not None
    return index


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five images in two folders, one file that is damaged, one that is no image."""
    root = tmp_path / "camera"
    for i in range(5):
        write_image(root / f"{'deep/' if i % 2 else ''}{i}.png", seed=i)
    (root / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    (root / "notes.txt").write_text("no image")
    return root


def scene(step: float, noise: int = 0) -> np.ndarray:
    """A grey frame of 160x120 with a bright square at `step` pixels from the left."""
    rng = np.random.default_rng(noise)
    image = rng.normal(100, 4, (120, 160, 3)).clip(0, 255).astype(np.uint8)
    cv2.rectangle(image, (int(step), 40), (int(step) + 40, 80), (220, 220, 220), -1)
    return image


@pytest.fixture
def film(tmp_path: Path) -> Path:
    """60 frames: 30 in which nothing moves, then a square that moves."""
    path = tmp_path / "camera.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (160, 120))
    for number in range(60):
        writer.write(scene(max(0, number - 30) * 3.0, noise=number))
    writer.release()
    return path


def test_a_folder_is_indexed_in_order_and_what_is_damaged_is_told(folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    index = found(config(folder), tmp_path / "out", lines)
    assert [sample.key for sample in index.samples] == ["0.png", "2.png", "4.png", "deep/1.png", "deep/3.png"]
    assert all(sample.labels.shape == (0, 5) and sample.size_hw == (48, 64) for sample in index.samples)
    assert all(sample.image.is_file() for sample in index.samples)
    assert lines[0].endswith(f"unlabelled: 5 images of {folder}; 0 near-duplicates left out")
    assert "broken.jpg" in lines[1]


def test_a_second_look_decodes_nothing_and_finds_the_same(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = found(config(folder), tmp_path / "out")
    monkeypatch.setattr("compress.data.index.decode_image", None)
    again = found(config(folder), tmp_path / "out")
    assert again.sha256 == first.sha256
    assert [sample.image for sample in again.samples] == [sample.image for sample in first.samples]


def test_a_changed_file_is_another_digest(folder: Path, tmp_path: Path) -> None:
    first, quick = found(config(folder), tmp_path / "out").sha256, unlabelled_digest(folder)
    write_image(folder / "0.png", seed=99)
    os.utime(folder / "0.png", (1, 1))
    assert unlabelled_digest(folder) != quick
    assert found(config(folder), tmp_path / "out").sha256 != first


def test_near_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    root = tmp_path / "camera"
    root.mkdir()
    for i, step in enumerate((0, 0, 0, 60, 0, 60, 110)):
        cv2.imwrite(str(root / f"{i}.png"), scene(step, noise=i))
    lines: list[str] = []
    assert [s.key for s in found(config(root), tmp_path / "a", lines).samples] == ["0.png", "3.png", "6.png"]
    assert lines[0].endswith("4 near-duplicates left out")
    assert len(found(config(root, duplicate_threshold=0), tmp_path / "b").samples) == 7


def test_a_change_of_exposure_is_no_difference() -> None:
    dark = scene(30)
    bright = (dark.astype(int) + 20).clip(0, 255).astype(np.uint8)
    assert np.abs(thumbnail(dark) - thumbnail(bright)).mean() < 0.1
    assert np.abs(thumbnail(dark) - thumbnail(scene(60))).mean() > 2


def test_the_frames_of_a_video_become_files_as_large_as_they_are_trained(film: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    index = found(config(film, frame_stride=5), tmp_path / "out", lines)
    numbers = [int(sample.image.stem) for sample in index.samples]
    assert numbers[0] == 0
    assert not any(0 < number <= 30 for number in numbers)
    assert len(numbers) >= 5
    assert all(sample.size_hw == (48, 64) and sample.image.is_file() for sample in index.samples)
    assert all(cv2.imread(str(sample.image)).shape == (48, 64, 3) for sample in index.samples)
    assert f"{len(numbers)} images of {film}, one frame in 5; {12 - len(numbers)} near-duplicates" in lines[-1]


def test_frames_are_as_large_as_the_teacher_sees_them(film: Path, tmp_path: Path) -> None:
    small, large = (found(config(film, teacher_imgsz=side), tmp_path / "out") for side in (None, 128))
    assert {sample.size_hw for sample in small.samples} == {(48, 64)}
    assert {sample.size_hw for sample in large.samples} == {(96, 128)}


def test_another_sampling_takes_other_frames_and_the_same_one_the_same_files(film: Path, tmp_path: Path) -> None:
    one, same, other = (found(config(film, frame_stride=n), tmp_path / "out") for n in (5, 5, 3))
    assert one.sha256 == same.sha256 != other.sha256
    assert one.sha256 == found(config(film, frame_stride=5), tmp_path / "elsewhere").sha256


def test_a_kill_while_frames_are_written_leaves_no_index(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("compress.data.unlabelled.split_to_json", kill)
        with pytest.raises(KeyboardInterrupt):
            found(config(film), tmp_path / "out")
    assert list((tmp_path / "out/unlabelled").iterdir()) == []
    assert found(config(film), tmp_path / "out").samples


def test_another_process_may_have_been_faster(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = found(config(folder), tmp_path / "out")
    (place,) = (tmp_path / "out/unlabelled").iterdir()
    is_dir, asked = Path.is_dir, []

    def not_yet(path: Path) -> bool:  # both processes see that it is absent, then the other one finishes
        if path == place and not asked:
            asked.append(path)
            return False
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", not_yet)
    assert found(config(folder), tmp_path / "out").sha256 == first.sha256
    assert list((tmp_path / "out/unlabelled").iterdir()) == [place]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("absent", None, "no such folder or video"),
        ("empty", {}, "holds no image"),
        ("text.txt", "text", "not a video"),
        ("film.mp4", "no film", "no frame can be read from it"),
        ("bad", {"a.jpg": "no image"}, "no image can be used; first: "),
    ],
)
def test_what_cannot_be_used_is_one_line(name: str, content: object, expected: str, tmp_path: Path) -> None:
    source = tmp_path / name
    if isinstance(content, dict):
        source.mkdir()
        for file, text in content.items():
            (source / file).write_text(text)
    elif content:
        source.write_text(str(content))
    with pytest.raises(InputError, match=expected) as caught:
        found(config(source), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/unlabelled/*"))


def test_a_disk_that_cannot_be_written_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EdgestillError, match="cannot be written"):
        found(config(folder), tmp_path / "out")


def test_without_a_path_there_are_none(tmp_path: Path) -> None:
    assert open_unlabelled(DistillConfig(), tmp_path, print) is None
    assert unlabelled_digest(None) == "none"
