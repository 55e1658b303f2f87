from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from compress.compute.boxes import touched_cells
from compress.compute.operations import OperationCount
from compress.config import LossConfig
from compress.losses.detection import DetectionLoss, Grid, assign_targets, level_balance, padded, targets_on
from runtime.errors import UsageError

from .formulas import ciou

STRIDES = (8, 16, 32)
VARIANTS = {
    "imgsz320": (LossConfig(), 320),
    "label_smoothing_0.1": (LossConfig(label_smoothing=0.1), 640),
    "fl_gamma_1.5": (LossConfig(fl_gamma=1.5), 640),
    "cls_pw_0.5_obj_pw_0.67": (LossConfig(cls_pw=0.5, obj_pw=0.67), 640),
    "anchor_t_2.5": (LossConfig(anchor_t=2.5), 640),
    "no_targets": (LossConfig(), 640),
}


def _head(batch=2, nc=3, size=64, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(batch, 3, size // s, size // s, 5 + nc, generator=generator) * scale).to(dtype).requires_grad_()
        for s in STRIDES
    ]


def _targets(batch=2, nc=3, count=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.arange(count) % batch
    classes = torch.arange(count) % nc
    centres = torch.rand(count, 2, generator=generator)
    sizes = torch.rand(count, 2, generator=generator) * 0.5 + 0.05
    return torch.cat((image[:, None], classes[:, None], centres, sizes), 1)


def test_assigned_pairs_and_their_order_equal_the_reference(train_reference, anchors_grid):
    shapes = [level.shape[:4] for level in train_reference.raw]
    pairs = assign_targets(train_reference.targets, anchors_grid, Grid.of(shapes, torch.device("cpu")), 4.0)
    start = 0
    for level, shape in enumerate(shapes):
        keep = pairs.keep[level]
        found = dict(zip(("b", "a", "gj", "gi"), torch.unravel_index(pairs.cell[level][keep], shape), strict=True))
        found["tcls"] = pairs.class_id.expand(keep.shape)[keep]
        found["tbox"] = torch.cat([part[:, level].expand(2, *keep.shape)[:, keep] for part in pairs[2:4]]).T
        for name, values in found.items():
            expected = torch.from_numpy(train_reference.arrays[f"assign_P{level + 3}_{name}"])
            assert torch.equal(values, expected), (level, name)
        assert torch.equal(pairs.place[level], pairs.cell[level] + start)
        start += shape.numel()


def test_loss_and_parts_equal_the_reference(train_reference, anchors_grid):
    total, parts = DetectionLoss(anchors_grid, STRIDES, 80)(train_reference.raw, train_reference.targets)
    figures = train_reference.figures["A_default_hyp_imgsz640"]
    assert total.item() == pytest.approx(figures["total"], rel=1e-6)
    assert parts.tolist() == pytest.approx([figures["box"], figures["obj"], figures["cls"]], rel=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_of_the_loss_equals_the_reference(train_reference, anchors_grid, name):
    config, imgsz = VARIANTS[name]
    targets = train_reference.targets[:0] if name == "no_targets" else train_reference.targets
    total, parts = DetectionLoss(anchors_grid, STRIDES, 80, config, imgsz)(train_reference.raw, targets)
    figures = train_reference.figures["loss_variants_on_stored_train_raw"][name]
    assert total.item() == pytest.approx(figures["total"], rel=2e-6)
    assert parts.tolist() == pytest.approx([figures["box"], figures["obj"], figures["cls"]], rel=2e-6)


def test_anchors_and_strides_must_name_as_many_levels(anchors_grid):
    with pytest.raises(UsageError, match="3 levels of anchors but 2 strides"):
        DetectionLoss(anchors_grid, (8, 16), 80)


def test_objectness_balance_depends_on_the_number_of_levels():
    assert level_balance(3) == (4.0, 1.0, 0.4)
    assert level_balance(4) == (4.0, 1.0, 0.25, 0.06)


def test_a_batch_without_objects_still_teaches_background(anchors_grid):
    raw = _head()
    total, parts = DetectionLoss(anchors_grid, STRIDES, 3)(raw, torch.zeros(0, 6))
    total.backward()
    assert parts[0] == 0
    assert parts[2] == 0
    for level in raw:
        assert (level.grad[..., 4] > 0).all()
        assert not level.grad[..., :4].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_give_the_float32_loss_of_the_same_values(anchors_grid, dtype):
    raw = _head(dtype=dtype)
    loss = DetectionLoss(anchors_grid, STRIDES, 3)
    total, _ = loss(raw, _targets())
    assert total.dtype == torch.float32
    assert torch.equal(total, loss([level.float() for level in raw], _targets())[0])
    total.backward()
    assert all(level.grad.dtype == dtype and level.grad.isfinite().all() for level in raw)


@pytest.mark.parametrize("logit", [50.0, -50.0, 1000.0, -1000.0])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
def test_saturated_logits_give_a_finite_loss_and_gradient(anchors_grid, logit, gamma):
    raw = [torch.full_like(level, logit).requires_grad_() for level in _head()]
    total, _ = DetectionLoss(anchors_grid, STRIDES, 3, LossConfig(fl_gamma=gamma))(raw, _targets())
    total.backward()
    assert total.isfinite()
    assert all(level.grad.isfinite().all() for level in raw)


def test_a_degenerate_label_changes_nothing(anchors_grid):
    raw, targets = _head(), _targets()
    loss = DetectionLoss(anchors_grid, STRIDES, 3)
    point = torch.tensor([[0, 0, 0.5, 0.5, 0.0, 0.0]])
    total, _ = loss(raw, torch.cat((targets, point)))
    total.backward()
    assert torch.allclose(total, loss(raw, targets)[0])
    assert all(level.grad.isfinite().all() for level in raw)


def test_parts_do_not_depend_on_the_batch_size_and_the_total_grows_with_it(anchors_grid):
    raw, targets = _head(), _targets()
    loss = DetectionLoss(anchors_grid, STRIDES, 3)
    total, parts = loss(raw, targets)
    shifted = targets + torch.tensor([2.0, 0, 0, 0, 0, 0])
    doubled, doubled_parts = loss([torch.cat((level, level)) for level in raw], torch.cat((targets, shifted)))
    assert torch.allclose(parts, doubled_parts, rtol=1e-5)
    assert torch.allclose(doubled, 2 * total, rtol=1e-5)


def test_one_class_has_no_class_loss(anchors_grid):
    _, parts = DetectionLoss(anchors_grid, STRIDES, 1)(_head(nc=1), _targets(nc=1))
    assert parts[2] == 0
    assert (parts[:2] > 0).all()


def test_the_last_of_two_objects_in_one_cell_sets_its_objectness(anchors_grid):
    raw = [torch.ones(1, 3, 8 // k, 8 // k, 8) for k in (1, 2, 4)]
    near = torch.tensor([0, 0, 0.55, 0.55, 0.2, 0.2])
    far = torch.tensor([0, 1, 0.56, 0.56, 0.5, 0.16])
    loss = DetectionLoss(anchors_grid, STRIDES, 3)
    first = loss(raw, torch.stack((near, far)))[1][1]
    second = loss(raw, torch.stack((far, near)))[1][1]
    assert first != second


def test_perfect_predictions_have_no_box_loss(anchors_grid):
    """The centre cell's own copy can be met exactly: decode of zero logits is centre 0.5 and the anchor's size."""
    wh = anchors_grid[1, 0] / 4
    targets = torch.tensor([[0, 0, 2.5 / 4, 2.5 / 4, wh[0], wh[1]]])
    raw = [torch.zeros(1, 3, 8 // k, 8 // k, 8) for k in (1, 2, 4)]
    loss = DetectionLoss(anchors_grid, STRIDES, 3, LossConfig(anchor_t=1.0001))
    _, parts = loss(raw, targets)
    assert parts[0] == pytest.approx(0, abs=1e-6)


def test_the_loss_needs_no_answer_from_the_device(anchors_grid):
    """On the meta device every read of a value fails: shapes alone must carry the whole forward pass."""
    loss = DetectionLoss(anchors_grid, STRIDES, 3).to("meta")
    raw = [level.detach().to("meta").requires_grad_() for level in _head()]
    total, parts = loss(raw, _targets().to("meta"))
    total.backward()
    assert total.shape == ()
    assert parts.shape == (3,)
    assert all(level.grad is not None and level.grad.shape == level.shape for level in raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_levels_and_their_gradients_take_150_operations_at_most(anchors_grid, dtype):
    loss, raw, targets = DetectionLoss(anchors_grid, STRIDES, 3), _head(dtype=dtype), _targets()
    loss(raw, targets)  # makes the numbers of this shape
    with OperationCount() as count:
        torch.autograd.grad(loss(raw, targets)[0], raw)
    assert count.total.operations <= 150


def test_the_loss_compiles_as_one_graph_to_the_same_bits(anchors_grid):
    raw, targets, loss = _head(), _targets(), DetectionLoss(anchors_grid, STRIDES, 3)
    compiled = torch.compile(loss, fullgraph=True, dynamic=False, backend="aot_eager")
    expected, found = (torch.autograd.grad(function(raw, targets)[0], raw) for function in (loss, compiled))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_training_takes_up_the_numbers_that_a_validation_has_made(anchors_grid):
    loss, raw = DetectionLoss(anchors_grid, STRIDES, 3), _head()
    with torch.inference_mode():
        loss([level.detach() for level in raw], _targets())
    loss(raw, _targets())[0].backward()
    assert all(level.grad.any() for level in raw)


def _by_positives(raw, targets, anchors_grid, nc):
    """The loss as the formula reads: level by level, of the positives alone, by autograd."""
    gains, total = (0.05, 1.0, 0.5 * nc / 80), torch.zeros(3)
    for level, anchors, balance in zip(raw, anchors_grid, level_balance(3), strict=True):
        height, width = level.shape[2:4]
        size = torch.tensor([width, height])
        objectness, box, cls = torch.zeros(level.shape[:4]), [], []
        for copy, anchor, row in ((c, a, t) for c in range(5) for a in range(3) for t in targets):
            centre, wh = row[2:4] * size, row[4:6] * size
            ratio = wh / anchors[anchor]
            axis, from_end = (copy - 1) % 2, copy > 2
            distance = (size - centre if from_end else centre)[axis]
            near = copy == 0 or (distance % 1 < 0.5 and distance > 1)
            if not near or torch.maximum(ratio, 1 / ratio).max() >= 4:
                continue
            shift = torch.zeros(2)
            shift[axis] = 0 if copy == 0 else (-0.5 if from_end else 0.5)
            x, y = (centre - shift).long().clamp_min(0).minimum(size - 1)
            logits = level[int(row[0]), anchor, y, x]
            share = logits[:4].sigmoid()
            found = torch.cat((2 * share[:2] - 0.5, (2 * share[2:]).square() * anchors[anchor]))
            quality = ciou(found, torch.cat((centre - torch.stack((x, y)), wh)))
            objectness[int(row[0]), anchor, y, x] = quality.detach().clamp_min(0)
            hot = (torch.arange(nc) == row[1]).float()
            box.append(1 - quality)
            cls.append(F.binary_cross_entropy_with_logits(logits[5:], hot))
        obj = balance * F.binary_cross_entropy_with_logits(level[..., 4], objectness)
        means = [torch.stack(values).mean() if values else torch.zeros(()) for values in (box, cls)]
        total = total + torch.stack((means[0], obj, means[1]))
    parts = total * torch.tensor(gains)
    return parts.sum() * len(raw[0]), parts


def test_loss_and_gradient_are_those_of_the_positives_one_by_one(anchors_grid):
    raw, targets = _head(scale=2.0), _targets(count=12)
    targets[5, 2:] = targets[3, 2:]  # two objects in one cell
    targets[5, 0] = targets[3, 0]
    targets[7, 2:4] = 1.0  # the far corner
    expected, expected_parts = _by_positives(raw, targets, anchors_grid, 3)
    gradients = torch.autograd.grad(expected, raw)
    total, parts = DetectionLoss(anchors_grid, STRIDES, 3)(raw, targets)
    torch.testing.assert_close(parts, expected_parts.detach(), rtol=1e-5, atol=1e-7)
    for found, gradient in zip(torch.autograd.grad(total, raw), gradients, strict=True):
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("count", "rows"), [(0, 64), (64, 64), (65, 128), (300, 512)])
def test_targets_are_padded_to_few_lengths(count, rows):
    targets = _targets(count=count)
    filled = padded(targets)
    assert filled.shape == (rows, 6)
    assert torch.equal(filled[:count], targets)


def test_only_a_gpu_gets_padded_targets():
    targets = _targets()
    assert targets_on(torch.device("cpu"), targets) is targets
    assert targets_on(torch.device("meta"), targets).shape == (64, 6)


@pytest.mark.parametrize("count", [0, 9])
def test_padding_changes_no_gradient_and_the_loss_by_rounding_alone(anchors_grid, count):
    raw, targets = _head(), _targets(count=count)
    loss = DetectionLoss(anchors_grid, STRIDES, 3)
    (total, parts), (same, same_parts) = loss(raw, targets), loss(raw, padded(targets))
    torch.testing.assert_close(same_parts, parts, rtol=1e-6, atol=0)
    gradients = zip(torch.autograd.grad(total, raw), torch.autograd.grad(same, raw), strict=True)
    assert all(torch.equal(a, b) for a, b in gradients)


@pytest.mark.parametrize("cells", [1, 2, 20])
@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_padding_touches_no_cell(cells, margin):
    filler = padded(_targets(count=0))
    for axis in (2, 3):
        assert not touched_cells(filler[:, axis], filler[:, axis + 2], cells, margin).any()


def test_every_parameter_gradient_of_yolov5n_equals_the_reference(train_reference, weights):
    from compress.models.checkpoint import load_model

    model = load_model(weights).train()
    raw = model(torch.from_numpy(train_reference.arrays["imgs_u8"]).float() / 255)
    total, _ = DetectionLoss(model.model[-1].anchors, model.strides, 80)(raw, train_reference.targets)
    total.backward()
    expected = train_reference.figures["A_default_hyp_imgsz640"]["grad_norms"]
    norms = {name: parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms == pytest.approx(expected, rel=1e-3)
    for name in ("model.24.m.0.bias", "model.0.conv.weight"):
        gradient = torch.from_numpy(train_reference.arrays[f"grad_{name}"])
        assert torch.allclose(model.get_parameter(name).grad, gradient, rtol=1e-3, atol=1e-6)
