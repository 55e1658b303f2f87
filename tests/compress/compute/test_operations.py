from __future__ import annotations

import torch

from compress.compute.operations import OperationCount, Work

KIB = 256
"""float32 elements of 1024 bytes."""


def test_operations_and_their_bytes_are_counted_by_phase_and_gradients_by_the_phase_they_belong_to() -> None:
    one = torch.ones(KIB, requires_grad=True)
    with OperationCount() as count:
        with count.phase("product"):
            product = one * 2
        with count.phase("sums"):
            loss = product.exp().sum()
        loss.backward()
    assert count.work["product"] == Work(1, 2048)
    assert count.work["sums"] == Work(2, 2048 + 1024 + 4)
    assert count.work["product backward"] == Work(1, 2048)
    assert count.work["sums backward"] == Work(1, 1024 + 1024 + 4)  # the gradient of a sum is expanded, not copied
    assert count.total.operations == sum(work.operations for work in count.work.values())


def test_a_phase_inside_another_counts_for_itself() -> None:
    with OperationCount() as count, count.phase("outer"):
        torch.ones(4) + 1
        with count.phase("inner"):
            torch.ones(4) + 1
        torch.ones(4) + 1
    assert {name: work.operations for name, work in count.work.items()} == {"outer": 4, "inner": 2}


def test_views_and_allocations_are_no_work() -> None:
    with OperationCount() as count:
        torch.empty(KIB).view(16, 16).T.unsqueeze(0).expand(4, 16, 16).detach()
    assert count.total == Work()


def test_a_gather_moves_its_rows_and_not_the_whole_table() -> None:
    table, rows = torch.ones(100, KIB), torch.tensor([3, 4])
    with OperationCount() as count:
        table.index_select(0, rows)
        table.index_add_(0, rows, torch.ones(2, KIB))
    creation, index = 2048, 2 * 8
    assert count.total.bytes == (2 * 2048 + index) + creation + (3 * 2048 + index)


def test_the_meta_device_is_counted_as_any_other() -> None:
    with OperationCount() as count:
        torch.zeros(1 << 40, device="meta") + 1
    assert count.total.bytes == 3 * 4 << 40
