"""Faults planted in the kernels, one at a time; the tests must see every one of them.

A fault is caught if, on small maps and every schedule of the host shim, a result is wrong, two schedules give
different bits, or the shim reports a broken rule. `python mutations.py NAME` examines one in a process of its own,
since a fault may crash it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from shim import host
from shim.cases import Shape, arguments
from shim.device import A100, H100, ShimDevice
from shim.oracle import DTYPES, GRADIENT_TOLERANCE, LAYOUTS, LOSS_TOLERANCE, errors, kernels_of, same_bits, truth

from compress.kernels import adapter_mse, cwd, fgd, pkd, rescale, soft_head, weighted_mse
from compress.kernels.losses import FUSED

CAUGHT = 3
"""Exit code; a negative one, a crash, counts as well."""
SHAPES: Sequence[Sequence[Shape]] = (
    ((2, 8, 20, 20), (1, 3, 40, 40)),  # of unlike batches; rows of one and of four warps
    ((3, 5, 7, 9), (2, 16, 4, 4)),  # off the 16-byte grid
    ((1, 320, 3, 50),),  # more channels than a block takes
    ((2, 40, 12, 12),),
)
CLUSTERS = H100._replace(shared_bytes=4 << 10)
"""So little shared memory that several blocks must hold a channel."""
SHRUNK = {
    (weighted_mse, "BLOCKS"): 3,
    (adapter_mse, "MULTIPROCESSORS"): 2,
    (cwd, "BLOCKS"): 3,
    (cwd, "LEAST_PIXELS"): 2,
    (fgd, "LEAST_ROWS"): 1,
    (pkd, "SPLIT_SAMPLES"): 500,
    (pkd, "LAST_BLOCK_BYTES"): 1 << 10,
    (soft_head, "TOP_CELLS"): 50,
    (soft_head, "TILE_BYTES"): 1 << 10,
}
"""Limits so small that a block has several tasks, and a task several blocks, on small maps too."""


class Fault(NamedTuple):
    """`old` -> `new` in the file `source` of the kernels' folder; `loss` is what shows it."""

    source: str
    loss: str
    old: str
    new: str


FAULTS: dict[str, Fault] = {
    "reduction: first barrier dropped": Fault(
        "common.cuh",
        "weighted_mse",
        "    __syncthreads();  // a slow warp may still read what the previous use left in scratch\n",
        "",
    ),
    "reduction: second barrier dropped": Fault(
        "common.cuh",
        "weighted_mse",
        "scratch[warp * K + k] = x[k];\n    }\n    __syncthreads();\n",
        "scratch[warp * K + k] = x[k];\n    }\n",
    ),
    "reduction: shuffle starts at 8": Fault(
        "common.cuh",
        "weighted_mse",
        "int offset = kWarp / 2;",
        "int offset = kWarp / 4;",
    ),
    "reduction: half of the lanes named": Fault(
        "common.cuh",
        "weighted_mse",
        "kAllLanes = 0xffffffffu",
        "kAllLanes = 0xffffu",
    ),
    "reduction: absent warps not neutral": Fault(
        "common.cuh",
        "weighted_mse",
        "lane < warps ? scratch[lane * K + k] : Op::identity()",
        "scratch[lane * K + k]",
    ),
    "total: barrier before the flag dropped": Fault(
        "common.cuh",
        "weighted_mse",
        "    }\n    __syncthreads();\n    return *last;\n",
        "    }\n    return *last;\n",
    ),
    "total: in the order of arrival": Fault(
        "common.cuh",
        "weighted_mse",
        "if (threadIdx.x == 0) write_result(partials + blockIdx.x, mine);",
        "if (threadIdx.x == 0) write_result(partials + *ticket, mine);",
    ),
    "total: ticket not left at 0": Fault(
        "common.cuh",
        "weighted_mse",
        "atomicInc(ticket, blocks - 1)",
        "atomicInc(ticket, blocks)",
    ),
    "scale not folded in": Fault(
        "weighted_mse/kernel.cu",
        "weighted_mse",
        "assumed_scale(args.scale) * 2.0f * inv",
        "2.0f * inv",
    ),
    "weighted MSE: tail read too far": Fault(
        "weighted_mse/kernel.cu",
        "weighted_mse",
        "v < vectors; v +=",
        "v <= vectors; v +=",
    ),
    "weighted MSE: another image's weights": Fault(
        "weighted_mse/kernel.cu",
        "weighted_mse",
        "read_map(level.weights + static_cast<uint64>(image)",
        "read_map(level.weights + static_cast<uint64>(image & 1)",
    ),
    "weighted MSE: last channels left out": Fault(
        "weighted_mse/kernel.cu",
        "weighted_mse",
        "(level.channels + kChannels - 1) / kChannels",
        "max(level.channels / kChannels, 1u)",
    ),
    "weighted MSE: gradient accumulated in half precision": Fault(
        "weighted_mse/kernel.cu",
        "weighted_mse",
        "s[k] = factor * weighted;",
        "s[k] = __half2float(__float2half(factor)) * weighted;",
    ),
    "rescale: ratio upside down": Fault(
        "rescale/kernel.cu",
        "rescale",
        "upstream[0] / assumed",
        "assumed / upstream[0]",
    ),
    "rescale: copy skipped where the scale is right": Fault(
        "rescale/kernel.cu",
        "rescale",
        "if (right_already && tensor.from == tensor.to) return;",
        "if (right_already) return;",
    ),
    "rescale: tail left out": Fault(
        "rescale/kernel.cu",
        "rescale",
        "i < tensor.elements;",
        "i + V < tensor.elements;",
    ),
    "FGD: barrier before the sums of columns dropped": Fault(
        "fgd/kernel.cu",
        "fgd",
        "    __syncthreads();\n    if (threadIdx.x >= width || column",
        "    if (threadIdx.x >= width || column",
    ),
    "FGD: a row's lanes reduced too far": Fault(
        "fgd/kernel.cu",
        "fgd",
        "offset = level.lanes / 2; offset",
        "offset = kWarp / 2; offset",
    ),
    "FGD: student's sums for the teacher's": Fault(
        "fgd/kernel.cu",
        "fgd",
        "map * images + image",
        "image",
    ),
    "FGD: softmax's mean term left out": Fault(
        "fgd/kernel.cu",
        "fgd",
        "(sign(of_student - of_teacher) - mean)",
        "sign(of_student - of_teacher)",
    ),
    "FGD: only the first part of the sums": Fault(
        "fgd/kernel.cu",
        "fgd",
        "part < axis.parts",
        "part < 1",
    ),
    "FGD: a scale forgotten": Fault(
        "fgd/kernel.cu",
        "fgd",
        "scale * read_broadcast(level.rows.slopes",
        "read_broadcast(level.rows.slopes",
    ),
    "FGD: ticket of another image": Fault(
        "fgd/kernel.cu",
        "fgd",
        "level.tickets + image, tiles",
        "level.tickets, tiles",
    ),
    "FGD: attention before the last tile": Fault(
        "fgd/kernel.cu",
        "fgd",
        "level.tickets + image, tiles",
        "level.tickets + image, max(tiles - 1, 1u)",
    ),
    "FGD: the first row of a thread left out": Fault(
        "fgd/kernel.cu",
        "fgd",
        "(tile.end_row - first - 1) / tile.groups + 1 : 0",
        "(tile.end_row - first - 1) / tile.groups : 0",
    ),
    "CWD: scratch used again too early": Fault(
        "cwd/kernel.cu",
        "cwd",
        "turn ^= 1;",
        "",
    ),
    "CWD: values beyond the row counted": Fault(
        "cwd/kernel.cu",
        "cwd",
        "cross += j < share.units ? sum : 0.0f;",
        "cross += sum;",
    ),
    "CWD: bound of a row one too far": Fault(
        "cwd/kernel.cu",
        "cwd",
        "if (j < share.units) {\n            raw_s",
        "if (j <= share.units) {\n            raw_s",
    ),
    "CWD: an odd number of rows reduced wrongly": Fault(
        "cwd/kernel.cu",
        "cwd",
        "half = (rows + 1) / 2;",
        "half = rows / 2;",
    ),
    "CWD: ticket of another tile": Fault(
        "cwd/kernel.cu",
        "cwd",
        "level.tickets + tile.image * level.tiles + tile.index",
        "level.tickets + tile.image",
    ),
    "CWD: barrier of a row dropped": Fault(
        "cwd/kernel.cu",
        "cwd",
        "    __syncthreads();\n    x = Softmaxes();",
        "    x = Softmaxes();",
    ),
    "PKD: barrier of the cluster before peers are read": Fault(
        "pkd/kernel.cu",
        "pkd",
        "    cluster_barrier();  // the table",
        "    __syncthreads();  // the table",
    ),
    "PKD: no shift of the moments": Fault(
        "pkd/kernel.cu",
        "pkd",
        "    return {scratch[0], scratch[1]};",
        "    return {0.0f, 0.0f};",
    ),
    "PKD: loss that is not 0 for equal constant channels": Fault(
        "pkd/kernel.cu",
        "pkd",
        "fmaf(-q, cov, var_s) / v_s,",
        "1.0f - cov / sqrtf(v_s * v_t),",
    ),
    "PKD: products accumulated in half precision": Fault(
        "pkd/kernel.cu",
        "pkd",
        "m[4 * Stride] = fmaf(x, y, m[4 * Stride]);",
        "m[4 * Stride] = __half2float(__float2half(fmaf(x, y, m[4 * Stride])));",
    ),
    "PKD: barrier before the sums of a tile dropped": Fault(
        "pkd/kernel.cu",
        "pkd",
        "    __syncthreads();\n    for (uint32 i = threadIdx.x; i < sums; i += kThreads) {\n        float sum",
        "    for (uint32 i = threadIdx.x; i < sums; i += kThreads) {\n        float sum",
    ),
    "PKD: stride without the splits": Fault(
        "pkd/kernel.cu",
        "pkd",
        "i += level.splits * kThreads) {\n        const uint64 at = offset_of<V>(level, i);",
        "i += kThreads) {\n        const uint64 at = offset_of<V>(level, i);",
    ),
    "PKD: the last pixel of a thread left out": Fault(
        "pkd/kernel.cu",
        "pkd",
        "(samples - first - 1) / (level.splits * rows) + 1 : 0",
        "(samples - first - 1) / (level.splits * rows) : 0",
    ),
    "PKD: offset across images": Fault(
        "pkd/kernel.cu",
        "pkd",
        "(i - image * row) * V",
        "i * V",
    ),
    "PKD: share of a rank too large": Fault(
        "pkd/kernel.cu",
        "pkd",
        "vectors * (rank + 1) / level.splits - first",
        "vectors / level.splits + 1",
    ),
    "adapter: barrier before x is overwritten dropped": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "__syncthreads();  // all of G is there, and nobody needs x any more",
        "",
    ),
    "adapter: barrier between two tiles dropped": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "__syncthreads();  // the tile is here, and all are done with the buffers of the one before",
        "",
    ),
    "adapter: tile read before it came": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "        copy_async_wait();\n",
        "",
    ),
    "adapter: pixels beyond the image counted": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "channel < kTeacher && pixel < left;",
        "channel < kTeacher;",
    ),
    "adapter: only half of the columns in db": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "kEnd = kLast ? kWarp : 4;",
        "kEnd = kLast ? 16 : 4;",
    ),
    "adapter: write beyond the image": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "kLast ? 8 : min(left - pixel, 8);",
        "8;",
    ),
    "adapter: last block left out of dW": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "if (block < level.blocks) shares[n]",
        "if (block + 1 < level.blocks) shares[n]",
    ),
    "adapter: scale not folded in": Fault(
        "adapter_mse/kernel.cu",
        "adapter_mse",
        "assumed_scale(args.scale) * 2.0f * inv / unit",
        "2.0f * inv / unit",
    ),
    "soft head: the scale not folded in": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "from_float<T>(scale * factor * term.slope)",
        "from_float<T>(factor * term.slope)",
    ),
    "soft head: histogram read before all have counted": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    __syncthreads();\n    const uint32 own = shared.histogram[digit];",
        "    const uint32 own = shared.histogram[digit];",
    ),
    "soft head: barrier before the sums of warps dropped": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "shared.sums[warp] = sum;\n    __syncthreads();\n",
        "shared.sums[warp] = sum;\n",
    ),
    "soft head: barrier before the digit dropped": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    __syncthreads();\n    return shared.found;",
        "    return shared.found;",
    ),
    "soft head: histogram not cleared": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    shared.histogram[digit] = 0;\n",
        "",
    ),
    "soft head: place one too low": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "rank.place <= sum)",
        "rank.place < sum)",
    ),
    "soft head: all equal gates count": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "(gate == least.key && row <= last)",
        "gate == least.key",
    ),
    "soft head: the last of equal gates first": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "key = rows - 1 - row;",
        "key = row;",
    ),
    "soft head: gates of one image only": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "i < level.images; i += kSelectThreads",
        "i < 1; i += kSelectThreads",
    ),
    "soft head: gates in another order than their rows": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "level.seen_last ? row % level.pixels",
        "false ? row % level.pixels",
    ),
    "soft head: barrier before the objectness dropped": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    __syncthreads();  // all counts are there\n",
        "",
    ),
    "soft head: barrier before the classes dropped": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    __syncthreads();  // the top rows are known\n",
        "",
    ),
    "soft head: barrier before the gradient is written dropped": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "    __syncthreads();  // the gradient is whole\n",
        "",
    ),
    "soft head: rows beyond the last": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "min(level.tile, level.images * level.rows() - first)",
        "level.tile",
    ),
    "soft head: tail left out": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "if (rest < count)",
        "if (rest + 1 < count)",
    ),
    "soft head: teacher's rows in the student's order": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "level.teacher_last ? pixel * level.anchor_count + anchor : plain",
        "plain",
    ),
    "soft head: top rows of a warp over those of another": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "if (w < warp) before += counts[w];",
        "",
    ),
    "soft head: a class too many without another row": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "index -= classes, ++row;",
        "index -= classes;",
    ),
    "soft head: no half of equal edges": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "(s_low > t_low) + (s_low >= t_low)",
        "2 * (s_low > t_low)",
    ),
    "soft head: gates of the teacher's map": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "static_cast<const T*>(level.seen)",
        "static_cast<const T*>(level.teacher)",
    ),
    "soft head: logits that are not told in boxes": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "given(t[k], s[k], tells_all)",
        "t[k]",
    ),
    "soft head: gates not in the boxes' factor": Fault(
        "soft_head/kernel.cu",
        "soft_head",
        "args.box * norm * weight",
        "args.box * norm",
    ),
}


def texts(fault: Fault) -> dict[str, str]:
    """The faulty source by its path. Raises AssertionError where the pattern is not found exactly once."""
    whole = (host.KERNELS / fault.source).read_text()
    assert whole.count(fault.old) == 1, f"{fault.source} has {whole.count(fault.old)} times: {fault.old}"
    return {fault.source: whole.replace(fault.old, fault.new)}


def findings(loss: str, replaced: dict[str, str]) -> Iterator[str]:
    """Everything that is wrong with the kernels of `loss`."""
    for (module, name), value in SHRUNK.items():
        setattr(module, name, value)
    yield from (_of_rescale(replaced) if loss == "rescale" else _of_loss(loss, replaced))


def _of_loss(loss: str, replaced: dict[str, str]) -> Iterator[str]:
    fused, kernels = FUSED[loss], kernels_of(FUSED[loss])
    for shapes, dtype, layout in product(SHAPES, DTYPES, LAYOUTS):
        if loss == "adapter_mse":  # other channels go to torch's own products, which round more
            shapes = [(n, min(-(-c // 8) * 8, 128), h, w) for n, c, h, w in shapes]
        mean = 30.0 if loss == "pkd" and dtype == torch.float32 else 0.7  # where a missing shift shows
        given = arguments(loss, dtype, shapes, layout, scale=512.0, mean=mean)
        if loss.endswith("_mse") and dtype == torch.float16:
            given[-2] = []  # no weights, which would hide what lies beyond the last pixel
        if loss == "soft_head" and dtype == torch.float32:
            given[1], given[-2] = [_with_holes(teacher) for teacher in given[1]], False
        true = truth(fused.reference, given, fused.learns)
        for facts in (H100, A100, CLUSTERS) if loss == "pkd" else (H100,):
            runs = [kernels(_device(replaced, seed, facts), *given) for seed in host.SEEDS]
            if not all(same_bits(runs[0], run) for run in runs[1:]):
                yield f"{shapes} {dtype} {layout}: schedules differ"
            wrong_loss, wrong_gradient = errors(runs[0], true)
            if not (wrong_loss <= LOSS_TOLERANCE and wrong_gradient <= GRADIENT_TOLERANCE[dtype]):
                yield f"{shapes} {dtype} {layout}: off by {wrong_loss:.1e}, {wrong_gradient:.1e}"
        if loss != "adapter_mse":
            given[0][0][:, 0] = 7.0
            equal = kernels(_device(replaced, 0, H100), given[0], given[0], *given[2:])
            if equal.loss or any(gradient.any() for gradient in equal.gradients):
                yield f"{shapes} {dtype} {layout}: equal maps are not 0"
        if loss == "soft_head" and not _takes_the_first_of_equal_gates(kernels, given, replaced):
            yield f"{shapes} {dtype} {layout}: not the first of equal gates"


def _with_holes(teacher: torch.Tensor) -> torch.Tensor:
    """The map without a third of its logits. With some seeds an edge of two boxes is equal in float32 but not in float64."""
    generator = torch.Generator().manual_seed(11)
    return teacher.masked_fill(torch.rand(teacher.shape, generator=generator) < 1 / 3, torch.nan)


def _takes_the_first_of_equal_gates(kernels: Any, given: list[Any], replaced: dict[str, str]) -> bool:
    """Whether it takes the first rows with equal gates, which follow a few with smaller ones."""
    seen, smaller = given[2][0].clone(), 7
    gates = torch.full((len(seen), seen[0, ..., 0].numel()), 0.5)
    gates[:, :smaller] = -5
    seen[..., 4] = gates.view(seen.shape[:-1])
    changed = [given[0], given[2], [seen, *given[2][1:]], *given[3:]]
    gradient = kernels(_device(replaced, 0, H100), *changed).gradients[0]
    wanted = torch.zeros_like(gates, dtype=torch.bool)
    wanted[:, smaller : smaller + soft_head.TOP_CELLS] = True
    return torch.equal((gradient[..., 5:] != 0).any(-1).flatten(1), wanted)


def _of_rescale(replaced: dict[str, str]) -> Iterator[str]:
    gradients = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (64, 37, 4096)]
    for upstream, assumed in ((3.0, 2.0), (2.0, 2.0), (0.0, 1.0)):
        ratio = upstream / assumed
        device = _device(replaced, 1, H100)
        found = rescale.rescale(device, gradients, torch.tensor(upstream), torch.tensor(assumed), in_place=False)
        if not all(torch.equal(f, g * ratio) for f, g in zip(found, gradients, strict=True)):
            yield f"{upstream} / {assumed}: wrong"


def _device(replaced: dict[str, str], seed: int, facts: Any) -> ShimDevice:
    return ShimDevice(facts, seed, optimise="-O1", texts=replaced)


def examine(name: str) -> str:
    """The first finding for the fault `name`; empty if it was not caught.

    Raises whatever keeps the faulty source from being compiled and tried, which is no catch.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)  # what a kernel forgets to write is NaN
    fault = FAULTS[name]
    replaced = texts(fault)
    source = rescale.SOURCE if fault.loss == "rescale" else FUSED[fault.loss].source
    headers = {file: text for file, text in replaced.items() if file.endswith(".cuh")}
    text = replaced.get(f"{source.folder}/kernel.cu")
    host.build(source.path, source.defines, optimise="-O1", text=text, headers=headers)
    try:
        return next(findings(fault.loss, replaced), "")
    except (host.ShimError, AssertionError) as error:
        return str(error).splitlines()[0]


if __name__ == "__main__":
    found = examine(sys.argv[1])
    print(found or "not caught")
    sys.exit(CAUGHT if found else 0)
