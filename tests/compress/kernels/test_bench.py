"""The benchmark as far as it needs no GPU: what is planned, how figures come about, what a person reads."""

from __future__ import annotations

import json
import random
import time
import types
from pathlib import Path

import pytest
import torch

from compress.kernels import bench, bench_case
from compress.kernels.bench_case import (
    Case,
    Timed,
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
CASE = Case("cwd", "all", "fp16")._asdict()


@pytest.fixture
def small_levels(monkeypatch):
    """A pyramid for a CPU."""
    monkeypatch.setattr(bench_case, "LEVELS", {"s8": (2, 8, 8, 8), "s16": (2, 16, 4, 4), "s32": (2, 32, 2, 2)})


def timed(us: float, **notes) -> dict:
    return timing([us] * 3, 3 * MIB) | notes


# ---- plan and figures ---------------------------------------------------------------------------------------------


def test_all_levels_in_half_precision_and_the_layout_of_training_come_first() -> None:
    cases = plan("cwd")
    assert cases[:2] == [Case("cwd", "all", "fp16", "channels_last"), Case("cwd", "s8", "fp16", "channels_last")]
    assert [case.dtype for case in cases] == 8 * ["fp16"] + 8 * ["fp32"]
    assert len(set(cases)) == 16
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
    found = ratios(
        {
            "ours": timed(100, kernels_us=80), "ours_again": timed(97), "stream": timed(90, kernels_us=76),
            "eager": timed(500),
        }
    )  # fmt: skip
    assert found["of_stream"] == pytest.approx(0.9)
    assert found["kernels_of_stream"] == pytest.approx(0.95)
    assert found["noise"] == pytest.approx(0.03)
    assert found["eager_over_ours"] == pytest.approx(5)
    assert found["compile_over_ours"] is found["kernels_compile_over_ours"] is None


def test_without_ours_nothing_is_compared() -> None:
    assert set(ratios({"ours": {"error": "x"}, "eager": timed(5)}).values()) == {None}


# ---- inputs and variants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", FUSED)
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("layout", bench_case.LAYOUTS)
def test_all_variants_of_a_loss_give_its_gradient(small_levels, loss, dtype, layout) -> None:
    case = Case(loss, "all", dtype, layout)
    calls = variants(case, CPU, 2)
    expected = calls["eager"](1)
    assert [g.shape for g in expected] == [x.shape for x in learners_of(loss, arguments(case, CPU, 1))]
    for name in ("ours", "ours_again"):
        for found, true in zip(calls[name](1), expected, strict=True):
            assert torch.allclose(found.float(), true.float(), rtol=0.05, atol=0.05 * true.abs().max().item()), name


def test_sets_of_inputs_differ_and_have_the_layout_of_the_case(small_levels) -> None:
    last, nchw = (Case("cwd", "s8", "fp16", layout) for layout in ("channels_last", "nchw"))
    first, second, other = arguments(last, CPU, 0), arguments(last, CPU, 1), arguments(nchw, CPU, 0)
    assert not torch.equal(first[0][0], second[0][0])
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (*first[0], *first[1]))
    assert all(x.is_contiguous() for x in (*other[0], *other[1]))
    assert first[0][0].requires_grad
    assert not first[1][0].requires_grad


def test_the_ceilings_write_each_set_to_a_place_of_its_own(small_levels) -> None:
    calls = bench_case.upper_bounds(Case("cwd", "all", "fp32"), CPU, 2)
    for call in calls.values():
        (a,), (b,) = call(0), call(1)
        assert a.data_ptr() != b.data_ptr()
        assert a.numel() == Case("cwd", "all", "fp32").elements


def test_a_case_that_would_not_end_in_time_is_left_out(monkeypatch, tmp_path) -> None:
    clock = iter([0.0, 8.0, 9.0])
    monkeypatch.setattr(bench_case.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(bench_case, "measure", lambda case, device, samples, until: Timed(case, 2, {}, {}, 8.0))
    monkeypatch.setattr(bench_case, "kernel_times", list)
    measure_all(plan("cwd")[:3], CPU, 3, 15.0, tmp_path / "lines")
    assert [bench.case_of(row) for row in bench.read_cases(tmp_path / "lines")] == plan("cwd")[:1]


# ---- the document -------------------------------------------------------------------------------------------------


def case_row(**variants_found) -> dict:
    case = Case("cwd", "s8", "fp16")
    found = {"stream": timed(50, kernels_us=45.0)}
    found["ours"] = timed(60, kernels_us=50.0, peak_extra_bytes=case.map_bytes + MIB, host_us=20.0)
    found |= variants_found
    return {**case._asdict(), "map_bytes": case.map_bytes, "variants": found, "ratios": ratios(found)}


def test_a_row_has_a_cell_under_every_title() -> None:
    line = bench.row(case_row(eager=timed(600)))
    assert line.split()[:8] == ["cwd", "fp16", "s8", "last", "50.0", "60.0", "45.0", "50.0"]
    assert line.split()[8:] == ["0.83", "0.90", "-", "10.00", "-", "1.00", "20"]
    assert {len(title) for title in bench.header().splitlines()} == {len(line)}


def test_what_could_not_be_measured_is_a_dash_and_a_remark() -> None:
    case = case_row(ours={"error": "EdgestillError: no compiler"}, eager=timed(70, why_no_kernel_time="no CUPTI"))
    assert bench.row(case).split()[5:] == ["-", "45.0", *["-"] * 8]
    told = bench.remarks({"cases": [case], "missing": [], "seconds": 3.0})
    assert told.splitlines() == [
        "cwd s8 fp16 channels_last: ours failed: EdgestillError: no compiler",
        "cwd s8 fp16 channels_last: eager without the time of its kernels: no CUPTI",
        "1 cases in 3 s",
    ]


def test_cases_that_were_not_reached_are_named_in_the_document_and_counted_in_the_remarks() -> None:
    left = bench.missing("cwd", [case_row()], "no time was left", quick=False)
    assert len(left) == 15
    assert {m["why"] for m in left} == {"no time was left"}
    told = bench.remarks({"cases": [], "missing": left, "seconds": 3.0})
    assert told.splitlines()[0] == "cwd: 15 cases not measured: no time was left"


def test_the_last_whole_line_of_a_case_counts(tmp_path) -> None:
    path = tmp_path / "lines"
    assert bench.read_cases(path) == []
    first, other = Case("cwd", "s8", "fp16")._asdict(), Case("cwd", "s16", "fp16")._asdict()
    lines = [first | {"a": 1}, other, first | {"a": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"a": ')
    assert bench.read_cases(path) == [first | {"a": 2}, other]


@pytest.fixture
def timed_case(monkeypatch) -> Timed:
    properties = types.SimpleNamespace(L2_cache_size=1)
    monkeypatch.setattr(bench_case.torch.cuda, "get_device_properties", lambda device: properties)

    def prepare(call, count):
        if call is len:
            raise RuntimeError("no memory")
        if call is min:
            time.sleep(60)
        return bench_case.PreparedVariant(call, {"host_us": 1.0})

    monkeypatch.setattr(bench_case, "prepare", prepare)
    monkeypatch.setattr(bench_case, "LEAST_S", 0.1)
    made = {"ours": abs, "compile": min, "eager": max, "copy": len}
    monkeypatch.setattr(bench_case, "variants", lambda case, device, count: made)
    monkeypatch.setattr(bench_case, "times_in_turns", lambda runs, samples: {name: [2.0, 2.0] for name in runs})
    return bench_case.measure(Case("cwd", "s8", "fp16"), CPU, 2, until=0.0)


def test_a_variant_that_fails_or_is_not_ready_in_time_costs_the_others_nothing(timed_case) -> None:
    assert timed_case.found["copy"] == {"error": "RuntimeError: no memory"}
    assert timed_case.found["compile"] == {"error": "TimeoutError: not ready in 0 s"}
    assert timed_case.calls == {"ours": abs, "eager": max}
    assert timed_case.found["ours"]["us"]["p50"] == 1000


def test_the_times_of_kernels_stand_beside_those_of_their_calls(timed_case, monkeypatch) -> None:
    def profiled(calls):
        assert calls == [(abs, 2), (max, 2)]
        return [{"kernels_us": 800.0, "kernels": 2.0}, {"kernels_us": 1600.0, "kernels": 9.0}]

    monkeypatch.setattr(bench_case, "kernel_times", profiled)
    bench_case.add_kernel_times([timed_case])
    row = timed_case.row()
    assert [row["variants"][name]["kernels_us"] for name in ("ours", "eager")] == [800, 1600]
    assert row["ratios"]["eager_over_ours"] == 1


def test_a_profiler_that_fails_costs_the_timings_nothing(timed_case, monkeypatch) -> None:
    def profiled(calls):
        raise RuntimeError("CUPTI is busy")

    monkeypatch.setattr(bench_case, "kernel_times", profiled)
    bench_case.add_kernel_times([timed_case])
    assert timed_case.found["ours"]["why_no_kernel_time"] == "CUPTI is busy"
    assert timed_case.found["ours"]["us"]["p50"] == 1000


def test_kernels_belong_to_the_call_whose_mark_they_follow() -> None:
    mark = ("void at::cuda::spin_kernel(long)", 1.0)
    spans = [("before", 5.0), mark, ("a", 2.0), ("b", 4.0), mark, ("c", 9.0)]
    assert bench_case.times_between_marks(spans, [2, 3]) == [
        {"kernels_us": 3.0, "kernels": 1.0},
        {"kernels_us": 3.0, "kernels": 1 / 3},
    ]
    with pytest.raises(RuntimeError, match="saw 1 of 2 variants"):
        bench_case.times_between_marks([mark, mark, ("c", 9.0)], [2, 3])
    with pytest.raises(RuntimeError, match="saw 0 of 2 variants"):
        bench_case.times_between_marks([], [2, 3])


def test_a_loss_whose_process_fails_or_hangs_is_told_and_keeps_its_cases(monkeypatch) -> None:
    def run(command, timeout, check):
        path = Path(command[command.index("--lines") + 1])
        path.write_text(json.dumps(CASE) + "\n")
        raise bench.subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(bench.subprocess, "run", run)
    assert bench.measure_loss("cwd", 1.0, quick=True) == ([CASE], "it took too long")


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
