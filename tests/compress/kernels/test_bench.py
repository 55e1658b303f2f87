"""The benchmark as far as it needs no GPU: what is planned, how figures come about, what a person reads."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from compress.kernels import bench, bench_case
from compress.kernels.bench_case import (
    Case,
    arguments,
    input_sets,
    learners_of,
    measure_all,
    plan,
    quantiles,
    ratios,
    shuffled_rounds,
    timing,
    variants,
)
from compress.kernels.losses import FUSED
from runtime.errors import EdgestillError

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def small_levels(monkeypatch):
    """A pyramid for a CPU."""
    monkeypatch.setattr(bench_case, "LEVELS", {"s8": (2, 8, 8, 8), "s16": (2, 16, 4, 4), "s32": (2, 32, 2, 2)})


def timed(us: float, **notes) -> dict:
    return timing([us] * 3, 3 * MIB) | notes


# ---- plan and figures ---------------------------------------------------------------------------------------------


def test_all_levels_in_half_precision_come_first() -> None:
    cases = plan("cwd")
    assert cases[0] == Case("cwd", "all", "fp16")
    assert len(set(cases)) == 8
    assert plan("cwd", quick=True) == cases[:1]


def test_a_map_of_all_levels_is_as_large_as_its_levels_together() -> None:
    parts = [Case("pkd", size, "fp32").map_bytes for size in ("s8", "s16", "s32")]
    assert Case("pkd", "all", "fp32").map_bytes == sum(parts) == 183_500_800
    assert Case("pkd", "all", "fp16").map_bytes * 2 == sum(parts)


@pytest.mark.parametrize(("map_mib", "l2_mib", "sets"), [(12.5, 50, 6), (25, 50, 3), (50, 50, 2), (175, 50, 2)])
def test_inputs_are_four_times_the_cache(map_mib, l2_mib, sets) -> None:
    assert input_sets(int(map_mib * MIB), l2_mib * MIB) == sets


def test_every_variant_has_its_turn_in_each_round() -> None:
    order = list(shuffled_rounds(["a", "b", "c"], 20, random.Random(1)))
    rounds = [order[i : i + 3] for i in range(0, 60, 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1


def test_quantiles_lie_between_the_nearest_samples() -> None:
    found = quantiles([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert found == pytest.approx({"p20": 2.0, "p50": 3.5, "p80": 5.0})
    assert quantiles([7.0]) == {"p20": 7.0, "p50": 7.0, "p80": 7.0}


def test_bandwidth_is_bytes_over_the_median() -> None:
    assert timing([90.0, 100.0, 1000.0], 300_000_000)["gb_s"] == pytest.approx(3000)


def test_ratios_compare_medians_with_ours() -> None:
    found = ratios({"ours": timed(100), "ours_again": timed(97), "stream": timed(90), "eager": timed(500)})
    assert found["of_stream"] == pytest.approx(0.9)
    assert found["noise"] == pytest.approx(0.03)
    assert found["eager_over_ours"] == pytest.approx(5)
    assert found["compile_over_ours"] is None


def test_without_ours_nothing_is_compared() -> None:
    assert set(ratios({"ours": {"error": "x"}, "eager": timed(5)}).values()) == {None}


# ---- inputs and variants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_all_variants_of_a_loss_give_its_gradient(small_levels, loss, dtype) -> None:
    case = Case(loss, "all", dtype)
    calls = variants(case, CPU, 2)
    expected = calls["eager"](1)
    assert [g.shape for g in expected] == [x.shape for x in learners_of(loss, arguments(case, CPU, 1))]
    for name in ("autocast", "ours", "ours_again"):
        for found, true in zip(calls[name](1), expected, strict=True):
            assert torch.allclose(found.float(), true.float(), rtol=0.05, atol=0.05 * true.abs().max().item()), name


def test_sets_of_inputs_differ_and_layouts_hold_other_numbers_of_the_same_kind(small_levels) -> None:
    case = Case("cwd", "s8", "fp16")
    first, second, last = arguments(case, CPU, 0), arguments(case, CPU, 1), arguments(case, CPU, 0, channels_last=True)
    assert not torch.equal(first[0][0], second[0][0])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*last[0], *last[1]))
    assert first[0][0].is_contiguous()
    assert first[0][0].requires_grad
    assert not first[1][0].requires_grad


def test_the_ceilings_write_each_set_to_a_place_of_its_own(small_levels) -> None:
    calls = bench_case.upper_bounds(Case("cwd", "all", "fp32"), CPU, 2)
    for call in calls.values():
        (a,), (b,) = call(0), call(1)
        assert a.data_ptr() != b.data_ptr()
        assert a.numel() == Case("cwd", "all", "fp32").elements


def test_a_case_that_would_not_end_in_time_is_left_out(monkeypatch, tmp_path) -> None:
    clock = iter([0.0, 8.0, 8.0, 10.0, 20.0])
    monkeypatch.setattr(bench_case.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bench_case, "measure", lambda case, device, samples: case._asdict())
    measure_all(plan("cwd")[:3], CPU, 3, 15.0, tmp_path / "lines")
    assert len(bench.read_lines(tmp_path / "lines")) == 1


# ---- the document -------------------------------------------------------------------------------------------------


def case_row(**variants_found) -> dict:
    case = Case("cwd", "s8", "fp16")
    found = {"stream": timed(50), "ours": timed(60, peak_extra_bytes=case.map_bytes + MIB, host_us=20.0)}
    found |= variants_found
    return {**case._asdict(), "map_bytes": case.map_bytes, "variants": found, "ratios": ratios(found)}


def test_a_row_has_a_cell_under_every_column() -> None:
    line = bench.row(case_row(eager=timed(600)))
    assert line.split() == [
        "cwd",
        "fp16",
        "s8",
        "50.0",
        "60.0",
        "-",
        "52",
        "0.83",
        "10.00",
        "-",
        "-",
        "-",
        "1.00",
        "20",
    ]


def test_what_could_not_be_measured_is_a_dash_and_a_remark() -> None:
    case = case_row(ours={"error": "EdgestillError: no compiler"})
    assert bench.row(case).split()[4:] == ["-"] * 10
    told = bench.remarks({"cases": [case], "missing": [], "seconds": 3.0})
    assert told.splitlines() == ["cwd fp16 s8: ours failed: EdgestillError: no compiler", "1 cases in 3 s"]


def test_cases_that_were_not_reached_are_named() -> None:
    left = bench.missing("cwd", [case_row()], "no time was left", quick=False)
    assert len(left) == 7
    assert {m["why"] for m in left} == {"no time was left"}


def test_half_a_line_of_a_process_that_was_ended_is_ignored(tmp_path) -> None:
    path = tmp_path / "lines"
    assert bench.read_lines(path) == []
    path.write_text(json.dumps({"a": 1}) + "\n" + '{"a": ')
    assert bench.read_lines(path) == [{"a": 1}]


def test_a_loss_whose_process_fails_or_hangs_is_told_and_keeps_its_cases(monkeypatch) -> None:
    def run(command, timeout, check):
        path = Path(command[command.index("--lines") + 1])
        path.write_text('{"size": "all"}\n')
        raise bench.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.measure_loss("cwd", 1.0, quick=True) == ([{"size": "all"}], "it took too long")


def test_the_document_is_published_after_each_loss(monkeypatch, tmp_path, capsys) -> None:
    published = []
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "facts", lambda: {"gpu": {"name": "A GPU"}, "torch": "2"})
    monkeypatch.setattr(bench, "clocks", dict)
    monkeypatch.setattr(bench, "measure_loss", lambda loss, seconds, quick: ([case_row()], "it took too long"))
    monkeypatch.setattr(bench, "write_json", lambda path, document: published.append(len(document["cases"])))
    assert bench.main(["--out", str(tmp_path / "x.json")]) == 0
    assert published == [*range(1, len(FUSED) + 1)]
    assert "cwd          fp16" in capsys.readouterr().out


def test_without_a_gpu_one_line_says_so(monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench.torch.cuda, "is_available", lambda: False)
    assert bench.main([]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: torch sees no NVIDIA GPU here")
    assert told.count("\n") == 1


def test_a_process_of_one_loss_says_why_the_kernels_cannot_run(monkeypatch, tmp_path, capsys) -> None:
    def refuse(index):
        raise EdgestillError("no compiler")

    monkeypatch.setattr(bench_case, "gpu", refuse)
    assert bench_case.main(["cwd", "--lines", str(tmp_path / "x"), "--seconds", "1"]) == 1
    assert capsys.readouterr().err == "error: no compiler\n"
