from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compress.data import convert, load_data
from compress.data.check import check
from compress.data.coco import to_coco
from compress.data.dataset import Sample
from compress.data.index import index_images
from runtime.errors import EdgestillError, InputError, UsageError
from tests.compress.data.conftest import folder_hash, write_image

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for i in range(6):
        write_image(tmp_path / "in" / f"{i}.png", 100, 50, seed=i)
    return tmp_path / "in"


def coco_file(folder: Path, annotations: list[dict[str, Any]], **changes: Any) -> Path:
    images = [{"id": i + 1, "file_name": f"{i}.png", "width": 100, "height": 50} for i in range(6)]
    path = folder.parent / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES} | changes))
    return path


def box(image_id: int, category_id: int, *bbox: float, **more: Any) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox)} | more


def splits(data_yaml: Path) -> dict[str, list[str]]:
    return {split: [image.name for image in images] for split, images in load_data(data_yaml).splits.items()}


def all_samples(data_yaml: Path) -> list[Sample]:
    data = load_data(data_yaml)
    indices = index_images(data, tuple(data.splits)).values()
    return sorted((sample for index in indices for sample in index.samples), key=lambda sample: sample.image.name)


def test_coco_boxes_become_normalised_rows_and_crowds_are_counted(source: Path, tmp_path: Path) -> None:
    annotations = coco_file(
        source, [box(1, 3, 10, 10, 20, 10), box(1, 7, 0, 0, 100, 50), box(2, 7, 5, 5, 5, 5, iscrowd=1)]
    )
    before = folder_hash(source)
    result = convert.coco(annotations, source, tmp_path / "out")
    assert folder_hash(source) == before
    assert (result.images, result.boxes, result.skipped, result.problems) == (6, 2, 1, ())
    assert load_data(result.data_yaml).names == ("cat", "dog")
    samples = all_samples(result.data_yaml)
    np.testing.assert_allclose(samples[0].labels, [[0, 0.2, 0.3, 0.2, 0.2], [1, 0.5, 0.5, 1, 1]], atol=1e-6)
    assert [len(sample.labels) for sample in samples] == [2, 0, 0, 0, 0, 0]
    assert {split: len(images) for split, images in splits(result.data_yaml).items()} == {"train": 5, "val": 1}


@pytest.mark.parametrize(
    ("annotation", "what"),
    [
        (box(99, 3, 1, 1, 5, 5), "image_id 99"),
        (box(1, 4, 1, 1, 5, 5), "category_id 4"),
        (box(1, 3, 1, 1, 5), "not four numbers"),
        (box(1, 3, 1, 1, float("nan"), 5), "not four numbers"),
        (box(1, 3, 1, 1, 10**400, 5), "not four numbers"),
        (box(1, 3, "a", 1, 5, 5), "not four numbers"),
        (box(1, 3, 200, 1, 5, 5), "no area inside"),
        (box(1, 3, 1, 1, -5, 5), "no area inside"),
        ({"image_id": [1], "category_id": {}, "bbox": None}, "image_id [1]"),
    ],
)
def test_a_bad_annotation_is_reported_and_only_it_is_skipped(
    source: Path, tmp_path: Path, annotation: dict[str, Any], what: str
) -> None:
    result = convert.coco(coco_file(source, [annotation, box(1, 3, 1, 1, 5, 5)]), source, tmp_path / "out")
    assert result.boxes == 1
    assert len(result.problems) == 1
    assert what in str(result)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "a/../../b.png", "..\\b.png", "C:/b.png", "", "\0"])
def test_image_names_that_leave_the_folder_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    write_image(tmp_path / "secret.png")
    images = [{"id": 1, "file_name": name, "width": 64, "height": 48}]
    with pytest.raises(InputError, match="leaves the image folder"):
        convert.coco(coco_file(source, [], images=images), source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_category_that_groups_others_and_has_no_box_is_no_class(source: Path, tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "parts", "supercategory": "none"},
        {"id": 1, "name": "part", "supercategory": "parts"},
        {"id": 2, "name": "tool", "supercategory": "tool"},
        {"id": 3, "name": "bolt", "supercategory": "part"},
        {"id": 4, "name": "parts", "supercategory": "parts"},
    ]
    boxes = [box(1, 1, 10, 10, 20, 10), box(2, 4, 10, 10, 20, 10)]
    result = convert.coco(coco_file(source, boxes, categories=categories), source, tmp_path / "out")
    assert load_data(result.data_yaml).names == ("part", "tool", "bolt", "parts")
    assert len(result.problems) == 1
    assert "category 'parts' groups others" in str(result.problems[0])


def test_bad_images_and_wrong_sizes_are_left_out(source: Path, tmp_path: Path) -> None:
    (source / "0.png").write_bytes(b"")
    (source / "1.png").unlink()
    write_image(source / "2.png", 30, 30)
    result = convert.coco(coco_file(source, [box(4, 3, 1, 1, 5, 5)]), source, tmp_path / "out")
    assert (result.images, result.boxes, len(result.problems)) == (3, 1, 3)
    assert splits(result.data_yaml) == {"train": ["3.png", "4.png"], "val": ["5.png"]}
    assert "is 30x30 but annotated as 100x50" in str(result)


def test_a_single_image_is_both_splits(source: Path, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": "0.png"}]
    result = convert.coco(coco_file(source, [box(1, 3, 1, 1, 5, 5)], images=images), source, tmp_path / "out")
    assert splits(result.data_yaml) == {"train": ["0.png"], "val": ["0.png"]}


def test_two_images_with_one_label_file_do_not_overwrite_each_other(source: Path, tmp_path: Path) -> None:
    write_image(source / "0.jpg", 100, 50)
    images = [{"id": i, "file_name": f"{i}.png"} for i in range(6)] + [{"id": 6, "file_name": "0.jpg"}]
    result = convert.coco(coco_file(source, [box(0, 3, 1, 1, 5, 5)], images=images), source, tmp_path / "out")
    assert result.images == 6
    assert "shares its label file" in str(result)


def test_an_image_that_is_named_twice_is_in_one_split(source: Path, tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i // 2}.png"} for i in range(10)]
    result = convert.coco(coco_file(source, [], images=images), source, tmp_path / "out")
    assert (result.images, len(result.problems)) == (5, 5)
    assert not check(load_data(result.data_yaml)).leaks


def test_an_id_of_two_images_is_refused(source: Path, tmp_path: Path) -> None:
    images = [{"id": 1, "file_name": f"{i}.png"} for i in range(2)]
    with pytest.raises(InputError, match="image id 1 stands for two files"):
        convert.coco(coco_file(source, [], images=images), source, tmp_path / "out")


def test_images_of_one_base_name_in_two_folders_are_both_kept(source: Path, tmp_path: Path) -> None:
    files = [f"cam{i % 2}/{i // 2}.png" for i in range(6)]
    for i, file in enumerate(files):
        write_image(source / file, 100, 50, seed=i)
    images = [{"id": i, "file_name": file, "width": 100, "height": 50} for i, file in enumerate(files)]
    boxes = [box(i, 3, 0, 0, 10 * (i + 1), 10) for i in range(6)]
    result = convert.coco(coco_file(source, boxes, images=images), source, tmp_path / "out")
    widths = {"/".join(s.image.parts[-2:]): round(float(s.labels[0, 3]), 3) for s in all_samples(result.data_yaml)}
    assert widths == {file: (i + 1) / 10 for i, file in enumerate(files)}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '{"images": 1}', '{"images": [], "annotations": [], "categories": []}'],
    ids=range(6),
)
def test_what_is_not_coco_is_one_line(source: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputError) as caught:
        convert.coco(tmp_path / "x.json", source, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_coco128_survives_the_way_to_yolo_and_back(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/coco128"
    result = convert.coco(folder / "annotations/instances.json", folder / "images/all", tmp_path / "out")
    assert (result.images, result.boxes, result.skipped) == (128, 929, 10)
    samples = all_samples(result.data_yaml)
    original = all_samples(folder / "data.yaml")
    kept = {sample.image.name: sample for sample in original}
    names, own_names = load_data(result.data_yaml).names, load_data(folder / "data.yaml").names
    for sample in samples:
        expected = kept[sample.image.name].labels
        assert [names[int(c)] for c in sample.labels[:, 0]] == [own_names[int(c)] for c in expected[:, 0]]
        np.testing.assert_allclose(sample.labels[:, 1:], expected[:, 1:], atol=2e-3)
    assert len(to_coco(samples, names)["annotations"]) == 929


XML = "<annotation><filename>{name}</filename>{objects}</annotation>"
OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{0}</xmin><ymin>{1}</ymin>"
    "<xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"
)


def voc_folder(tmp_path: Path, **files: str) -> Path:
    folder = tmp_path / "xml"
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.xml").write_text(text)
    return folder


def test_voc_boxes_count_from_one_and_difficult_objects_are_counted(source: Path, tmp_path: Path) -> None:
    objects = OBJECT.format(1, 1, 100, 50, name="dog", difficult=0) + OBJECT.format(
        11, 11, 30, 20, name="cat", difficult=0
    )
    objects += OBJECT.format(1, 1, 9, 9, name="cat", difficult=1)
    folder = voc_folder(
        tmp_path, a=XML.format(name="0.png", objects=objects), **{"1": XML.format(name="wrong.jpg", objects="")}
    )
    result = convert.voc(folder, source, tmp_path / "out")
    assert (result.images, result.boxes, result.skipped) == (2, 2, 1)
    assert load_data(result.data_yaml).names == ("cat", "dog")
    np.testing.assert_allclose(
        all_samples(result.data_yaml)[0].labels, [[1, 0.5, 0.5, 1, 1], [0, 0.2, 0.3, 0.2, 0.2]], atol=1e-6
    )


ENTITIES = "".join(f'<!ENTITY x{i} "{f"&x{i - 1};" * 10}">' for i in range(1, 12))
BOMB = f'<!DOCTYPE a [<!ENTITY x0 "xxxxxxxxxx">{ENTITIES}'


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "]><annotation><filename>&x11;</filename></annotation>",
        '<!DOCTYPE a [<!ENTITY f SYSTEM "file:///etc/hostname">]><annotation><filename>&f;</filename></annotation>',
        '<!DOCTYPE a SYSTEM "http://host.invalid/a.dtd"><annotation/>',
    ],
    ids=["bomb", "file", "network"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entities_are_refused(source: Path, tmp_path: Path, text: str, encoding: str) -> None:
    folder = voc_folder(tmp_path)
    (folder / "a.xml").write_bytes(text.encode(encoding))
    with pytest.raises(InputError, match="DOCTYPE"):
        convert.voc(folder, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_voc_image_name_that_leaves_the_folder_is_refused(source: Path, tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    text = XML.format(name="../secret.png", objects=OBJECT.format(1, 1, 9, 9, name="a", difficult=0))
    with pytest.raises(InputError, match="leaves the image folder"):
        convert.voc(voc_folder(tmp_path, a=text), source, tmp_path / "out")


def test_damaged_xml_is_reported_and_only_it_is_skipped(source: Path, tmp_path: Path) -> None:
    good = XML.format(name="0.png", objects=OBJECT.format(1, 1, 9, 9, name="a", difficult=0))
    bad = XML.format(name="1.png", objects=OBJECT.format("x", 1, 9, 9, name="a", difficult=0))
    folder = voc_folder(tmp_path, a=good, b="<annotation>", c="", d=bad, e="not xml")
    result = convert.voc(folder, source, tmp_path / "out")
    assert result.boxes == 1
    assert len(result.problems) == 4


def test_nothing_to_convert_is_an_error(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.xml"):
        convert.voc(tmp_path, source, tmp_path / "out")
    with pytest.raises(InputError, match="cannot be read"):
        convert.coco(tmp_path / "none.json", source, tmp_path / "out")
    with pytest.raises(EdgestillError):
        convert.coco(coco_file(source, []), tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(UsageError, match="not empty"):
        convert.coco(coco_file(source, []), source, source)
