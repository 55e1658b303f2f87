"""Build the TensorRT plan of an ONNX file, with TensorRT 8.6 to 11 or with TensorRT-RTX.

The precision is in the ONNX file, not in builder flags: TensorRT 11 has none. One function supports every version: it
checks what the module offers, not which version it is. Any ERROR line that TensorRT logs is a failed build, because
several bad requests only log and still return an engine. Each build runs in a child process: builds leak memory and
can crash.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from runtime import machine
from runtime.backends import BACKENDS
from runtime.backends.tensorrt import INSTALL, collecting_logger, deserialize, errors_of, import_tensorrt
from runtime.bundle import card_inside, card_with
from runtime.card import CARD_FILE, Artifact, Batches, ModelCard
from runtime.child_process import last_line, run_child
from runtime.errors import EdgestillError, EngineError, InputError, UnavailableError, UsageError
from runtime.files import atomic_write
from runtime.layers import (
    FP16,
    EngineLayer,
    layer_of,
    layers_file,
    layers_in_json,
    layers_in_log,
    moves_more,
    read_layers,
    save_layers,
)

BUILDERS = ("tensorrt", "tensorrt_rtx")
DEVICE = "tensorrt"
"""The device of the runtime for which plans are built."""
NO_INT8: Mapping[str, str] = {
    "tensorrt_rtx": "TensorRT-RTX fuses no INT8 convolution with its activation and writes FP32 behind each: "
    "167 MB a frame where FP16 moves 111 (YOLOv5n, 640 pixels), so FP16 is the faster plan"
}
"""Builder -> why it gets no INT8 file."""
NO_TARGET = ("NONE", "CURRENT")
MIB = 1 << 20


class ShapeRange(NamedTuple):
    """Smallest, usual and largest shape of an input with open dimensions."""

    smallest: tuple[int, ...]
    usual: tuple[int, ...]
    largest: tuple[int, ...]


@dataclass(frozen=True)
class BuildRequest:
    """All that one build depends on, as plain values, because it is sent to a child process."""

    onnx: str
    backend: str
    targets: tuple[str, ...] = ()
    workspace_mib: int = 2048
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    dla_core: int | None = None
    timing_cache: str | None = None


@dataclass(frozen=True)
class BuildReport:
    """Result of a build. `versions` are those of the builder, `targets` the compute capabilities that the plan runs on,
    `log` TensorRT's warnings.
    """

    backend: str
    versions: Mapping[str, str]
    seconds: float
    bytes: int
    sha256: str
    targets: tuple[str, ...]
    log: tuple[str, ...]
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    layers: tuple[EngineLayer, ...] = ()
    """Also in the file beside the plan; empty where they are not known, and `log` says why."""

    def artifact(self, file: str, card: ModelCard) -> Artifact:
        """The card's entry of the plan, which was built from the ONNX file with this card."""
        profiles = [Batches(shape.smallest[0], shape.largest[0]) for shape in self.shapes.values()]
        return Artifact(
            file,
            self.sha256,
            self.bytes,
            card.precision,
            self.backend,
            self.targets,
            dict(self.versions),
            identity=card.identity,
            batches=profiles[0] if profiles else card.batches,
        )


def require_open_batch(model: Path, card: ModelCard) -> None:
    """Raises UsageError when the file `model` has a fixed batch: a profile that is asked for says nothing to it."""
    if card.batches.least == card.batches.most:
        raise UsageError(
            f"--batches: {model} takes {card.batches} in one call, always", "Leave it out, or export with --dynamic"
        )


def profile_of(card: ModelCard, batches: Sequence[int]) -> dict[str, ShapeRange]:
    """The shapes of a file with an open batch, for (smallest, usual, largest) `batches`; empty where it is fixed."""
    if card.batches.least == card.batches.most:
        return {}
    return {card.input_name: checked_shapes(card.input_name, [(count, *card.image_shape) for count in batches])}


def build_engine(
    onnx_path: str | Path,
    out_path: str | Path,
    *,
    backend: str = "auto",
    targets: Sequence[str] = (),
    workspace_mib: int = 2048,
    shapes: Mapping[str, Sequence[Sequence[int]]] | None = None,
    dla_core: int | None = None,
    timing_cache: str | Path | None = None,
) -> BuildReport:
    """Build the plan of an ONNX file and publish it at `out_path`; nothing is left there when it fails.

    The plan's layers are written beside it.

    `targets` ("sm86", ...) are for tensorrt_rtx, which builds ahead of time; plain TensorRT builds for the GPU that is
    there and says so in the log. `shapes` maps an input with open dimensions to (smallest, usual, largest).
    `dla_core` is refused if the backend would silently ignore it. `timing_cache` is a file that makes later builds with
    plain TensorRT faster. Raises InputError, UsageError, UnavailableError, or EngineError with TensorRT's own error
    lines.
    """
    onnx_path, out_path = Path(onnx_path), Path(out_path)
    if not onnx_path.is_file():
        raise InputError(f"{onnx_path}: no such file", "Give an .onnx file")
    known = BACKENDS[BUILDERS[0]].suffixes
    if out_path.suffix.lower() not in known:  # under another name it would not be loaded, or replace another file
        raise UsageError(f"{out_path}: a plan's name ends in {', '.join(known)}", "Choose another name")
    refuse_unsuited(onnx_path)
    request = BuildRequest(
        onnx=str(onnx_path.resolve()),
        backend=resolve_backend(backend),
        targets=tuple(targets),
        workspace_mib=workspace_mib,
        shapes={name: checked_shapes(name, triple) for name, triple in (shapes or {}).items()},
        dla_core=dla_core,
        timing_cache=str(Path(timing_cache).resolve()) if timing_cache else None,
    )
    refuse_ignored(request)
    with atomic_write(out_path) as temporary:
        temporary.touch()  # a folder that cannot be written is reported before the long build
        report = _build_in_child(request, temporary.resolve())
    save_layers(out_path, report.sha256, report.layers)
    return report


def list_plans(
    folder: Path, model: Path, made: Sequence[Artifact], order: Callable[[Artifact], Any] | None = None
) -> dict[str, str]:
    """Put plans made of the ONNX file `model` before what the card of `folder` lists, without those that are no gain.

    An INT8 plan that moves more bytes than the FP16 plan beside it is removed, whichever of the two was built first.
    The result maps the name of its file to the reason. `order` sorts the whole list.
    """
    card = card_with(folder, model, made, order)
    slower = slower_plans(folder, card)
    kept = tuple(artifact for artifact in card.artifacts if artifact.file not in slower)
    replace(card, artifacts=kept).save(folder / CARD_FILE)
    for name in slower:
        for file in (folder / name, layers_file(folder / name)):
            file.unlink(missing_ok=True)
    return slower


def slower_plans(folder: Path, card: ModelCard) -> dict[str, str]:
    """The INT8 plans of a card that move more bytes than its FP16 plan of the same builder and GPUs, and the reasons.

    Plans whose layers are not known are none of them.
    """
    plans = [artifact for artifact in card.artifacts if artifact.backend in BUILDERS]
    layers = {plan.file: read_layers(folder / plan.file, plan.sha256) for plan in plans}
    fp16 = {
        (artifact.backend, artifact.targets): layers[artifact.file]
        for artifact in reversed(plans)  # of several the first one stays
        if artifact.precision == FP16 and layers[artifact.file]
    }
    reasons = {plan.file: moves_more(layers[plan.file], fp16.get((plan.backend, plan.targets), ())) for plan in plans}
    return {file: reason for file, reason in reasons.items() if reason}


def resolve_backend(backend: str) -> str:
    """The module to build with: "auto" takes tensorrt if it is installed, else tensorrt_rtx."""
    if backend not in ("auto", *BUILDERS):
        raise UsageError(f"backend is {backend!r}, expected auto, {', '.join(BUILDERS)}")
    options = BUILDERS if backend == "auto" else (backend,)
    installed = [name for name in options if find_spec(name)]
    if not installed:
        raise UnavailableError(f"{' and '.join(options)} not installed", INSTALL[options[-1]])
    return installed[0]


def checked_shapes(name: str, triple: Sequence[Sequence[int]]) -> ShapeRange:
    """Raises UsageError unless smallest <= usual <= largest in every dimension."""
    rows = [tuple(row) for row in triple]
    if len(rows) != 3 or len({len(row) for row in rows}) != 1:
        raise UsageError(f"shapes of {name} are {rows}, expected (smallest, usual, largest) of one length")
    if not all(0 < low <= usual <= high for low, usual, high in zip(*rows, strict=True)):
        raise UsageError(f"shapes of {name} are {rows}, expected smallest <= usual <= largest in every dimension")
    return ShapeRange(*rows)


def refuse_unsuited(onnx_path: Path) -> None:
    """Raises InputError when it is no ONNX file, as TensorRT's parser takes some as an empty network, and UsageError
    when its card says that it is made for other devices.
    """
    if onnx_path.suffix.lower() not in BACKENDS["onnx"].suffixes:
        raise InputError(f"{onnx_path}: not an ONNX file", "Give an .onnx file")
    card = card_inside(onnx_path)
    if card and card.devices and DEVICE not in card.devices:
        raise UsageError(f"{onnx_path.name} is made for {' or '.join(card.devices)}", "Build model.fp16.onnx")


def refuse_ignored(request: BuildRequest) -> None:
    """Raises UsageError for requests that TensorRT-RTX ignores, at most with a warning."""
    if request.workspace_mib < 1:
        raise UsageError(f"workspace is {request.workspace_mib} MiB, expected 1 or more")
    if request.backend == "tensorrt_rtx" and request.dla_core is not None:
        raise UsageError("tensorrt_rtx has no DLA", "Build with plain TensorRT on the Jetson")


def _build_in_child(request: BuildRequest, plan: Path) -> BuildReport:
    """Run this file's `main` in a new interpreter. It writes the plan to one file and the report to another."""
    with tempfile.TemporaryDirectory(prefix="edgestill-") as folder:
        answer = Path(folder) / "answer.json"
        work = json.dumps({"request": asdict(request), "plan": str(plan), "answer": str(answer)})
        done = run_child("from runtime.engine import main; main()", data=work.encode(), folder=Path(folder))
        if done.returncode == 0 and answer.is_file():
            return _report(request, plan, json.loads(answer.read_text()))
        if answer.is_file():
            raise _error_from(json.loads(answer.read_text()))
        raise _crash(done, Path(request.onnx).name)


def _report(request: BuildRequest, plan: Path, answer: Mapping[str, Any]) -> BuildReport:
    data = plan.read_bytes()
    return BuildReport(
        backend=request.backend,
        versions=answer["versions"],
        seconds=answer["seconds"],
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        targets=tuple(answer["targets"]),
        log=tuple(answer["log"]),
        shapes=request.shapes,
        layers=tuple(map(layer_of, answer["layers"])),
    )


ERRORS = {kind.__name__: kind for kind in (EngineError, InputError, UnavailableError, UsageError, EdgestillError)}


def _error_from(answer: Mapping[str, Any]) -> EdgestillError:
    return ERRORS[answer["kind"]](answer["message"], answer["hint"])


def _crash(done: subprocess.CompletedProcess[bytes], name: str) -> EngineError:
    if done.returncode < 0:
        cause = f"was ended by signal {-done.returncode}"
        return EngineError(f"{name}: the builder {cause}: {last_line(done)}", "Out of memory? Try a smaller workspace")
    return EngineError(f"{name}: the builder stopped with exit code {done.returncode}: {last_line(done)}")


def main() -> None:
    """Run in the child: read a request from standard input, write the plan and the answer, exit 0 or 1."""
    work = json.load(sys.stdin)
    request = BuildRequest(**work["request"])
    request = replace(request, shapes={name: ShapeRange(*map(tuple, rows)) for name, rows in request.shapes.items()})
    answer = Path(work["answer"])
    try:
        answer.write_text(json.dumps(_build_here(request, Path(work["plan"]))))
    except EdgestillError as error:
        answer.write_text(json.dumps({"kind": type(error).__name__, "message": error.message, "hint": error.hint}))
        sys.exit(1)


def _build_here(request: BuildRequest, path: Path) -> dict[str, Any]:
    trt = import_tensorrt(request.backend)
    started = time.perf_counter()
    plan, targets, log, layers = build_plan(trt, request)
    seconds = time.perf_counter() - started
    try:
        path.write_bytes(plan)
    except OSError as error:
        raise EngineError(f"the plan ({len(plan)} bytes) cannot be written: {error.strerror}") from error
    versions = {request.backend: str(trt.__version__), "platform": machine.platform_tag()}
    values = [asdict(layer) for layer in layers]
    return {"versions": versions, "seconds": seconds, "targets": targets, "log": log, "layers": values}


class BuiltPlan(NamedTuple):
    """The bytes of a plan, the compute capabilities that it runs on, warnings, and its layers where they are known."""

    plan: bytes
    targets: list[str]
    log: list[str]
    layers: tuple[EngineLayer, ...]


def build_plan(trt: Any, request: BuildRequest) -> BuiltPlan:
    """By the module `trt` of any supported version.

    Raises EngineError on any error line, UsageError when the file is INT8 and the builder makes that slower.
    """
    name = Path(request.onnx).name
    logger = collecting_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(request.onnx):
        raise EngineError(f"{name}: {trt.__name__} cannot parse it: {parser_errors(parser, logger)}")
    if network.num_outputs == 0:
        raise EngineError(f"{name}: {trt.__name__} finds no network in it", "Export it again")
    refuse_int8(trt, network, request)
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the engine keeps types and operators of its layers
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib * MIB)
    set_precision_flags(trt, config, network)
    set_profile(builder, config, network, request)
    set_dla(trt, builder, config, request)
    targets, notes = set_targets(trt, config, request)
    set_timing_cache(trt, config, request)
    plan = builder.build_serialized_network(network, config)
    errors = errors_of(logger)
    if plan is None or errors:
        raise EngineError(f"{name}: {trt.__name__} cannot build it: {brief(errors) or 'no reason was logged'}")
    save_timing_cache(config, request)
    notes += [text for severity, text in logger.lines if severity == "WARNING"]
    try:
        layers = layers_of(trt, logger, bytes(plan), Path(name))
    except EngineError as error:
        layers = ()
        notes.append(f"the layers of the plan are not known: {error}")
    return BuiltPlan(bytes(plan), targets, notes, layers)


def layers_of(trt: Any, logger: Any, plan: bytes, path: Path) -> tuple[EngineLayer, ...]:
    """As the builder printed them, else by EngineInspector. Raises EngineError when that cannot load the engine."""
    with suppress(EngineError):  # a line that is not understood: the inspector may be
        if printed := layers_in_log(logger.layers):
            return printed
    loaded = deserialize(trt, plan, path)
    inspector = loaded.engine.create_engine_inspector()
    return layers_in_json(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def refuse_int8(trt: Any, network: Any, request: BuildRequest) -> None:
    """Raises UsageError when the file quantises activations and the builder is one of `NO_INT8`."""
    if request.backend not in NO_INT8:
        return
    kinds = {network.get_layer(index).type for index in range(network.num_layers)}
    if trt.LayerType.QUANTIZE in kinds:
        raise UsageError(f"{Path(request.onnx).name} is INT8: {NO_INT8[request.backend]}", "Build model.fp16.onnx")


def network_flags(trt: Any) -> int:
    """EXPLICIT_BATCH up to 10 (later the only mode), STRONGLY_TYPED from 10 on: types are those of the ONNX file."""
    kinds = (getattr(trt.NetworkDefinitionCreationFlag, name, None) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED"))
    return sum(1 << int(kind) for kind in kinds if kind is not None)


def set_precision_flags(trt: Any, config: Any, network: Any) -> None:
    """Allow the types of the graph. Only 8.6 needs this: it has no strong typing."""
    if getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None) is not None:
        return
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    outputs = [layer.get_output(index) for layer in layers for index in range(layer.num_outputs)]
    needs = {
        "FP16": any(tensor.dtype == trt.DataType.HALF for tensor in outputs),
        "INT8": any(layer.type == trt.LayerType.QUANTIZE for layer in layers),
    }
    for name, needed in needs.items():
        if needed:
            config.set_flag(getattr(trt.BuilderFlag, name))


def set_profile(builder: Any, config: Any, network: Any, request: BuildRequest) -> None:
    """One optimisation profile when an input has open dimensions; `shapes` must then name exactly those inputs."""
    inputs = {tensor.name: tuple(tensor.shape) for tensor in (network.get_input(i) for i in range(network.num_inputs))}
    dynamic = {name: shape for name, shape in inputs.items() if -1 in shape}
    if set(dynamic) != set(request.shapes):
        raise UsageError(
            f"shapes are given for {sorted(request.shapes)}, inputs with open dimensions are {dynamic}",
            "Give (smallest, usual, largest) for each of these and no other",
        )
    if not dynamic:
        return
    profile = builder.create_optimization_profile()
    for name, shapes in request.shapes.items():
        profile.set_shape(name, *shapes)
    if config.add_optimization_profile(profile) < 0:  # it returns -1 and raises nothing
        raise EngineError(f"TensorRT refused the shapes {dict(request.shapes)} for inputs {dynamic}")


def set_dla(trt: Any, builder: Any, config: Any, request: BuildRequest) -> None:
    """Build for a DLA core, and for the GPU what it cannot do. Raises UnavailableError when there is no such core."""
    if request.dla_core is None:
        return
    if not 0 <= request.dla_core < builder.num_DLA_cores:
        raise UnavailableError(f"dla_core is {request.dla_core}, {trt.__name__} sees {builder.num_DLA_cores} cores")
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = request.dla_core
    config.set_flag(trt.BuilderFlag.GPU_FALLBACK)


def set_targets(trt: Any, config: Any, request: BuildRequest) -> tuple[list[str], list[str]]:
    """(compute capabilities of the plan, notes). Modules with `set_compute_capability` build ahead of time."""
    choose = getattr(config, "set_compute_capability", None)
    if choose is None:
        here = [machine.sm_name(gpu["compute_capability"]) for gpu in machine.gpus()[:1]]
        ignored = [target for target in request.targets if target not in here]
        note = f"targets {', '.join(ignored)} are for tensorrt_rtx; built for the GPU that is here"
        return here, [note] if ignored else []
    enum = getattr(trt, "ComputeCapability")  # noqa: B009  a plain name would not exist in other versions
    known = {name.lower(): value for name, value in enum.__members__.items() if name not in NO_TARGET}
    unknown = [target for target in request.targets if target not in known]
    if unknown:
        raise UsageError(
            f"target {unknown[0]!r} is not one of {', '.join(sorted(known))}",
            "For Jetsons and data-centre GPUs build with plain TensorRT on the device",
        )
    wanted = request.targets or tuple(machine.sm_name(gpu["compute_capability"]) for gpu in machine.gpus()[:1])
    if not wanted:
        raise UsageError(f"no targets, and no GPU is here; give some of {', '.join(sorted(known))}")
    count = "num_compute_capabilities"
    setattr(config, count, len(wanted))
    for index, target in enumerate(wanted):
        choose(known[target], index)
    return list(wanted), []


def set_timing_cache(trt: Any, config: Any, request: BuildRequest) -> None:
    """Use the kernel times that earlier builds measured. TensorRT-RTX measures nothing, and will remove the call."""
    if request.timing_cache is None or request.backend == "tensorrt_rtx":
        return
    path = Path(request.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise EngineError(f"{path}: {trt.__name__} refused the timing cache", "Delete it")


def save_timing_cache(config: Any, request: BuildRequest) -> None:
    if request.timing_cache is not None and request.backend != "tensorrt_rtx":
        with atomic_write(request.timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))


def parser_errors(parser: Any, logger: Any) -> str:
    texts = [parser.get_error(index).desc() for index in range(parser.num_errors)]
    return brief(texts or errors_of(logger)) or "no reason was given"


def brief(lines: Sequence[str]) -> str:
    """The last three distinct lines as one."""
    distinct = list(dict.fromkeys(" ".join(line.split())[:400] for line in lines))
    return "; ".join(distinct[-3:])
