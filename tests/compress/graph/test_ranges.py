from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from compress.graph.parts import GraphParts, sort_topologically
from compress.graph.ranges import (
    BINS,
    METHODS,
    PIXEL_RANGE,
    SILU_FLOOR,
    Observed,
    body_model,
    calibrate,
    measured,
    scale_of,
)
from runtime.errors import EdgestillError


class Counted:
    """Canvases that note how often they are read."""

    def __init__(self, canvases: list[np.ndarray]) -> None:
        self.canvases, self.read = canvases, 0

    def __iter__(self):
        self.read += 1
        return iter(self.canvases)


@pytest.fixture(scope="module")
def canvases():
    return [np.random.default_rng(seed).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8) for seed in range(3)]


@pytest.mark.parametrize(("method", "times"), [("minmax", 1), ("mse", 2)])
def test_images_are_read_once_and_for_histograms_twice(case, canvases, method, times):
    stream = Counted(canvases)
    ranges = calibrate(case.boxes(), stream, method)
    assert stream.read == times
    assert ranges["canvas.nchw"] == PIXEL_RANGE
    assert all((observed.counts is None) == (method == "minmax") for observed in [ranges["stem"]])


def test_ranges_cover_all_images_not_the_last(case):
    dark, bright = (np.full((1, 160, 160, 3), value, np.uint8) for value in (10, 250))
    alone = [calibrate(case.boxes(), [canvas], "minmax")["stem"] for canvas in (dark, bright)]
    both = calibrate(case.boxes(), [bright, dark], "minmax")["stem"]
    assert both.low == min(one.low for one in alone)
    assert both.high == max(one.high for one in alone)


def test_histograms_count_every_value(case, canvases):
    observed = calibrate(case.boxes(), canvases, "mse")["stem"]
    assert observed.counts.sum() == 3 * 8 * 80 * 80


def test_groups_of_tensors_give_the_same_histograms(case, canvases, monkeypatch):
    whole = calibrate(case.boxes(), canvases[:1], "mse")
    monkeypatch.setattr("compress.graph.ranges.BYTES_AT_ONCE", 300_000)
    parts = calibrate(case.boxes(), canvases[:1], "mse")
    for name, observed in whole.items():
        if observed.counts is not None:
            np.testing.assert_array_equal(observed.counts, parts[name].counts)


@pytest.mark.parametrize("method", METHODS)
def test_what_only_a_silu_reads_has_no_range_where_silu_is_nothing(case, canvases, method):
    """The stem's outputs go through a SiLU alone; what another node reads too, or behind it, keeps its range."""
    model = case.boxes()
    parts = GraphParts(model.graph)
    bias = next(tensor for tensor in model.graph.initializer if tensor.name == parts.nodes[parts.convs[0]].input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) - 50, bias.name))
    found = calibrate(model, canvases, method)
    shared = onnx.ModelProto.FromString(model.SerializeToString())
    gate = next(node for node in shared.graph.node if node.op_type == "Sigmoid" and node.input[0] == "stem")
    later = shared.graph.node.add()
    later.CopyFrom(helper.make_node("Identity", ["stem"], ["stem.again"]))
    next(node for node in shared.graph.node if list(node.input) == ["stem", gate.output[0]]).input[0] = "stem.again"
    sort_topologically(shared.graph)
    assert (found["stem"].low, found["stem"].high) == (SILU_FLOOR, SILU_FLOOR)
    assert calibrate(shared, canvases, method)["stem"].low < -40
    assert measured(body_model(model), canvases)["stem"].low < -40, "FP16 overflows there"


@pytest.mark.parametrize("method", METHODS)
def test_no_images_is_one_line(case, method):
    with pytest.raises(EdgestillError, match="no images to calibrate"):
        calibrate(case.boxes(), [], method)


@pytest.mark.parametrize(
    ("ends", "unsigned", "expected"),
    [
        ((-1.0, 12.7), False, (0.1, 0)),
        ((-25.4, 12.7), False, (0.2, 0)),
        ((0.0, 255.0), True, (1.0, 0)),
        ((-51.0, 204.0), True, (1.0, 51)),
        ((10.0, 255.0), True, (1.0, 0)),
        ((0.0, 0.0), True, (1.0, 0)),
        ((0.0, 0.0), False, (1.0, 0)),
    ],
)
def test_a_scale_covers_the_range_and_zero(ends, unsigned, expected):
    scale, zero = scale_of(Observed(*ends), unsigned=unsigned)
    assert scale == pytest.approx(expected[0])
    assert zero == expected[1]


@pytest.mark.parametrize("unsigned", [False, True])
def test_mse_cuts_off_a_lonely_outlier_and_keeps_an_even_spread(unsigned):
    lonely = np.zeros(BINS, np.int64)
    lonely[:200] = 1000
    lonely[-1] = 1
    even = np.full(BINS, 1000)
    whole = scale_of(Observed(0.0, 1.0), unsigned=unsigned)[0]
    assert scale_of(Observed(0.0, 1.0, lonely), unsigned=unsigned)[0] < 0.85 * whole
    assert scale_of(Observed(0.0, 1.0, even), unsigned=unsigned)[0] > 0.95 * whole


def test_histograms_take_a_tensor_that_is_all_but_constant(case, canvases):
    model = case.boxes()
    for tensor in model.graph.initializer:
        if tensor.name in ("stem.weight", "stem.bias"):
            values = numpy_helper.to_array(tensor)
            changed = values * np.float32(1e-6) if values.ndim > 1 else np.full_like(values, 3e7)
            tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
    observed = calibrate(model, canvases[:1], "mse")["stem"]
    assert observed.counts.sum() == 8 * 80 * 80
    assert scale_of(observed, unsigned=True)[0] > 0


def test_a_constant_tensor_has_a_range(case):
    observed = Observed(0.0, 0.0, np.array([5] + [0] * (BINS - 1)))
    assert scale_of(observed, unsigned=True)[0] > 0
