"""The best class of each row: its logit for all rows, its number for the candidates.

σ is monotone, so the best is found on logits, in the layout that the convolution wrote, and nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from compress.graph.builder import INT64, GraphBuilder
from compress.graph.columns import look_up, take
from compress.graph.head import HeadShape


def groups_of(nc: int) -> int:
    """The number of groups, of equal size: the largest divisor up to √nc."""
    return max(g for g in range(1, nc + 1) if nc % g == 0 and g * g <= nc)


class FewClasses:
    """Class maps (B, nc·na, H, W) of all levels, joined to (B,nc,N); `best` (B,1,N) is the best logit of each row."""

    def __init__(self, builder: GraphBuilder, maps: Sequence[str], head: HeadShape) -> None:
        self._b, self._nc = builder, head.nc
        lines = builder.ints("class.lines", [0, head.nc, -1])
        levels = [builder.op("Reshape", name, lines, name=f"{name}.matrix") for name in maps]
        self._logits = self.best = builder.op("Concat", *levels, name="head.classes", axis=2)
        if head.nc > 1:
            self.best = reduce(builder, "Max", self._logits, 1, "head.best")

    def of_rows(self, row: str, kind: str, count: int) -> str:
        """The lowest class with the best logit, float32 (B,1,K), of rows (B,1,K) and their kinds, level and anchor."""
        logits = take(self._b, self._logits, row, self._nc, count, "class.logits")
        best = take(self._b, self.best, row, 1, count, "class.best")
        return first_equal(self._b, logits, best, np.arange(self._nc), "candidates.class")


class ManyClasses:
    """Class maps (B, na·nc, H, W) of all levels; `best` (B,1,N) is the best logit of each row.

    Classes are divided into groups: the candidates read the best of each group and the members of one group, about
    2·√nc logits instead of nc, which lie far apart in memory.
    """

    def __init__(self, builder: GraphBuilder, maps: Sequence[str], head: HeadShape) -> None:
        self._b, self._maps, self._head = builder, maps, head
        self._lines: dict[str, str] = {}
        self._groups = groups_of(head.nc)
        self._group_maps = [self._reduced(name, head.nc, self._groups) for name in maps]
        best = [self._line(self._reduced(name, self._groups, 1)) for name in self._group_maps]
        self.best = builder.op("Concat", *best, name="head.best", axis=2)

    def of_rows(self, row: str, kind: str, count: int) -> str:
        """As of `FewClasses`."""
        nc, size = self._head.nc, self._head.nc // self._groups
        best = take(self._b, self.best, row, 1, count, "class.best")
        seen = self._read(self._group_maps, self._groups, self._groups, row, kind, "", "group")
        group = first_equal(self._b, seen, best, np.arange(0, nc, size), "group.start")
        start = self._b.op("Cast", group, name="group.number", to=INT64)
        logits = self._read(self._maps, nc, size, row, kind, start, "class")
        member = first_equal(self._b, logits, best, np.arange(size), "class.member")
        return self._b.op("Add", group, member, name="candidates.class")

    def _reduced(self, name: str, before: int, after: int) -> str:
        """(B, na·before, H, W) -> (B, na·after, 1, H·W), the maxima of before/after neighbours."""
        if before == after:
            return name
        shape = self._b.ints(f"class.from_{before}", [0, self._head.na * after, before // after, -1])
        lines = self._b.op("Reshape", name, shape, name=f"{name}.to_{after}")
        return reduce(self._b, "Max", lines, 2, f"{name}.best_{after}")

    def _line(self, name: str) -> str:
        if name not in self._lines:
            self._lines[name] = self._b.op("Reshape", name, self._b.ints("line", [0, 1, -1]), name=f"{name}.line")
        return self._lines[name]

    def _read(self, maps: Sequence[str], lines: int, taken: int, row: str, kind: str, start: str, at: str) -> str:
        """(B,taken,K) of maps with `lines` channels an anchor, from channel `start` (B,1,K) on, or the first one.

        Every level is read, where the row is of another level at its first place: cheaper than joining the maps.
        """
        b, nl = self._b, len(maps)
        facts = look_up(b, self._facts(lines), kind, f"{at}.facts")
        names = [f"{at}.{part}" for part in ("here", "shift", "cells")]
        here, shift, cells = b.ops("Split", facts, b.ints(f"{at}.parts", [nl] * 3), names=names, axis=1)
        first = b.op("Add", b.op("Mul", row, here, name=f"{at}.rows"), shift, name=f"{at}.first")
        if start:
            first = b.op("Add", first, b.op("Mul", cells, start, name=f"{at}.skipped"), name=f"{at}.from")
        ones = b.ints("class.ones", [1] * nl)
        mask = b.op("Greater", here, b.ints("class.nought", 0), name=f"{at}.mask")  # OpenVINO casts no part of a Split
        firsts, masks = (
            b.ops("Split", values, ones, names=[f"{at}.{level}.{part}" for level in range(nl)], axis=1)
            for part, values in (("first", first), ("here", mask))
        )
        merged = ""
        for level, (name, (height, width)) in enumerate(zip(maps, self._head.grids_hw, strict=True)):
            steps = b.ints(f"{at}.{level}.steps", np.arange(taken)[:, None] * height * width)
            index = self._line(b.op("Add", firsts[level], steps, name=f"{at}.{level}.index"))
            found = b.op("GatherElements", self._line(name), index, name=f"{at}.{level}.found", axis=2)
            logits = b.op("Reshape", found, b.ints(f"{at}.lines", [0, taken, -1]), name=f"{at}.{level}.logits")
            merged = b.op("Where", masks[level], logits, merged, name=f"{at}.{level}.merged") if level else logits
        return merged

    def _facts(self, lines: int) -> np.ndarray:
        """(3·nl, nl·na) of each kind: 1 in its level; what to add to a row for its place in the flat map; cells."""
        head = self._head
        nl, columns = len(head.strides), []
        for level, (height, width) in enumerate(head.grids_hw):
            for anchor in range(head.na):
                facts = np.zeros((3, nl), np.int64)
                shift = anchor * (lines - 1) * height * width - sum(head.level_rows[:level])
                facts[:, level] = 1, shift, height * width
                columns.append(facts.ravel())
        return np.stack(columns, axis=1)


def first_equal(b: GraphBuilder, logits: str, best: str, numbers: np.ndarray, name: str) -> str:
    """The first of `numbers`, one for each line, whose line holds the best logit. ArgMax takes five times as long."""
    equal = b.op("Equal", logits, best, name=f"{name}.equal")
    values, none = b.floats(f"{name}.numbers", numbers[:, None]), b.floats(f"{name}.none", numbers[-1] + 1)
    return reduce(b, "Min", b.op("Where", equal, values, none, name=f"{name}.found"), 1, name)


def reduce(b: GraphBuilder, kind: str, values: str, axis: int, name: str) -> str:
    return b.op(f"Reduce{kind}", values, b.ints(f"axis_{axis}", [axis]), name=name, keepdims=1)
