"""Maps that the tests on a GPU and the sanitizers compare, (N, C, H, W), and the adapters between them."""

from __future__ import annotations

SHAPES = [(2, 8, 20, 20), (3, 5, 7, 9), (1, 4, 16, 16), (2, 13, 11, 5), (2, 72, 12, 10)]
"""Round, odd, square, prime, and wide: several tiles of whatever a kernel tiles."""
LEVELS = [(2, 8, 20, 20), (2, 13, 10, 10), (2, 32, 7, 5)]
DETECTOR = [(32, 128, 80, 80), (32, 256, 40, 40), (32, 512, 20, 20)]
"""A detector's maps at 640 pixels."""
MEDIUM = [(8, 64, 40, 40), (8, 128, 20, 20)]
EXTREME = [(64, 1024, 4, 4), (1, 8, 160, 160), (1, 3, 157, 163)]
"""More than 65 535 rows; rows longer than what registers hold, round and prime."""
OPCHECK = [(2, 16, 8, 8), (2, 32, 4, 4)]
SANITIZED = {"round": [(2, 16, 8, 8), (2, 64, 4, 6), (5, 2, 80, 80)], "odd": [(3, 5, 7, 9), (2, 13, 5, 5)]}
"""A channel of the third is more than one block's shared memory holds, so that PKD forms clusters."""
SELECTIONS = [(128, 128), (64, 64), (64, 128), (96, 48), (16, 80)]
"""(student, teacher) channels of adapters whose every product is one element."""
UNLIKE = [(64, 128), (128, 64), (96, 48), (128, 256), (40, 24)]
"""(student, teacher) channels of other adapters."""


def even(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with channels that 16-byte vectors of half precision divide."""
    images, channels, *sides = shape
    return images, -(-channels // 8) * 8, *sides
