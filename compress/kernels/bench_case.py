"""Measure one fused loss against other ways to compute it, on a GPU; `bench.py` starts a process for each loss.

A case is a loss, a dtype, a layout and the feature maps of one pyramid level or of all. Each variant does forward and
backward over several sets of inputs, whose maps and gradients together are four times the L2 cache, so that nothing is
still cached when its turn comes. That pass is captured as one CUDA graph, so that the host does not count. Then all
variants of the case take turns in random order. Two of them are upper bounds: `copy` reads one map and writes one;
`stream`, torch.add(s, t, out=g), reads two and writes one, the least that a fused loss can do. At the end the profiler
tells how much of a call's time is that of its kernels, and how much lies between them.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from compress.kernels.fused import SWITCH
from compress.kernels.gpu import gpu
from compress.kernels.losses import FUSED
from runtime.errors import one_line
from runtime.terminal import exit_code_of

LEVELS = {"s8": (32, 128, 80, 80), "s16": (32, 256, 40, 40), "s32": (32, 512, 20, 20)}
"""Feature maps of a detector at 640 pixels, by stride."""
HEAD_LOSS = "soft_head"
"""The loss that compares the maps of heads; training has them as rows of logits, whatever the network's layout."""
HEAD_ANCHORS, HEAD_LOGITS = 3, 85
"""A head of 80 classes has these on each level."""
SIZES = {"all": ("s8", "s16", "s32"), "s8": ("s8",), "s16": ("s16",), "s32": ("s32",)}
DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
LAYOUTS = {"channels_last": torch.channels_last, "nchw": torch.contiguous_format}
"""Name -> layout of the maps; training has them channels last."""
PROFILED_PASSES = 3
MARK = "spin_kernel"
"""In the name of the kernel of `torch.cuda._sleep`."""
SAMPLES, QUICK_SAMPLES = 30, 10
SAMPLE_MS = 3.0
"""Least length of a sample: the clock of events has steps of half a microsecond."""
L2_TIMES = 4
HOST_CALLS, HOST_REPEATS = 20, 5
"""Calls that are queued at once: so few that no queue is full, which would make the host wait for the GPU."""
UPSTREAM = 65536.0
"""The initial factor of a gradient scaler."""
COMPILED = "compile"
"""The variant that torch compiles, which may take longer than all others together."""
LEAST_S, RESERVED_S = 5.0, 6.0
"""Seconds that a variant may prepare itself for in any case, and those that are left for timing all of them."""
MAPS_MOVED = {"copy": 2}
"""Least number of maps that a variant reads and writes; 3 for any other."""
QUANTILES = {"p20": 0.2, "p50": 0.5, "p80": 0.8}

Noise = Callable[..., Tensor]
"""(*shape, dtype=torch.float32) -> normal random numbers."""
Call = Callable[[int], Sequence[Tensor]]
"""Forward and backward of one set of inputs, by its number -> the gradients."""


class Case(NamedTuple):
    """One comparison: a loss, and the sizes, the dtype and the layout of its maps."""

    loss: str
    size: str
    dtype: str
    layout: str = "channels_last"

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        maps = [LEVELS[level] for level in SIZES[self.size]]
        if self.loss == HEAD_LOSS:
            return [(n, HEAD_ANCHORS, h, w, HEAD_LOGITS) for n, _, h, w in maps]
        return list(maps)

    @property
    def elements(self) -> int:
        """Elements of one map, over all levels."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def map_bytes(self) -> int:
        return self.elements * DTYPES[self.dtype].itemsize


# ---- plan and figures ---------------------------------------------------------------------------------------------


def plan(loss: str, *, quick: bool = False) -> list[Case]:
    """The cases of a loss, the most important first."""
    layouts = [*LAYOUTS][: 1 if loss == HEAD_LOSS else None]
    cases = [Case(loss, size, dtype, layout) for dtype in DTYPES for layout in layouts for size in SIZES]
    return cases[:1] if quick else cases


def input_sets(map_bytes: int, l2_bytes: int) -> int:
    """How many sets of two maps and a gradient are `L2_TIMES` the cache; at least 2."""
    return max(2, math.ceil(L2_TIMES * l2_bytes / (3 * map_bytes)))


def shuffled_rounds(names: Sequence[str], rounds: int, rng: random.Random) -> Iterator[str]:
    """Every name once per round, in a new order each round."""
    for _ in range(rounds):
        yield from rng.sample(names, len(names))


def quantiles(samples: Sequence[float]) -> dict[str, float]:
    """20, 50 and 80 %, between the two nearest samples."""
    ordered = sorted(samples)
    return {name: _quantile(ordered, share) for name, share in QUANTILES.items()}


def _quantile(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def timing(samples_us: Sequence[float], moved_bytes: int) -> dict[str, Any]:
    """Microseconds of one forward and backward, and what they mean for `moved_bytes`."""
    found = quantiles(samples_us)
    return {"us": found, "samples": len(samples_us), "gb_s": moved_bytes / found["p50"] / 1e3}


def ratios(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    """How `ours` compares, by medians; None if one of the two could not be measured.

    `of_stream` is the share of the upper bound that it reaches, `noise` the difference between two copies of it. Those
    that begin with `kernels_` compare the times of kernels alone.
    """
    calls = {name: found["us"]["p50"] for name, found in variants.items() if "us" in found}
    kernels = {name: found["kernels_us"] for name, found in variants.items() if "kernels_us" in found}
    again = _over_ours(calls, "ours_again")
    return {
        "of_stream": _over_ours(calls, "stream"),
        "noise": None if again is None else abs(again - 1),
        "eager_over_ours": _over_ours(calls, "eager"),
        "compile_over_ours": _over_ours(calls, "compile"),
        "kernels_of_stream": _over_ours(kernels, "stream"),
        "kernels_compile_over_ours": _over_ours(kernels, "compile"),
    }


def _over_ours(times: Mapping[str, float], name: str) -> float | None:
    return times[name] / times["ours"] if {name, "ours"} <= times.keys() else None


# ---- inputs and variants ------------------------------------------------------------------------------------------


def arguments(case: Case, device: torch.device, seed: int) -> list[Any]:
    """The loss's arguments, the upstream gradient last; those that learn require a gradient."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return arguments_of(case, normal)


def arguments_of(case: Case, normal: Noise) -> list[Any]:
    """`arguments` that `normal` makes."""

    def maps(shape: Sequence[int]) -> Tensor:
        made = normal(*shape, dtype=DTYPES[case.dtype])
        return made if case.loss == HEAD_LOSS else made.contiguous(memory_format=LAYOUTS[case.layout])

    students = [maps(shape) for shape in case.shapes]
    teachers = [0.4 * s + maps(s.shape) for s in students]
    channels = [shape[1] for shape in case.shapes]
    masks = [normal(n, h, w).abs() / (h * w) for n, _, h, w, *_ in case.shapes]
    values: dict[str, Any] = {
        "students": students,
        "teachers": teachers,
        "matrices": [normal(c, c) / c**0.5 for c in channels],
        "biases": [normal(c) for c in channels],
        "weights": [],
        "masks": masks,
        "tau": 1.0,
        "gamma": 1.0,
        "temperature": 0.5,
        "seen": teachers,
        "tells_all": True,
        "anchors": [normal(HEAD_ANCHORS, 2).exp() for _ in case.shapes],
        "balance": [4.0, 1.0, 0.4][: len(case.shapes)],
        "obj": 1.0,
        "cls": 0.5,
        "box": 0.05,
    }
    made = [*(values[name] for name in FUSED[case.loss].parameters), normal().fill_(UPSTREAM)]
    for learner in learners_of(case.loss, made):
        learner.requires_grad_()
    return made


def learners_of(loss: str, made: Sequence[Any]) -> list[Tensor]:
    return FUSED[loss].learners(made)


def variants(case: Case, device: torch.device, count: int) -> dict[str, Call]:
    """Everything that is compared, by name, over the same `count` sets of inputs."""
    plain, ours = FUSED[case.loss].reference, FUSED[case.loss].function
    compiled = torch.compile(plain, dynamic=False, fullgraph=True)
    sets = [arguments(case, device, seed) for seed in range(count)]
    fused = functools.partial(ours, scale=sets[0][-1])

    def backward(loss: Callable[..., Tensor]) -> Call:
        def call(index: int) -> Sequence[Tensor]:
            *given, upstream = sets[index]
            return torch.autograd.grad(loss(*given), learners_of(case.loss, given), upstream)

        return call

    return {
        **upper_bounds(case, device, count),
        "ours": backward(fused),
        "ours_again": backward(fused),
        "eager": backward(plain),
        COMPILED: backward(compiled),
    }


def upper_bounds(case: Case, device: torch.device, count: int) -> dict[str, Call]:
    """Upper bounds of the speed that memory allows, over maps as large as all levels of the case, in one launch."""
    buffers = torch.empty(count, 3, case.elements, dtype=DTYPES[case.dtype], device=device).normal_()

    def copy(index: int) -> Sequence[Tensor]:
        s, _, g = buffers[index].unbind()
        return [g.copy_(s)]

    def stream(index: int) -> Sequence[Tensor]:
        s, t, g = buffers[index].unbind()
        return [torch.add(s, t, out=g)]

    return {"copy": copy, "stream": stream}


# ---- measuring ----------------------------------------------------------------------------------------------------


class PreparedVariant(NamedTuple):
    """A variant that can be timed."""

    run: Callable[[], Any]
    """Forward and backward over all sets of inputs."""
    notes: dict[str, Any]
    """Memory and host time, measured beforehand."""


def prepare(call: Call, count: int) -> PreparedVariant:
    """Memory and host time of a variant, and its pass over `count` sets of inputs."""
    started = time.perf_counter()
    first = peak_extra_bytes(call)
    notes: dict[str, Any] = {"first_call_s": time.perf_counter() - started, "first_peak_extra_bytes": first}
    notes["peak_extra_bytes"] = peak_extra_bytes(call)
    notes |= host_times(call, count)
    try:
        return PreparedVariant(capture_cuda_graph(call, count), {**notes, "cuda_graph": True})
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises if the GPU itself has failed
        notes |= {"cuda_graph": False, "why_no_graph": one_line(error)}
        return PreparedVariant(lambda: [call(index) for index in range(count)], notes)


def peak_extra_bytes(call: Call) -> int:
    """Bytes that one call asks of torch's allocator beside its inputs, its gradients included."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    call(0)
    torch.cuda.synchronize()
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


def host_times(call: Call, count: int) -> dict[str, float]:
    """Microseconds of a call without a CUDA graph: that the host is busy queueing it, and until the GPU has done it."""
    queueing, whole = [], []
    for _ in range(HOST_REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for index in range(HOST_CALLS):
            call(index % count)
        queueing.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - started)
    return {
        "host_us": 1e6 * statistics.median(queueing) / HOST_CALLS,
        "wall_us": 1e6 * statistics.median(whole) / HOST_CALLS,
    }


def capture_cuda_graph(call: Call, count: int) -> Callable[[], None]:
    """One pass over the sets as a CUDA graph. Every set's gradients have memory of their own, as its inputs have."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what torch and the kernels prepare at first use may not happen in a capture
        for index in range(count):
            call(index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(index) for index in range(count)]
    del kept
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def elapsed_ms(run: Callable[[], Any], repeats: int) -> float:
    """Time of `repeats` runs on the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def times_in_turns(runs: Mapping[str, Callable[[], Any]], samples: int) -> dict[str, list[float]]:
    """Milliseconds of a run, `samples` of each, in random turns."""
    repeats = {name: max(1, math.ceil(SAMPLE_MS / max(elapsed_ms(run, 1), 1e-3))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for name in shuffled_rounds(list(runs), samples, random.Random(0)):
        found[name].append(elapsed_ms(runs[name], repeats[name]) / repeats[name])
    return found


class Timed(NamedTuple):
    """A case whose calls are timed."""

    case: Case
    sets: int
    """Number of sets of inputs."""
    calls: dict[str, Call]
    """By the variant's name; those that failed are left out."""
    found: dict[str, dict[str, Any]]
    """Figures by the variant's name; the error of one that failed."""
    seconds: float

    def row(self) -> dict[str, Any]:
        """The case as a JSON object."""
        return {
            **self.case._asdict(),
            "shapes": self.case.shapes,
            "map_bytes": self.case.map_bytes,
            "input_sets": self.sets,
            "variants": self.found,
            "ratios": ratios(self.found),
            "seconds": self.seconds,
        }


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a `with` block of the main thread that takes longer."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not ready in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(case: Case, device: torch.device, samples: int, until: float) -> Timed:
    """Time the calls of all variants of a case that are ready soon enough for all to be timed before `until`."""
    started = time.monotonic()
    count = input_sets(case.map_bytes, torch.cuda.get_device_properties(device).L2_cache_size)
    found: dict[str, dict[str, Any]] = {}
    ready: dict[str, PreparedVariant] = {}
    calls = variants(case, device, count)
    for name, call in calls.items():
        try:
            with at_most(max(LEAST_S, until - RESERVED_S - time.monotonic())):
                ready[name] = prepare(call, count)
        except Exception as error:  # whatever it is, the other variants can still be measured
            found[name] = {"error": f"{type(error).__name__}: {one_line(error)}"}
    times = times_in_turns({name: variant.run for name, variant in ready.items()}, samples)
    for name, variant in ready.items():
        moved = MAPS_MOVED.get(name, 3) * case.map_bytes
        found[name] = timing([1e3 * ms / count for ms in times[name]], moved) | variant.notes
    return Timed(case, count, {name: calls[name] for name in ready}, found, time.monotonic() - started)


def add_kernel_times(timed: Sequence[Timed]) -> None:
    """Profile every call, and enter what its kernels take beside its time."""
    entries = [(one.found[name], call, one.sets) for one in timed for name, call in one.calls.items()]
    try:
        times: Sequence[dict[str, Any]] = kernel_times([(call, sets) for _, call, sets in entries])
    except Exception as error:  # what was timed is worth more than the profiler's reasons
        times = [{"why_no_kernel_time": one_line(error)}] * len(entries)
    for (entry, _, _), found in zip(entries, times, strict=True):
        entry.update(found)


def kernel_times(calls: Sequence[tuple[Call, int]]) -> list[dict[str, Any]]:
    """The sum of the times of each call's kernels, copies and fills, in microseconds, and their number, without graph.
    A call comes with its number of input sets.

    All are profiled in one session, since a second one in the same process may see nothing or slow its launches down.
    Raises RuntimeError where the profiler does not see every call.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for call, sets in calls:
            torch.cuda._sleep(1)  # the mark between them, a kernel of its own name
            for index in PROFILED_PASSES * [*range(sets)]:
                call(index)
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    spans = [(e.name, e.time_range.elapsed_us()) for e in sorted(events, key=lambda e: e.time_range.start)]
    return times_between_marks(spans, [PROFILED_PASSES * sets for _, sets in calls])


def times_between_marks(spans: Iterable[tuple[str, float]], counts: Sequence[int]) -> list[dict[str, Any]]:
    """The sum of the times and the number of the spans behind each mark, divided by the number of calls there."""
    groups: list[list[float]] = []
    for name, us in spans:
        if MARK in name:
            groups.append([])
        elif groups:
            groups[-1].append(us)
    if len(groups) != len(counts) or not all(groups):
        raise RuntimeError(f"the profiler saw {sum(map(bool, groups))} of {len(counts)} variants")
    pairs = zip(groups, counts, strict=True)
    return [{"kernels_us": sum(group) / count, "kernels": len(group) / count} for group, count in pairs]


# ---- the process --------------------------------------------------------------------------------------------------


def measure_all(cases: Sequence[Case], device: torch.device, samples: int, until: float, lines: Path) -> None:
    """Add a line to `lines` for each case that there is time for before `until`, on the monotonic clock, and one more
    with the times of its kernels, since the profiler may cost the process its life.
    """
    timed: list[Timed] = []
    longest = 0.0
    for case in cases:
        if time.monotonic() + longest > until:
            continue
        timed.append(measure(case, device, samples, until))
        longest = max(longest, timed[-1].seconds)
        add_line(lines, timed[-1].row())
    add_kernel_times(timed)
    for one in timed:
        add_line(lines, one.row())


def add_line(file: Path, row: Mapping[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(row, allow_nan=False) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compress.kernels.bench_case", description="A part of bench.py.")
    parser.add_argument("loss", choices=FUSED)
    parser.add_argument(
        "--lines", type=Path, required=True, help="JSON lines are added to it; the last of a case counts"
    )
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args(arguments)
    return exit_code_of(lambda: run(asked.loss, asked.seconds, asked.lines, quick=asked.quick))


def run(loss: str, seconds: float, lines: Path, *, quick: bool) -> None:
    """Measure the cases of one loss. Raises EdgestillError when the kernels cannot run here."""
    until = time.monotonic() + seconds
    os.environ.pop(SWITCH, None)
    gpu(0)  # where the kernels cannot run, `ours` would be the definition
    torch._dynamo.config.cache_size_limit = len(plan(loss))  # past so many shapes torch would compile no more
    gc.freeze()  # each capture collects garbage, and torch's own objects are many
    samples = QUICK_SAMPLES if quick else SAMPLES
    measure_all(plan(loss, quick=quick), torch.device("cuda:0"), samples, until, lines)


if __name__ == "__main__":
    sys.exit(main())
