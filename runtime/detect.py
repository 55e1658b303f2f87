"""The command `detect`: of the device (`python -m runtime detect`) and of `edgestill detect`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING

from runtime.arguments import path
from runtime.errors import EdgestillError, InputError
from runtime.numbers import real, whole
from runtime.terminal import log, print_json, print_line

if TYPE_CHECKING:
    from runtime.detections import Detections
    from runtime.detector import Detector
    from runtime.frames import Frame, FrameReader
    from runtime.results import ResultWriter

SOURCES = "image, folder, pattern, video, camera number, /dev/video0, address (rtsp://, ...) or GStreamer pipeline"


def add_detect_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help=SOURCES)
    parser.add_argument(
        "--model", "--weights", type=path, required=True, help=".onnx file, engine with its card, or bundle folder"
    )
    parser.add_argument("--conf", "--conf-thres", type=real(0, 1), help="least score (default: that of the model)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or tensorrt (default: auto)")
    parser.add_argument(
        "--backend", default="auto", help="library that runs it: auto, onnx, openvino, tensorrt, ... (default: auto)"
    )
    parser.add_argument("--variant", help="precision or file to take from a bundle")
    parser.add_argument(
        "--threads", type=whole(1, 1024), help="CPU threads of one inference (default: one for each core)"
    )
    parser.add_argument(
        "--spin",
        action=argparse.BooleanOptionalAction,
        help="let threads of ONNX Runtime wait actively: faster, at twice the CPU time (default: for files only)",
    )
    parser.add_argument(
        "--stride", type=whole(1), default=1, metavar="N", help="every Nth frame of a video (default: 1)"
    )
    parser.add_argument(
        "--latest", action="store_true", help="only the newest frame of a stream, skip those in between"
    )
    parser.add_argument(
        "--reconnect",
        type=whole(0),
        default=0,
        metavar="N",
        help="connect again up to N times when a stream drops (default: 0)",
    )
    parser.add_argument(
        "--save",
        type=path,
        metavar="DIR",
        help="write images and videos with drawn boxes; names that are taken get a number",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object for each frame on standard output")


def detect(options: argparse.Namespace) -> None:
    """Detect on every frame of the sources. Raises EdgestillError at the end when a file or frame could not be read."""
    from runtime.detector import Detector
    from runtime.frames import FrameReader
    from runtime.results import ResultWriter
    from runtime.sources import find_sources

    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that videos are completed
    sources = find_sources(options.sources)
    reader = FrameReader(sources, stride=options.stride, latest=options.latest, reconnect=options.reconnect, log=log)
    streams = any(source.kind == "stream" for source in sources)
    with (
        Detector.load(
            options.model,
            conf=options.conf,
            device=options.device,
            backend=options.backend,
            variant=options.variant,
            threads=options.threads,
            spin=not streams if options.spin is None else options.spin,
        ) as detector,
        ResultWriter(options.save) if options.save else nullcontext() as writer,
    ):
        log_choice(detector)
        batch = 1 if streams else detector.card.batches.least
        detect_frames(detector, reader, writer, as_json=options.json, batch=batch)
    if reader.failures:
        more = f" (and {len(reader.failures) - 1} more)" if len(reader.failures) > 1 else ""
        raise EdgestillError(f"not all was read: {reader.failures[0]}{more}")


def detect_frames(
    detector: Detector, reader: FrameReader, writer: ResultWriter | None, *, as_json: bool, batch: int = 1
) -> None:
    """Print a line for each frame, as text or JSON, and write it with its boxes if there is a writer.

    `batch` frames are detected in one call.
    """
    from runtime.detections import draw, label_problem

    names = detector.card.names
    if writer and (problem := label_problem(names)):
        log(f"warning: {problem}")
    frames = iter(reader)
    while group := list(islice(frames, batch)):
        for frame, found, milliseconds in detect_group(detector, group, reader):
            saved = writer.write(frame, draw(frame.image, found, names)) if writer else None
            if as_json:
                line = {"source": frame.source, "frame": frame.number, "detections": found.to_list(names)}
                missing = {"cutoff": round(found.cutoff, 6)} if found.cutoff else {}
                print_json(line | missing | ({"saved": str(saved)} if saved else {}))
            else:
                print_line(f"{frame.source} [{frame.number}]: {summary(found, names)}, {milliseconds:.1f} ms")


def detect_group(
    detector: Detector, frames: Sequence[Frame], reader: FrameReader
) -> Iterator[tuple[Frame, Detections, float]]:
    """Each frame with its detections and its share of the milliseconds.

    An image of another size than a model with a fixed frame takes is reported and left out.
    """
    started = time.perf_counter()
    try:
        found = detector([frame.image for frame in frames])
    except InputError as error:
        if len(frames) > 1:
            yield from (one for frame in frames for one in detect_group(detector, [frame], reader))
        elif frames[0].fps is not None:
            raise
        else:
            reader.report_failure(f"{frames[0].source}: {error}")
        return
    milliseconds = (time.perf_counter() - started) * 1e3 / len(frames)
    yield from ((frame, one, milliseconds) for frame, one in zip(frames, found, strict=True))


def log_choice(detector: Detector) -> None:
    """Log which file runs, and for each file before it why it does not run."""
    for file, reason in detector.skipped:
        log(f"skipped {file}: {reason}")
    file = detector.artifact.file if detector.artifact else detector.card.name
    log(f"running {file} ({detector.card.precision}) on {detector.providers[0]}")


def summary(found: Detections, names: Sequence[str]) -> str:
    """For example "2 bolt, 1 nut"."""
    from runtime.detections import name_of

    counts = Counter(name_of(class_id, names) for class_id in found.class_id.tolist())
    text = ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"
    return f"{text} (more than fit: boxes up to {found.cutoff:.2f} may be missing)" if found.cutoff else text
