"""Soft labels of a detector's head: reference, launcher of kernel.cu, and the function that losses call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.compute.boxes import EPS, decode_in_cell, paired_giou_exact
from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    Device,
    Launch,
    Launches,
    Maps,
    addresses,
    ceil_div,
    check_levels,
    fields,
    pointer,
    set_blocks,
    with_constants,
)
from compress.kernels.fused import FusedLoss
from compress.kernels.reference_helpers import sum_of_levels, widened
from runtime.errors import UsageError

TOP_CELLS = 1000
"""Cells and anchors of an image and level, by the teacher's objectness, whose classes and boxes are compared. At 640
pixels 84 to 91 % of all have a gate below 0.01 and hold 4 to 7 % of the sum; comparing them costs six times the memory.
"""
THREADS = 128
"""A tile has at most as many rows: a thread each."""
DIGIT_BITS = 10
"""Bits of a gate that are found at a time: one of the block's 1024 threads for each value."""
TILE_BYTES = 24 << 10
"""Gradient of a tile in shared memory: 128 rows of 80 classes in float16, ten blocks on a multiprocessor of an H100."""
TILE_STEP = 8
"""Tiles are multiples of so many rows, and so begin on the 16-byte grid."""
SOURCE = with_constants("soft_head", THREADS=THREADS, DIGIT_BITS=DIGIT_BITS, BOX_EPS=EPS)

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(student's logits, teacher's) -> both as they are compared."""


def soft_head(
    students: Maps,
    teachers: Maps,
    seen: Maps,
    anchors: Maps,
    balance: Sequence[float],
    obj: float,
    cls: float,
    box: float,
    tells_all: bool = True,
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """The divergence of the teacher's probabilities from the student's, and the overlap of their boxes. With logits
    z = (b, o, c) of cell and anchor i, gate g_i = sigmoid(o), 0 if it is NaN, binary KL of logits, on each level:

        obj * balance * mean_i KL(o_T || o_S)
        + sum_i g_i (cls * mean_k KL(c_T || c_S) + box * (1 - GIoU(box_S, box_T))) / max(sum_i g_i, B)

    and the levels are added up. The sums over i take the TOP_CELLS largest gates of each image; of equal ones whichever
    `Tensor.topk` takes, which on a GPU are the first.

    Args:
        students, teachers: (B, na, H, W, 5 + nc) logits per level, in any float dtype. Only students get a gradient.
        seen: maps like the teacher's, whose logits of objectness are those of the gates; mostly the teacher's own.
        anchors: (na, 2) per level, in cells.
        balance: factor of each level's objectness.
        obj, cls, box: factors of the parts.
        tells_all: whether the teacher gives every logit; if not, those that are NaN pull nowhere.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for maps of unlike shapes.
    """
    _check(students, teachers, seen, anchors, balance)
    arguments = ([*students], [*teachers], [*seen], [*anchors], [*balance], obj, cls, box, tells_all, scale)
    device = SOFT_HEAD.device(arguments)
    if device is None:
        return SOFT_HEAD.by_torch(arguments)
    return SOFT_HEAD.differentiable(device, SOFT_HEAD.run(device, arguments), arguments)


def _check(students: Maps, teachers: Maps, seen: Maps, anchors: Maps, balance: Sequence[float]) -> None:
    """Raises UsageError unless every level has maps of one shape, that shape's anchors, and a balance."""
    counts = [len(given) for given in (students, teachers, seen, anchors, balance)]
    if len({*counts}) != 1 or not counts[0]:
        told = "{} student maps, {} teacher maps, {} maps of gates, {} tables of anchors, {} balances".format(*counts)
        raise UsageError(told, "Give one of each per level")
    for level, (s, t, gates, a) in enumerate(zip(students, teachers, seen, anchors, strict=True)):
        if not s.shape == t.shape == gates.shape or s.dim() != 5 or a.shape != (s.shape[1], 2):
            told = ", ".join(str(tuple(tensor.shape)) for tensor in (s, t, gates, a))
            raise UsageError(f"level {level} has maps and anchors of unlike shapes: {told}", "Compare maps of one head")


# ---- the definition -----------------------------------------------------------------------------------------------


def reference(
    students: Maps,
    teachers: Maps,
    seen: Maps,
    anchors: Maps,
    balance: Sequence[float],
    obj: float,
    cls: float,
    box: float,
    tells_all: bool = True,
) -> Tensor:
    """`soft_head` in plain torch."""
    pair = as_they_are if tells_all else completed

    def objectness(student: Tensor, teacher: Tensor) -> Tensor:
        return obj * binary_kl(student, teacher)

    def cell(student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
        return classes_and_box(student, teacher, anchors_wh, cls, box)

    levels = zip(students, teachers, seen, anchors, balance, strict=True)
    return sum_of_levels(
        gated_level(s, t, gates[..., 4], a, factor, objectness, cell, pair) for s, t, gates, a, factor in levels
    )


def as_they_are(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The same logits, of a teacher that gives all."""
    return student, teacher


def completed(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of both networks; those that the teacher does not give are the student's own, which pull nowhere.

    Both are contiguous: where they are equal, so is all that is computed of them, to the last bit.
    """
    student = student.contiguous()
    return student, torch.where(teacher.isnan(), student.detach(), teacher).contiguous()


def gated_level(
    student: Tensor,
    teacher: Tensor,
    seen: Tensor,
    anchors_wh: Tensor,
    balance: float,
    objectness: Callable[[Tensor, Tensor], Tensor],
    cell: Callable[[Tensor, Tensor, Tensor], Tensor],
    pair: Pair,
) -> Tensor:
    """The loss () float32 of one level: the balanced mean of the objectness term over all cells, plus the gated mean of
    the others.

    Args:
        student, teacher: (B, na, H, W, 5 + nc) logits.
        seen: (B, na, H, W) logits of the gates.
        anchors_wh: (na, 2) in cells.
        balance: factor of the objectness.
        objectness: (B, na, H, W) terms of the logits of objectness of both.
        cell: (B, k) terms of the logits (B, k, 5 + nc) of both, and anchors (B, k, 2), that count with their gates.
        pair: makes of logits of both those that are compared.
    """
    gate, s, t, anchors = top_cells(student, teacher, seen, anchors_wh)
    own, told = pair(student[..., 4], teacher[..., 4])
    everywhere = objectness(widened(own), widened(told)).mean() * balance
    each = gate * cell(*pair(s, t), anchors)
    return everywhere + gated_mean(each.sum(), gate.sum(), len(student))


def top_cells(
    student: Tensor, teacher: Tensor, seen: Tensor, anchors_wh: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The cells and anchors of one level with the largest gates: gates (B, k), both networks' logits (B, k, 5 + nc),
    all float32, and their anchors (B, k, 2). k is at most TOP_CELLS.

    Args:
        student, teacher: (B, na, H, W, 5 + nc) logits.
        seen: (B, na, H, W) logits of the gates.
        anchors_wh: (na, 2) in cells.
    """
    height, width = student.shape[2:4]
    gates = widened(seen.flatten(1)).sigmoid().nan_to_num(0)
    gate, index = gates.topk(min(TOP_CELLS, gates.shape[1]), dim=1)
    rows = index + gates.shape[1] * torch.arange(len(gates), device=gates.device)[:, None]
    # index_select copies whole rows: forward and backward take a third of the time that gather takes on a CPU
    s, t = (widened(z.flatten(0, 3).index_select(0, rows.flatten()).view(*rows.shape, -1)) for z in (student, teacher))
    return gate, s, t, anchors_wh[index // (height * width)]


def gated_mean(sums: Tensor, gate_sum: Tensor, batch: int) -> Tensor:
    """Sum over gate sum. Below one confident cell an image the denominator stands still.

    Without that floor a batch of pure background would copy the teacher's noise at full strength.
    """
    return sums / gate_sum.clamp_min(batch)


def binary_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Bernoulli(sigmoid(z_T)) || Bernoulli(sigmoid(z_S))), element-wise, of float32 logits; exactly 0 if equal."""
    return teacher.sigmoid() * (teacher - student) + F.softplus(student) - F.softplus(teacher)


def classes_and_box(student: Tensor, teacher: Tensor, anchors_wh: Tensor, cls: float, box: float) -> Tensor:
    """The mean divergence of the classes times cls plus 1 - GIoU times box, from logits (..., 5 + nc) and anchors
    (..., 2).
    """
    classes = binary_kl(student[..., 5:], teacher[..., 5:]).mean(-1)
    return cls * classes + box * (1 - overlap(student, teacher, anchors_wh))


def overlap(student: Tensor, teacher: Tensor, anchors_wh: Tensor) -> Tensor:
    """GIoU of the boxes of both networks, from logits (..., 5 + nc) and anchors (..., 2)."""
    boxes, targets = (decode_in_cell(z[..., :4], anchors_wh) for z in (student, teacher))
    return paired_giou_exact(boxes, targets)


# ---- launcher ----------------------------------------------------------------------------------------------------


class _Level(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher seen gradient anchors weights gate_sums norm ticket"),
        *fields(ctypes.c_uint32, "images anchor_count pixels logits top first_block blocks tile"),
        *fields(ctypes.c_uint32, "student_last teacher_last seen_last"),
        *fields(ctypes.c_float, "objectness classes"),
        ("unused", ctypes.c_uint32),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("levels", _Level * MAX_LEVELS),
        *fields(ctypes.c_void_p, "scale partials ticket loss"),
        ("box", ctypes.c_float),
        ("tells_all", ctypes.c_uint32),
        ("count", ctypes.c_int32),
    )


class Level(NamedTuple):
    """One level of a head: maps (B, na, H, W, 5 + nc) whose rows of logits are dense, in one of two orders."""

    student: Tensor
    teacher: Tensor
    seen: Tensor
    gradient: Tensor
    """The student's gradient, to be written."""
    anchors: Tensor
    """(na, 2) float32."""

    @property
    def rows(self) -> int:
        """Cells and anchors of an image."""
        return math.prod(self.student.shape[1:4])

    @property
    def images(self) -> int:
        return len(self.student)

    @property
    def row_bytes(self) -> int:
        return self.student.shape[-1] * self.student.itemsize

    @property
    def tile(self) -> int:
        """Rows of a tile; a wide row takes more than TILE_BYTES."""
        return max(TILE_STEP, min(THREADS, TILE_BYTES // self.row_bytes) // TILE_STEP * TILE_STEP)

    @property
    def tiles(self) -> int:
        return ceil_div(self.images * self.rows, self.tile)


def launches(
    device: Device,
    students: Maps,
    teachers: Maps,
    seen: Maps,
    anchors: Maps,
    balance: Sequence[float],
    obj: float,
    cls: float,
    box: float,
    tells_all: bool = True,
    scale: Tensor | None = None,
) -> Launches:
    """One launch that finds the top cells, and one for loss and gradient. The gradient has the student's layout."""
    check_levels(students, teachers)
    given = zip(students, teachers, seen, anchors, strict=True)
    levels = [_level(*maps) for maps in given][::-1]  # blocks of coarse levels take longest, so they begin
    like, grid = levels[0].student, sum(level.tiles for level in levels)
    sizes = [grid, *(size for level in levels for size in (level.images * level.rows, level.images, 1))]
    workspace, loss = like.new_empty(sum(sizes), dtype=torch.float32), like.new_empty((), dtype=torch.float32)
    tickets = device.tickets(len(levels) + 1)
    ticket, *level_tickets = addresses(tickets, [1] * (len(levels) + 1))
    partials, *areas = addresses(workspace, sizes)
    args = Args(
        scale=pointer(scale),
        partials=partials,
        ticket=ticket,
        loss=pointer(loss),
        box=box,
        tells_all=tells_all,
        count=len(levels),
    )
    for index, (entry, level, factor) in enumerate(zip(args.levels, levels, balance[::-1], strict=False)):
        _describe(entry, level)
        entry.weights, entry.gate_sums, entry.norm = areas[3 * index : 3 * index + 3]
        entry.ticket, entry.objectness = level_tickets[index], obj * factor / (level.images * level.rows)
        entry.classes = cls / (level.student.shape[-1] - 5)
    images = [level.images for level in levels]
    set_blocks(args.levels, images)
    yield Launch(SOURCE, f"soft_head_select{SUFFIX[like.dtype]}", args, sum(images), 1 << DIGIT_BITS)
    set_blocks(args.levels, [level.tiles for level in levels])
    shared = max(level.tile * level.row_bytes for level in levels)
    yield Launch(SOURCE, f"soft_head{SUFFIX[like.dtype]}", args, grid, THREADS, shared)
    return loss, [level.gradient for level in levels[::-1]]


def _level(student: Tensor, teacher: Tensor, seen: Tensor, anchors: Tensor) -> Level:
    """The maps with dense rows in the student's dtype; what is already so is not copied."""
    s, t = _dense(student), _dense(teacher.to(student.dtype))
    gates = t if seen is teacher else _dense(seen.to(student.dtype))
    return Level(s, t, gates, torch.empty_like(s), anchors.float().contiguous())


def _dense(maps: Tensor) -> Tensor:
    return maps if maps.is_contiguous() or is_cells_first(maps) else maps.contiguous()


def is_cells_first(maps: Tensor) -> bool:
    """Whether (B, na, H, W, 5 + nc) is stored as (B, H, W, na, 5 + nc), as a convolution in channels last writes it.
    Maps that are dense both ways count as contiguous.
    """
    return not maps.is_contiguous() and maps.permute(0, 2, 3, 1, 4).is_contiguous()


def _describe(entry: _Level, level: Level) -> None:
    images, anchors, height, width, logits = level.student.shape
    entry.student, entry.teacher, entry.seen, entry.gradient, entry.anchors = map(pointer, level)
    entry.images, entry.anchor_count, entry.pixels, entry.logits = images, anchors, height * width, logits
    entry.top, entry.tile = min(TOP_CELLS, level.rows), level.tile
    entry.student_last, entry.teacher_last, entry.seen_last = map(is_cells_first, level[:3])


SOFT_HEAD = FusedLoss(
    "soft_head",
    "Tensor[] students, Tensor[] teachers, Tensor[] seen, Tensor[] anchors, float[] balance, float obj, float cls, "
    "float box, bool tells_all",
    function=soft_head,
    source=SOURCE,
    launches=launches,
    reference=reference,
)
