from __future__ import annotations

import pytest

from compress.config import BuildConfig, QuantizeConfig
from compress.flavours import FLAVOURS, PLAN_PRECISIONS, REFERENCE
from compress.recipe import parse
from runtime.errors import UsageError


@pytest.mark.parametrize("name", FLAVOURS)
def test_every_row_names_functions_that_exist(name: str) -> None:
    flavour = FLAVOURS[name]
    assert flavour.name == name
    assert callable(flavour.make)


def test_every_flavour_is_made_unless_the_recipe_says_otherwise() -> None:
    assert QuantizeConfig().flavours == tuple(FLAVOURS)
    assert BuildConfig().precisions == PLAN_PRECISIONS


def test_plans_are_built_from_the_reference_and_from_what_is_made_for_tensorrt() -> None:
    assert PLAN_PRECISIONS == ("fp16", "int8-trt", REFERENCE)


@pytest.mark.parametrize(
    ("config", "raw", "expected"),
    [
        (QuantizeConfig, {"flavours": ["int4"]}, "flavours.0: 'int4' is not accepted: expected one of fp16, int8-trt"),
        (BuildConfig, {"precisions": ["int8-ort"]}, "precisions.0: 'int8-ort' is not accepted: expected one of fp16"),
    ],
)
def test_an_unknown_name_is_one_line_that_lists_the_known(config: type, raw: dict, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(config, raw, "--set")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
