from __future__ import annotations

import pytest

from benchmarks import formats


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0123, "0.012"), (1.234, "1.23"), (12.34, "12.3"), (99.96, "100.0"), (123.4, "123"), (12345.6, "12346")],
)
def test_milliseconds_have_three_figures(value: float, text: str) -> None:
    assert formats.milliseconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(512, "0.50 KiB"), (7_534_201, "7.19 MiB"), (2**33, "8.00 GiB")])
def test_sizes_take_the_unit_that_fits(value: int, text: str) -> None:
    assert formats.size(value) == text


def test_a_loss_of_nothing_has_no_sign() -> None:
    assert (formats.accuracy(-4e-6), formats.accuracy(-6e-6)) == ("0.00000", "-0.00001")
