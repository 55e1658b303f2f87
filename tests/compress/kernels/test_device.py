from __future__ import annotations

import pytest

from compress.kernels.device import cuts


@pytest.mark.parametrize(
    ("strips", "work", "most", "least", "pieces"),
    [
        ((1,), (100,), 10, 1, (10,)),
        ((3,), (100,), 10, 1, (3,)),  # nine blocks; a fourth cut would need twelve
        ((1,), (100,), 10, 50, (2,)),
        ((1,), (100,), 10, 100, (1,)),
        ((20,), (100,), 10, 1, (1,)),  # more strips than blocks
        ((1, 1), (300, 100), 4, 1, (3, 1)),
        ((32, 32, 64), (819_200, 409_600, 102_400), 256, 1, (4, 2, 1)),
        ((48, 48, 96), (819_200, 409_600, 102_400), 256, 1, (2, 1, 1)),
    ],
)
def test_strips_are_cut_until_the_blocks_are_used_up_or_small_enough(strips, work, most, least, pieces):
    assert cuts(strips, work, most, least) == pieces
