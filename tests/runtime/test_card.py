from __future__ import annotations

import json
from dataclasses import replace

import pytest

from runtime.card import Artifact, Batches, FileDigest, ModelCard
from runtime.errors import InputError

ARTIFACT = Artifact("model.plan", "0" * 64, 12, "fp16", "tensorrt_rtx", ("sm86",), {"tensorrt_rtx": "1.7.1"})
CARD = ModelCard(
    name="bolts",
    names=("bolt", "Mutter"),
    size_hw=(320, 640),
    input="frame",
    frame_hw=(1080, 1920),
    provenance={"teacher": {"sha256": "ab"}, "map50_95": 0.5},
    artifacts=(ARTIFACT,),
)


def test_json_there_and_back_is_identity(tmp_path):
    assert ModelCard.from_json(CARD.to_json()) == CARD
    CARD.save(tmp_path / "model.json")
    assert ModelCard.load(tmp_path) == ModelCard.load(tmp_path / "model.json") == CARD
    assert json.loads((tmp_path / "model.json").read_text())["schema_version"] == 1


def changed(**changes: object) -> dict:
    return CARD.to_dict() | changes


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (changed(colour="red"), "colour"),
        ({key: value for key, value in CARD.to_dict().items() if key != "names"}, "names is missing"),
        (changed(schema_version=2), "schema_version is 2"),
        (changed(names="bolt"), "names"),
        (changed(names=[]), "names"),
        (changed(size_hw=[640]), "size_hw"),
        (changed(size_hw=[640, "640"]), "size_hw"),
        (changed(size_hw=[True, True]), "size_hw"),
        (changed(stride=0), "stride"),
        (changed(conf=1.5), "conf"),
        (changed(conf="high"), "conf"),
        (changed(input="jpeg"), "input"),
        (changed(output="masks"), "output"),
        (changed(frame_hw=None), "frame_hw"),
        (changed(max_det=0), "max_det"),
        *((changed(batches=value), "batches") for value in (8, [0, 1], [4, 2], [1], [None, 1], [1, "8"], [True, None])),
        *((changed(backend=value), "backend") for value in ("caffe", 3)),
        *((changed(devices=value), "devices") for value in ("cpu", ["auto"], ["npu"], [1])),
        (changed(artifacts={}), "artifacts"),
        (changed(artifacts=[{"file": "x"}]), "missing"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "file": "../../etc/passwd"}]), "no folder"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "file": ".."}]), "no folder"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "sha256": "zz"}]), "hex"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "backend": "caffe"}]), "backend"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "bytes": -1}]), "bytes"),
        (changed(artifacts=[{**CARD.to_dict()["artifacts"][0], "devices": ["npu"]}]), "devices"),
        ([], "expected an object"),
    ],
)
def test_a_wrong_card_is_one_line_that_names_file_and_key(tmp_path, data, word):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=word) as caught:
        ModelCard.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"names": "\\ud800"}'])
def test_broken_json_is_an_input_error(tmp_path, text):
    (tmp_path / "model.json").write_text(text)
    with pytest.raises(InputError):
        ModelCard.load(tmp_path)


def test_a_missing_card_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"model\.json"):
        ModelCard.load(tmp_path)


def test_a_card_tells_the_images_of_one_call_and_the_shape_of_the_input():
    shapes = {(1, 1): 1, (8, 8): 8, (1, None): None, (1, 8): None}
    for batches, first in shapes.items():
        card = replace(CARD, batches=Batches(*batches), artifacts=(replace(ARTIFACT, batches=Batches(*batches)),))
        assert ModelCard.from_json(card.to_json()) == card
        written = None if batches == (1, 1) else list(batches)
        assert card.to_dict().get("batches") == card.to_dict()["artifacts"][0].get("batches") == written
        assert card.input_shape == (first, 1080, 1920, 3)
        assert replace(card, input="tensor").input_shape == (first, 3, 320, 640)
        assert replace(card, input="canvas").input_shape == (first, 320, 640, 3)
    assert [str(Batches(*batches)) for batches in shapes] == ["1", "8", "1 to any", "1 to 8"]


def test_defaults_may_be_left_out():
    required = ("schema_version", "name", "names", "size_hw", "stride", "input", "output")
    data = {key: value for key, value in CARD.to_dict().items() if key in required} | {"input": "canvas"}
    card = ModelCard.from_dict(data)
    assert (card.conf, card.max_det, card.artifacts) == (0.25, 300, ())


def test_keys_that_the_first_cards_had_not_are_written_only_where_needed():
    data = replace(CARD, weights="").to_dict()
    assert {"identity", "weights", "batches"}.isdisjoint(data)
    assert {"identity", "parts", "batches"}.isdisjoint(replace(ARTIFACT, identity="").to_dict())


def test_only_files_of_several_parts_list_them():
    assert "parts" not in CARD.to_dict()["artifacts"][0]
    card = replace(CARD, artifacts=(replace(ARTIFACT, parts=(FileDigest("model.bin", "0" * 64, 7),)),))
    assert ModelCard.from_json(card.to_json()) == card
    data = card.to_dict()
    data["artifacts"][0]["parts"][0]["file"] = "../model.bin"
    with pytest.raises(InputError, match="no folder"):
        ModelCard.from_dict(data)


def test_artifacts_are_found_by_file():
    assert CARD.artifact("model.plan") == ARTIFACT
    assert CARD.artifact("other") is None


def test_a_setting_that_was_changed_by_hand_is_refused_and_the_threshold_may_be(tmp_path):
    """The graph still does what it was exported with, so a report would state a setting that was not used."""
    known = replace(CARD, weights="5" * 64)
    with pytest.raises(InputError, match=r"identity is .* changed by hand"):
        ModelCard.from_dict(known.to_dict() | {"iou": 0.3})
    assert ModelCard.from_dict(known.to_dict() | {"conf": 0.3}) == replace(known, conf=0.3)
    with pytest.raises(InputError, match="weights is 'zz'"):
        ModelCard.from_dict(known.to_dict() | {"weights": "zz"})


def test_only_known_identities_are_written():
    assert not {"weights", "identity"} & set(CARD.to_dict())
    assert "identity" not in CARD.to_dict()["artifacts"][0]
    known = replace(CARD, weights="5" * 64, artifacts=(replace(ARTIFACT, identity="a" * 64),))
    assert known.to_dict()["identity"] == known.identity
    assert ModelCard.from_json(known.to_json()) == known
