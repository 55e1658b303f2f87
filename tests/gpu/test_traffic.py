"""The profiler's table, read without a GPU."""

from __future__ import annotations

import pytest
import traffic

from runtime.errors import EdgestillError

HEADER = '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'


def lines_of(*launches: tuple[str, int, int, int]) -> list[str]:
    """The profiler's lines for launches of (kernel, bytes read, bytes written, nanoseconds)."""
    rows = [
        f'"{number}","7","{kernel}","{metric}","unit","{value:,}"'
        for number, (kernel, *values) in enumerate(launches)
        for metric, value in zip(traffic.METRICS, values, strict=True)
    ]
    return ["==PROF== connected", HEADER, *rows]


def all_cases(launches_of_each: int = 2) -> list[tuple[str, int, int, int]]:
    names = {"weighted_mse": "weighted_mse_f16", "adapter_mse": "adapter_mse_f16"}
    return [
        (names.get(case.loss, f"{case.loss}_first_f16"), 2 * case.map_bytes, case.map_bytes, 5000)
        for case in traffic.CASES
        for _ in range(launches_of_each)
    ]


def test_launches_are_added_up_by_case_in_maps() -> None:
    found = traffic.by_case(traffic.parse(lines_of(*all_cases())))
    assert [(one["loss"], one["layout"]) for one in found] == [(case.loss, case.layout) for case in traffic.CASES]
    assert {(one["launches"], one["read_u"], one["written_u"], one["us"]) for one in found} == {(2, 4.0, 2.0, 10.0)}
    assert found[0]["layout"] == "channels_last", "what training has comes first"


def test_a_table_that_lacks_a_case_is_refused() -> None:
    with pytest.raises(EdgestillError, match="the profiler saw weighted_mse, adapter_mse, cwd"):
        traffic.by_case(traffic.parse(lines_of(*all_cases()[:-2])))


def test_a_profiler_that_saw_nothing_gives_no_launch() -> None:
    assert traffic.parse(["==ERROR== no permission"]) == []
