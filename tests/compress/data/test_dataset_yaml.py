from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data import load_data
from runtime.errors import EdgestillError, InputError, UsageError
from tests.compress.data.conftest import write_image

Write = Callable[[str], Path]
NAMES = "names: [cat, dog]\n"


def test_folders_are_read_sorted_and_recursively(dataset: Path) -> None:
    nested = dataset.parent / "images/train/a/deep"
    nested.mkdir(parents=True)
    shutil.move(dataset.parent / "images/train/3.png", nested / "3.PNG")
    (dataset.parent / "images/train/notes.md").write_text("not an image")
    data = load_data(dataset)
    assert [image.name for image in data.splits["train"]] == ["0.png", "1.png", "2.png", "3.PNG"]
    assert data.names == ("cat", "dog")
    assert set(data.splits) == {"train", "val"}
    assert data.root == dataset.parent


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [cat, dog]", ("cat", "dog")),
        ("names:\n  1: dog\n  0: cat", ("cat", "dog")),
        ("names:\n- cat\n- dog\nnc: 2", ("cat", "dog")),
        ("names: {0: no, 1: on}", ("no", "on")),
        ("names: ['0', 1.0]", ("0", "1.0")),
        ("names: [0, 1, 2]", ("0", "1", "2")),
        ("names: {0: true, 1: 007}", ("true", "007")),
        ("nc: 1\nnames: ['traffic light']", ("traffic light",)),
    ],
)
def test_names_are_a_list_or_a_map_and_always_text(write_yaml: Write, names: str, expected: tuple[str, ...]) -> None:
    assert load_data(write_yaml(f"train: images/train\nval: images/val\n{names}\n")).names == expected


@pytest.mark.parametrize(
    ("names", "what"),
    [
        ("", "names is nothing"),
        ("names: []", "names has nothing"),
        ("names: {0: cat, 2: dog}", "key '2'"),
        ("names: {cat: 0}", "key 'cat'"),
        ("names: [cat, cat]", "'cat' twice"),
        ("names: {0: cat, 0: dog}", "appears twice"),
        ("names: [cat, [dog]]", "names has a list"),
        ("names: [cat, '']", "names has nothing"),
        ("names: [cat, dog]\nnc: 3", "nc is '3' but names has 2"),
        ("names: 7", "names is '7'"),
    ],
)
def test_wrong_names_are_named_in_one_line(write_yaml: Write, names: str, what: str) -> None:
    with pytest.raises(InputError, match=r"data\.yaml") as caught:
        load_data(write_yaml(f"train: images/train\nval: images/val\n{names}\n"))
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", ["3", "[3]", "[3, 4]", "[0x3, 2]", "[-1, 2]", "[[3], 2]", "{a: b}"])
def test_a_wrong_shape_of_key_points_is_named(write_yaml: Write, shape: str) -> None:
    with pytest.raises(InputError, match=r"kpt_shape is .*, expected"):
        load_data(write_yaml(f"train: images/train\nval: images/val\n{NAMES}kpt_shape: {shape}\n"))


def test_classes_without_names_are_numbered(write_yaml: Write) -> None:
    data = load_data(write_yaml("train: images/train\nval: images/val\nnc: 3\n"))
    assert data.names == ("class0", "class1", "class2")
    assert data.notices == ("no names: the 3 classes are called class0 to class2",)


@pytest.mark.parametrize("nc", ["0", "-1", "many", "[1]", "1e3", "99999"])
def test_a_wrong_number_of_classes_is_no_list_of_names(write_yaml: Write, nc: str) -> None:
    with pytest.raises(InputError, match="names is nothing"):
        load_data(write_yaml(f"train: images/train\nval: images/val\nnc: {nc}\n"))


def test_a_relative_path_starts_at_the_folder_of_the_yaml_and_an_absolute_one_is_taken(
    dataset: Path, tmp_path: Path
) -> None:
    beside = tmp_path / "elsewhere" / "d.yaml"
    beside.parent.mkdir()
    for path in ("../set", str(dataset.parent)):
        beside.write_text(f"path: {path}\ntrain: images/train\nval: images/val\n{NAMES}")
        assert len(load_data(beside).splits["train"]) == 4


def test_list_files_folders_and_lists_of_both_can_be_mixed(dataset: Path) -> None:
    root = dataset.parent
    (root / "lists").mkdir()
    (root / "lists/some.txt").write_text(
        f"./../images/train/0.png\r\n\nimages/train/1.png\n{root}/images/train/2.png\n"
    )
    dataset.write_text(f"train: [lists/some.txt, images/val]\nval: [images/val]\n{NAMES}")
    data = load_data(dataset)
    assert len(data.splits["train"]) == 5
    assert len(data.splits["val"]) == 2
    assert all(image.is_file() for image in data.splits["train"])


def test_an_image_listed_in_two_ways_is_one_image(dataset: Path) -> None:
    root = dataset.parent
    (root / "list.txt").write_text(f"images/train/0.png\nimages/val/../train/0.png\n{root}/../set/images/train/0.png\n")
    dataset.write_text(f"train: list.txt\nval: images/val\n{NAMES}")
    assert load_data(dataset).splits["train"] == (root / "images/train/0.png",)


def test_a_link_to_a_folder_is_followed_and_known_by_its_own_path(dataset: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "disk2/a.png")
    (dataset.parent / "images/train/more").symlink_to(tmp_path / "disk2")
    train = load_data(dataset).splits["train"]
    assert len(train) == 5
    assert dataset.parent / "images/train/more/a.png" in train


def test_two_links_to_one_folder_are_both_followed(dataset: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "disk2/a.png")
    for name in ("one", "two"):
        (dataset.parent / "images/train" / name).symlink_to(tmp_path / "disk2")
    assert len(load_data(dataset).splits["train"]) == 6


@pytest.mark.parametrize("target", ["images/train", "images", ".", "../disk2"])
def test_a_link_into_a_folder_above_it_is_not_followed(dataset: Path, tmp_path: Path, target: str) -> None:
    root = dataset.parent
    write_image(tmp_path / "disk2/a.png")
    (tmp_path / "disk2/back").symlink_to(root / "images/train")
    (root / "images/train/loop").symlink_to(root / target)
    assert len(load_data(dataset).splits["train"]) == 4 + (target == "../disk2")


def test_a_broken_link_is_listed_so_that_it_is_reported(dataset: Path) -> None:
    (dataset.parent / "images/train/gone.png").symlink_to("nowhere.png")
    assert len(load_data(dataset).splits["train"]) == 5


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_of_a_list_may_end_in_any_way(dataset: Path, end: str) -> None:
    (dataset.parent / "list.txt").write_bytes(end.join(f"images/train/{i}.png" for i in range(3)).encode())
    dataset.write_bytes(end.join(["train: list.txt", "val: images/val", "names: [cat, dog]"]).encode())
    assert [image.name for image in load_data(dataset).splits["train"]] == ["0.png", "1.png", "2.png"]


def test_a_dot_slash_line_is_relative_to_the_list_file(dataset: Path) -> None:
    (dataset.parent / "images/list.txt").write_text("./train/0.png\n")
    dataset.write_text(f"train: images/list.txt\nval: images/val\n{NAMES}")
    assert load_data(dataset).splits["train"][0].resolve() == dataset.parent / "images/train/0.png"


def test_an_exported_dot_dot_is_retried_within_the_folder(write_yaml: Write) -> None:
    data = load_data(write_yaml(f"train: ../images/train\nval: ../images/val\ntest: ../images/test\n{NAMES}"))
    assert len(data.splits["train"]) == 4
    assert data.notices == ("test split left out: ../images/test does not exist",)


@pytest.mark.parametrize(
    "value",
    ["https://host.invalid/data.zip", "bash touch CANARY", "|\n  from pathlib import Path\n  Path('CANARY').touch()"],
)
def test_download_is_refused_and_never_run(
    write_yaml: Write, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_yaml(f"train: images/train\nval: images/missing\n{NAMES}download: {value}\n")
    with pytest.raises(UsageError, match="remove the key"):
        load_data(path)
    assert not (tmp_path / "CANARY").exists()


@pytest.mark.parametrize(
    "line",
    [
        "extra: !!python/object/apply:os.system ['touch CANARY']",
        "extra: !!python/name:os.system",
        "names: !!python/object/new:tuple [[a, b]]",
        "train: !!binary aGVsbG8=",
        "!!python/object/apply:os.system ['touch CANARY']: 1",
    ],
)
def test_yaml_tags_are_refused(write_yaml: Write, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="Remove tags"):
        load_data(write_yaml(f"val: images/val\n{line}\n"))
    assert not (tmp_path / "CANARY").exists()


def alias_bomb(key: str) -> str:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 40)]
    return "\n".join(levels) + f"\n{key}: *a39\n"


@pytest.mark.parametrize("key", ["names", "train", "path", "nc"])
def test_an_alias_bomb_is_a_short_error_at_once(write_yaml: Write, key: str) -> None:
    rest = {"names": NAMES, "train": "train: images/train\n", "val": "val: images/val\n"}
    rest.pop(key, None)
    path = write_yaml(alias_bomb(key) + "".join(rest.values()))
    start = time.perf_counter()
    with pytest.raises(EdgestillError) as caught:
        load_data(path)
    assert time.perf_counter() - start < 2
    assert len(str(caught.value)) < 500


def test_merge_keys_do_not_expand(write_yaml: Write) -> None:
    levels = ["m0: &m0 {k: v}"] + [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 30)]
    start = time.perf_counter()
    load_data(write_yaml("\n".join(levels) + f"\ntrain: images/train\nval: images/val\n{NAMES}"))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "content",
    [
        b"names: [" + b"a, " * (50 << 20) + b"]",
        b"[" * 500_000,
        b"train: \xff\xfe",
        b"",
        b"- a\n- b\n",
        b"just text",
        b"train: {a: b}\nval: images/val\nnames: [a]",
        b"train: [[a]]\nval: images/val\nnames: [a]",
        b"{[a]: b}",
        b"a: &a [*a]\n",
        b"key: 'unclosed",
        b"\x00\x01\x02",
    ],
    ids=[
        "50MB",
        "deep",
        "not utf-8",
        "empty",
        "list",
        "text",
        "mapping",
        "nested",
        "list key",
        "loop",
        "open",
        "bytes",
    ],
)
def test_damaged_files_are_one_line(dataset: Path, content: bytes) -> None:
    dataset.write_bytes(content[: 51 << 20])
    with pytest.raises(EdgestillError) as caught:
        load_data(dataset)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (f"val: images/val\n{NAMES}", "no `train` entry"),
        (f"train: images/train\n{NAMES}", "no `val` entry"),
        (f"train: images/nowhere\nval: images/val\n{NAMES}", "does not exist"),
        (f"train: labels/train\nval: images/val\n{NAMES}", "no images in labels/train"),
        (f"train: data.yaml\nval: images/val\n{NAMES}", "neither a folder nor a .txt"),
        (f"path: nowhere\ntrain: images/train\nval: images/val\n{NAMES}", "is not a folder"),
    ],
)
def test_what_is_missing_is_named(write_yaml: Write, text: str, what: str) -> None:
    with pytest.raises(InputError) as caught:
        load_data(write_yaml(text))
    assert what in str(caught.value)


@pytest.mark.parametrize("place", ['"\\0"', "x" * 5000, "a/" * 3000, '"\\u2028"', "~", "/", "/dev/null", "/dev/zero"])
@pytest.mark.parametrize("key", ["path", "train", "val"])
def test_impossible_places_are_one_line(write_yaml: Write, key: str, place: str) -> None:
    entries = {"train": "images/train", "val": "images/val", "names": "[cat]"} | {key: place}
    if (key, place) in {("train", "/"), ("val", "/")}:
        pytest.skip("the whole disk would be searched")
    with pytest.raises(EdgestillError) as caught:
        load_data(write_yaml("".join(f"{name}: {value}\n" for name, value in entries.items())))
    assert "\n" not in str(caught.value)


@given(st.text(max_size=200))
def test_any_text_is_refused_in_one_line(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "data.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(EdgestillError) as caught:
            load_data(path)
        assert "\n" not in str(caught.value)


def test_a_missing_file_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_data(tmp_path / "data.yaml")


def test_a_coco_style_yaml_of_the_field_is_read(shared: Path) -> None:
    data = load_data(shared / "data/coco128/data.yaml")
    assert len(data.names) == 80
    assert len(data.splits["val"]) == 128
