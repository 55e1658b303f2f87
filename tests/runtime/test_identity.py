from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from runtime.card import Artifact, ModelCard
from runtime.errors import InputError
from runtime.identity import SETTINGS, difference, require_same, weights_digest

CARD = ModelCard("part", ("bolt", "nut"), (64, 96), weights="5" * 64, max_det=100, iou=0.6)
OTHER = {
    "names": ("bolt", "Mutter"),
    "size_hw": (96, 64),
    "stride": 64,
    "iou": 0.45,
    "max_det": 300,
    "input": "tensor",
    "output": "rows",
    "frame_hw": (1080, 1920),
    "candidates": 300,
    "nms_iterations": 8,
}
TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(2, np.float32)}


def test_the_identity_of_a_card_never_changes():
    """It stands in files that exist, so another way to compute it would refuse all of them."""
    assert CARD.identity == "053e936bccf7aee00c92eada96ff37bc9a0b3f4cc1427b7170a34e24685ee42a"


def test_weights_and_every_setting_change_the_identity():
    assert set(OTHER) == set(SETTINGS)
    changed = [replace(CARD, **{key: value}) for key, value in OTHER.items()]
    assert len({CARD.identity, replace(CARD, weights="6" * 64).identity, *(card.identity for card in changed)}) == 12


def test_every_field_of_the_card_is_decided_on():
    """A new setting that changes what a model finds belongs to its identity."""
    outside = {"name", "conf", "precision", "backend", "devices", "batches", "provenance", "artifacts"}
    assert {field.name for field in fields(ModelCard)} == {"weights", *SETTINGS} | outside


def test_precision_and_what_may_be_chosen_later_do_not():
    file = Artifact("a.plan", "0" * 64, 1, "fp16", "tensorrt")
    more = {"name": "x", "precision": "int8-ort", "conf": 0.5, "provenance": {"a": 1}, "artifacts": (file,)}
    more |= {"backend": "openvino", "devices": ("cpu",)}
    assert {replace(CARD, **{key: value}).identity for key, value in more.items()} == {CARD.identity}


def test_json_keeps_the_identity():
    whole = replace(CARD, iou=1)  # a whole number comes back as a float
    assert ModelCard.from_json(whole.to_json()).identity == whole.identity


def test_a_card_without_weights_has_no_identity_and_is_the_same_as_no_other():
    unknown = replace(CARD, weights="")
    assert unknown.identity == ""
    for pair in (((unknown, "a"), (CARD, "b")), ((CARD, "b"), (unknown, "a")), ((unknown, "a"), (unknown, "b"))):
        with pytest.raises(InputError, match="a has no identity"):
            require_same(*pair, "Choose another")


def test_a_refusal_names_both_files_and_all_that_differs():
    other = replace(CARD, iou=0.45, frame_hw=(10, 20), names=("x",), weights="6" * 64)
    require_same((CARD, "a.onnx"), (replace(CARD, precision="fp16"), "b.onnx"), "")
    with pytest.raises(InputError) as caught:
        require_same((CARD, "a.onnx"), (other, "b.onnx"), "Choose another")
    assert str(caught.value) == (
        "a.onnx is another model than b.onnx: other weights, other class names, iou 0.6 instead of 0.45, "
        "frame_hw none instead of 10x20. Choose another"
    )
    assert difference(CARD, other, ("max_det",)) == "other weights"


@pytest.mark.parametrize(
    ("structure", "tensors"),
    [
        ("q", TENSORS),
        ("p", {"a": TENSORS["a"]}),
        ("p", {"a": TENSORS["a"], "c": TENSORS["b"]}),
        ("p", {"a": TENSORS["a"].reshape(3, 2), "b": TENSORS["b"]}),
        ("p", {"a": TENSORS["a"], "b": TENSORS["b"].view(np.int32)}),
        ("p", {"a": TENSORS["a"] + np.float32(1e-6), "b": TENSORS["b"]}),
    ],
)
def test_structure_names_types_shapes_and_values_change_the_digest_of_weights(structure, tensors):
    assert weights_digest(structure, tensors) != weights_digest("p", TENSORS)


def test_the_order_of_tensors_and_their_layout_in_memory_do_not():
    stored = {"b": TENSORS["b"], "a": np.asfortranarray(TENSORS["a"])}
    assert weights_digest("p", stored) == weights_digest("p", TENSORS)
