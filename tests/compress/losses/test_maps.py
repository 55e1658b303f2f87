from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.losses.maps import (
    BACKGROUND,
    SIDE_LIMIT,
    coarser,
    for_anchors,
    maps_from_boxes,
    maps_from_rows,
    mean_maps,
    mirrored,
)
from compress.models import Architecture, YOLOv5
from compress.models.network import decode_level

SIDE = 64


@pytest.fixture(scope="module")
def network() -> YOLOv5:
    torch.manual_seed(0)
    return YOLOv5(Architecture.of_scale("p", ("bolt", "nut"))).eval()


def noise(side: int = SIDE, batch: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, 3, side // s, side // s, 7, generator=generator) for s in (8, 16, 32)]


def decoded(network: YOLOv5, raw: list[Tensor]) -> Tensor:
    return network.decode(raw)


def test_mirrored_twice_is_the_same_to_the_bit() -> None:
    raw = noise()
    assert all(torch.equal(a, b) for a, b in zip(mirrored(mirrored(raw)), raw, strict=True))


def test_mirrored_maps_are_those_of_the_mirrored_boxes(network: YOLOv5) -> None:
    raw = noise()
    rows, flipped = decoded(network, raw), decoded(network, mirrored(raw))
    rows = torch.cat((SIDE - rows[..., :1], rows[..., 1:]), -1)
    for a, b in zip(rows.split([192, 48, 12], 1), flipped.split([192, 48, 12], 1), strict=True):
        side = int((a.shape[1] // 3) ** 0.5)
        torch.testing.assert_close(a.view(2, 3, side, side, 7).flip(3).reshape(b.shape), b, rtol=1e-5, atol=1e-4)


def test_a_network_that_is_symmetric_gives_mirrored_maps_for_mirrored_images(network: YOLOv5) -> None:
    """The mean over both images is then the same for an image and for its mirror image."""
    images = torch.rand(1, 3, SIDE, SIDE)

    def both(x: Tensor) -> list[Tensor]:
        return mean_maps([network(x), mirrored(network(x.flip(3)))])

    with torch.no_grad():
        here, there = both(images), mirrored(both(images.flip(3)))
    for a, b in zip(here, there, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_maps_for_other_anchors_make_the_same_boxes(network: YOLOv5) -> None:
    own = network.detect.anchors
    for factor in (0.6, 1.0, 2.5):
        maps = [for_anchors(level, anchors, factor * anchors) for level, anchors in zip(noise(), own, strict=True)]
        levels = zip(noise(), maps, own, network.strides, strict=True)
        for level, made, anchors, stride in levels:
            rows = decode_level(level, stride * anchors, stride)
            again = decode_level(made, factor * stride * anchors, stride)
            fits = (made[..., 2:4].abs() < SIDE_LIMIT).flatten(1, 3)
            assert fits.float().mean() > 0.7
            torch.testing.assert_close(again[..., 2:4][fits], rows[..., 2:4][fits], rtol=1e-3, atol=1e-4)
            assert torch.equal(again[..., [0, 1, 4, 5, 6]], rows[..., [0, 1, 4, 5, 6]])


def test_the_mean_is_over_those_that_tell() -> None:
    a, b = torch.tensor([1.0, torch.nan, torch.nan]), torch.tensor([3.0, 5.0, torch.nan])
    (mean,) = mean_maps([[a], [b]])
    assert torch.equal(mean[:2], torch.tensor([2.0, 5.0]))
    assert mean[2].isnan()


@pytest.mark.parametrize("factor", [2, 4])
def test_a_coarser_cell_holds_the_best_box_of_its_cells(factor: int) -> None:
    """Its box, decoded with anchors and strides `factor` times as large, is the same box."""
    raw, anchors = noise(128)[0], torch.tensor([[10.0, 13.0], [16.0, 30.0], [33.0, 23.0]])
    fine = decode_level(raw, anchors, 8).view(2, 3, 16, 16, 7)
    # in a larger image's pixels, so an anchor that is the same share of it has the same pixels
    coarse = decode_level(coarser(raw, factor), anchors, 8 * factor).view(2, 3, 16 // factor, 16 // factor, 7)
    for y, x in ((0, 0), (1, 2), (3, 1)):
        cells = fine[:, :, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].flatten(2, 3)
        best = cells[..., 4].argmax(-1)[..., None, None].expand(2, 3, 1, 7)
        torch.testing.assert_close(coarse[:, :, y, x], cells.gather(2, best).squeeze(2), rtol=1e-4, atol=1e-3)


def test_a_factor_of_one_changes_nothing() -> None:
    raw = noise()[0]
    assert coarser(raw, 1) is raw


def test_a_decode_is_undone(network: YOLOv5) -> None:
    raw = noise()
    found = maps_from_rows(decoded(network, raw), network.detect.anchors, network.strides, (SIDE, SIDE))
    for a, b in zip(found, raw, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def boxes(*rows: tuple[float, float, float, float, float], nc: int = 2) -> Tensor:
    """(1, K, 5 + nc) of centre, size and objectness logit, each of class 0."""
    return torch.tensor([[[*row, 4.6, *[-4.6] * (nc - 1)] for row in rows]])


def test_a_box_is_written_where_a_label_would_be_and_decodes_to_itself(network: YOLOv5) -> None:
    grids = [(SIDE // s, SIDE // s) for s in network.strides]
    raw = maps_from_boxes(boxes((0.4, 0.55, 0.3, 0.25, 2.0)), network.detect.anchors, grids, 4.0)
    rows = decoded(network, raw)[0]
    written = rows[rows[:, 4] > 0.5]
    assert len(written) > 3
    expected = torch.tensor([0.4 * SIDE, 0.55 * SIDE, 0.3 * SIDE, 0.25 * SIDE])
    torch.testing.assert_close(written[:, :4], expected.expand(len(written), 4), rtol=1e-3, atol=1e-2)
    empty = [level[level[..., 4] == BACKGROUND] for level in raw]
    assert sum(map(len, empty)) == len(rows) - len(written)
    assert all(cell[:, :4].isnan().all() and cell[:, 5:].isnan().all() for cell in empty)


def test_where_boxes_meet_the_best_is_written_and_a_box_without_size_is_none(network: YOLOv5) -> None:
    grids = [(SIDE // s, SIDE // s) for s in network.strides]
    same = (0.4, 0.55, 0.3, 0.25)
    raw = maps_from_boxes(boxes((*same, 1.0), (*same, 3.0), (*same, 2.0)), network.detect.anchors, grids, 4.0)
    found = {float(v) for level in raw for v in level[..., 4].unique()}
    assert found == {BACKGROUND, 3.0}
    nothing = maps_from_boxes(boxes((0.4, 0.5, 0.0, 0.0, 5.0)), network.detect.anchors, grids, 4.0)
    assert all((level[..., 4] == BACKGROUND).all() for level in nothing)


def test_images_of_a_batch_keep_their_own_boxes(network: YOLOv5) -> None:
    grids = [(SIDE // s, SIDE // s) for s in network.strides]
    none = torch.zeros_like(boxes((0, 0, 0, 0, 0)))
    batch = torch.cat((none, boxes((0.4, 0.55, 0.3, 0.25, 2.0))))
    raw = maps_from_boxes(batch, network.detect.anchors, grids, 4.0)
    assert all((level[0, ..., 4] == BACKGROUND).all() for level in raw)
    assert any((level[1, ..., 4] > 0).any() for level in raw)
