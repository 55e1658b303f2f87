from __future__ import annotations

import cv2
import numpy as np
import pytest

from compress.data.image_store import resize_longest


@pytest.mark.parametrize(
    ("size_hw", "size", "linear", "expected", "interpolation"),
    [
        ((481, 640), 320, False, (240, 320), cv2.INTER_AREA),
        ((481, 640), 320, True, (240, 320), cv2.INTER_LINEAR),
        ((100, 77), 640, False, (640, 492), cv2.INTER_LINEAR),  # 492.8: version 7.0 truncates
        ((1, 3000), 640, False, (1, 640), cv2.INTER_AREA),
    ],
)
def test_resize_longest_truncates_and_picks_the_loaders_interpolation(size_hw, size, linear, expected, interpolation):
    image = np.random.default_rng(1).integers(0, 256, (*size_hw, 3), np.uint8)
    resized = resize_longest(image, size, linear=linear)
    assert resized.shape[:2] == expected
    assert np.array_equal(resized, cv2.resize(image, expected[::-1], interpolation=interpolation))


def test_resize_longest_leaves_an_image_that_fits():
    image = np.zeros((48, 64, 3), np.uint8)
    assert resize_longest(image, 64, linear=False) is image
