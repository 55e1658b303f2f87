"""Load a model file or bundle, then turn frames into `Detections` in frame pixels.

The three steps of a call are public, because benchmarks time each of them: `preprocess` letterboxes the frames of one
batch, `infer` runs the model, `postprocess` filters the boxes and converts them to frame pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from runtime import machine
from runtime.backends import BACKENDS, DEVICES, NAMES, Array, Backend, LoadOptions, LoadRequest, RawOutput, load_backend
from runtime.boxes import detections_from_rows, unletterbox
from runtime.bundle import ModelFile, metadata_of, model_files, read_checked
from runtime.card import Artifact, ModelCard
from runtime.detections import Detections
from runtime.errors import EdgestillError, EngineError, InputError, UnavailableError, UsageError
from runtime.image import LETTERBOX_FILL, Geometry, Image, fill_border, geometry, paste, to_tensor
from runtime.yolov5_export import yolov5_card

OPEN_BATCH = 16
"""Most images of one call of a file that takes any number: the memory of a call grows with them."""
MISMATCH = "Build it again on this machine, or give the bundle's ONNX file"


class Placement(NamedTuple):
    """Where a frame lies in the model's input: `(box - pad_wh) / gain` converts a box to frame pixels."""

    gain: float
    pad_wh: tuple[float, float]
    frame_hw: tuple[int, int]


class Prepared(NamedTuple):
    """`array` is the model's input: an image for each of `places`, and grey ones behind them up to the least batch."""

    array: Array
    places: tuple[Placement, ...]


class Detector:
    """A loaded model. Calls may come from several threads; close it, or use it as a context manager.

    `card` describes the model, `artifact` the file that was taken from a bundle (None for a file without a bundle),
    `skipped` lists the files before it with the reason why each does not run here, `providers` names what computes.
    """

    def __init__(
        self, backend: Backend, card: ModelCard, *, artifact: Artifact | None = None, conf: float | None = None
    ) -> None:
        self.card = card
        self.artifact = artifact
        self.skipped: list[tuple[str, str]] = []
        self.conf = card.conf if conf is None else checked_conf(conf)
        self._backend = backend
        check_specs(backend, card)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        conf: float | None = None,
        device: str = "auto",
        backend: str = "auto",
        variant: str | None = None,
        threads: int | None = None,
        spin: bool = True,
        as_written: bool = False,
    ) -> Detector:
        """Load an ONNX or IR file, an engine with its card beside it, or the first file of a bundle that works here.

        `device` is "auto", "cpu", "cuda" or "tensorrt"; any value but "auto" is used or refused, and so is `backend`,
        "onnx" or "openvino" for example. "auto" takes those that the file is made for, as its card or bundle says, and
        refuses it where they are not here; other files run in the first backend that reads them. `variant` picks one
        precision or file of a bundle; `threads` limits the threads of the CPU. With `spin` those of ONNX Runtime wait
        actively for the next frame: fastest when frames follow at once, at over twice the CPU time on a camera.
        `as_written` computes the quantised layers of an ONNX file in float: it shows the accuracy of a file made for
        another library. Raises UsageError, InputError, UnavailableError or EngineError with one line: what is wrong
        and what helps.
        """
        if device not in DEVICES:
            raise UsageError(f"device is {device!r}, expected {', '.join(DEVICES)}")
        if backend not in NAMES:
            raise UsageError(f"backend is {backend!r}, expected {', '.join(NAMES)}")
        if conf is not None:
            checked_conf(conf)
        if threads is not None and threads < 1:
            raise UsageError(f"threads is {threads}, expected 1 or more")
        options = LoadOptions(device, threads, spin, as_written)
        as_made = backend == "auto"
        files = model_files(path, variant, backend)
        if len(files) == 1:
            return cls._open(files[0], read_checked(files[0]), conf, options, as_made=as_made)
        skipped: list[tuple[str, EdgestillError]] = []
        for file in files:
            contents = read_checked(file) if file.path.is_file() else {}  # a changed file is an error, not skipped
            try:
                refuse_unsuited(file, device)
                detector = cls._open(file, contents, conf, options, as_made=as_made)
            except EdgestillError as error:
                skipped.append((file.path.name, error))
                continue
            detector.skipped = [(name, str(error)) for name, error in skipped]
            return detector
        raise UnavailableError(
            f"{path}: none of its {len(skipped)} files runs here on device {device}: {_reasons(skipped)}",
            skipped[-1][1].hint,
        )

    @classmethod
    def _open(
        cls, file: ModelFile, contents: Mapping[str, bytes], conf: float | None, options: LoadOptions, *, as_made: bool
    ) -> Detector:
        refuse_mismatch(file)
        request = LoadRequest(file.spec.name, file.path, contents, options, has_card=file.card is not None)
        backend = load_as_made(file, request) if as_made else load_backend(request)
        try:
            card = file.card or yolov5_card(file.path, metadata_of(file.path, file.spec), backend)
            return cls(backend, card, artifact=file.artifact, conf=conf)
        except EdgestillError:
            backend.close()
            raise

    @property
    def providers(self) -> tuple[str, ...]:
        return self._backend.providers

    @overload
    def __call__(self, frames: Image) -> Detections: ...

    @overload
    def __call__(self, frames: Sequence[Image]) -> list[Detections]: ...

    def __call__(self, frames: Image | Sequence[Image]) -> Detections | list[Detections]:
        """The boxes in one uint8 BGR frame (H, W, 3), or those in each of a list, whose frames may differ in size.

        A list runs in as few calls of the model as `card.batches` allows, of 16 images where that is open; where it
        takes more images than are left, grey ones fill it. Raises InputError when a frame is anything else.
        """
        if not isinstance(frames, (list, tuple)):
            return self._detect([frames])[0]
        most = self.card.batches.most or max(OPEN_BATCH, self.card.batches.least)
        return [found for start in range(0, len(frames), most) for found in self._detect(frames[start : start + most])]

    def _detect(self, frames: Sequence[Any]) -> list[Detections]:
        prepared = self.preprocess(frames)
        return self.postprocess(self.infer(prepared), prepared)

    def preprocess(self, frames: Sequence[Image]) -> Prepared:
        """The model's input for these frames, not more than one call takes: frames, canvases, or a float tensor."""
        if not 0 < len(frames) <= (self.card.batches.most or len(frames)):
            raise UsageError(
                f"{len(frames)} frames, {self.card.name} takes {self.card.batches} in one call",
                "Call the detector itself with the list",
            )
        sizes_hw = [checked_frame(frame) for frame in frames]
        if self.card.input == "frame":
            return self._whole_frames(frames, sizes_hw)
        places = [geometry(size_hw, self.card.size_hw) for size_hw in sizes_hw]
        canvases = self._blank(len(frames), self.card.size_hw)
        for canvas, frame, place in zip(canvases, frames, places, strict=False):
            fill_border(canvas, place)
            paste(canvas, frame, place)
        array: Array = canvases
        if self.card.input == "tensor":
            array = to_tensor(canvases).astype(self._backend.input.dtype, copy=False)
        placed = (Placement(p.gain, centred_pad_wh(p, size), size) for p, size in zip(places, sizes_hw, strict=True))
        return Prepared(array, tuple(placed))

    def _blank(self, count: int, size_hw: tuple[int, int]) -> Image:
        """Memory for `count` images, grey behind them up to the least batch.

        It is new for each call, as one that is used again would change while frames are queued.
        """
        images = np.empty((max(count, self.card.batches.least), *size_hw, 3), np.uint8)
        images[count:] = LETTERBOX_FILL
        return images

    def _whole_frames(self, frames: Sequence[Image], sizes_hw: Sequence[tuple[int, int]]) -> Prepared:
        wanted = self.card.frame_hw
        if odd := [size_hw for size_hw in sizes_hw if size_hw != wanted]:
            raise InputError(
                f"frame has (height, width) {odd[0]}, this model takes {wanted}",
                "Export without `frame` to take any size",
            )
        places = tuple(Placement(1.0, (0.0, 0.0), size_hw) for size_hw in sizes_hw)
        if max(len(frames), self.card.batches.least) == 1:  # as it is, without a copy
            return Prepared(np.ascontiguousarray(frames[0])[None], places)
        images = self._blank(len(frames), sizes_hw[0])
        for image, frame in zip(images, frames, strict=False):
            image[...] = frame
        return Prepared(images, places)

    def infer(self, prepared: Prepared) -> RawOutput:
        """The model's raw output: finished boxes [B, K, 6] or rows [B, N, 5 + C], as the card says, and its cutoff.

        Raises UsageError when the detector is closed, EngineError when the model fails on this input.
        """
        return self._backend.run(prepared.array)

    def postprocess(self, raw: RawOutput, prepared: Prepared, conf: float | None = None) -> list[Detections]:
        """For each frame its boxes over `conf` (default: the detector's own) in its pixels, best first.

        They are at most the card's `max_det`. Their `cutoff` is set where a limit left boxes over `conf` out.

        Raises EngineError when the output is not finite, or not boxes with scores in 0..1.
        """
        conf = self.conf if conf is None else conf
        cutoffs = np.zeros(len(raw.array)) if raw.cutoff is None else raw.cutoff
        if min(len(raw.array), len(cutoffs)) < len(prepared.places):
            raise EngineError(f"{self.card.name}: {len(raw.array)} outputs for {len(prepared.places)} frames", MISMATCH)
        return [
            self._detections(array, float(cutoff), place, conf)
            for array, cutoff, place in zip(raw.array, cutoffs, prepared.places, strict=False)
        ]

    def _detections(self, array: Array, cutoff: float, place: Placement, conf: float) -> Detections:
        rows, cutoff = self._rows(array, cutoff, conf)
        boxes = unletterbox(rows[:, :4], *place)
        try:
            return Detections(boxes, rows[:, 4], rows[:, 5].astype(np.int64), cutoff if cutoff > conf else 0.0)
        except ValueError as error:
            raise EngineError(
                f"{self.card.name} ({self.card.precision}): its output is not a detector's: {error}",
                "Export it again, or use the fp32 variant",
            ) from error

    def _rows(self, array: Array, cutoff: float, conf: float) -> tuple[NDArray[np.float32], float]:
        """Boxes (n, 6) of one image in the pixels of the model's input, and the best score that may be missing."""
        limit = self.card.max_det
        if not np.isfinite(array[:, 4]).all():
            raise EngineError(
                f"{self.card.name} ({self.card.precision}): scores are not finite: a value overflowed inside the model",
                "Use the fp32 variant",
            )
        if self.card.output == "boxes":
            return array[array[:, 4] > np.float32(conf)][:limit].astype(np.float32, copy=False), cutoff
        found = detections_from_rows(array, conf=conf, iou=self.card.iou, max_det=limit + 1)
        return found[:limit], float(found[limit:, 4].max(initial=0))

    def close(self) -> None:
        self._backend.close()

    def __enter__(self) -> Detector:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def checked_conf(conf: float) -> float:
    if not 0 <= conf <= 1:
        raise UsageError(f"conf is {conf}, expected 0..1")
    return conf


def checked_frame(frame: Any) -> tuple[int, int]:
    """Height and width of a uint8 (H, W, 3) array. Raises InputError that says what was given."""
    if not isinstance(frame, np.ndarray):
        raise InputError(f"frame is {type(frame).__name__}, expected a NumPy array", "Read files with read_image")
    if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or 0 in frame.shape:
        raise InputError(f"frame is {frame.dtype} {frame.shape}, expected uint8 (height, width, 3) in BGR order")
    return frame.shape[0], frame.shape[1]


def centred_pad_wh(place: Geometry, frame_hw: tuple[int, int]) -> tuple[float, float]:
    """The border as YOLOv5's detect subtracts it: from the unrounded scaled size, so that its boxes and ours agree."""
    (height, width), (canvas_height, canvas_width) = frame_hw, place.canvas_hw
    return (canvas_width - width * place.gain) / 2, (canvas_height - height * place.gain) / 2


def check_specs(backend: Backend, card: ModelCard) -> None:
    """Raises InputError when the file's input is not the one that its card describes."""
    wanted, got = card.input_shape, backend.input.shape
    fits = len(got) == len(wanted) and all(a in (None, b) for a, b in zip(got, wanted, strict=True))
    if not fits or (backend.input.dtype == np.uint8) != (card.input != "tensor"):
        raise InputError(
            f"{card.name}: input is {backend.input.dtype} {list(got)}, its card says {card.input} {list(wanted)}",
            "Card and file do not belong together, export again",
        )


def _reasons(skipped: Sequence[tuple[str, EdgestillError]]) -> str:
    """Each reason once, with the files that have it."""
    files: dict[str, list[str]] = {}
    for name, error in skipped:
        files.setdefault(error.message.removeprefix(f"{name} "), []).append(name)
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {reason}" for reason, names in files.items()
    )


def load_as_made(file: ModelFile, request: LoadRequest) -> Backend:
    """The model on the device that its file is made for, unless the request names one; elsewhere it would be slower
    than FP32 without a word.

    Raises the errors of `load_backend`. When that device or its library is not there, the error says how to run the
    file all the same.
    """
    if not file.devices:
        return load_backend(request)
    options, suffix = request.options, file.path.suffix.lower()
    is_free = options.device == "auto"
    try:
        return load_backend(request._replace(options=options._replace(device=file.devices[0])) if is_free else request)
    except UnavailableError as error:
        readers = [spec.name for spec in BACKENDS.values() if suffix in spec.suffixes and spec.is_installed]
        others = readers if is_free or not file.spec.is_installed else []
        named = [f"name the backend, {' or '.join(others)}, to run it all the same"] if others else []
        raise UnavailableError(
            f"{file.path.name} is made for {file.spec.name} on {' or '.join(file.devices)}: {error.message}",
            ", or ".join([*filter(None, [error.hint]), *named]),
        ) from error


def refuse_unsuited(file: ModelFile, device: str) -> None:
    """Raises InputError when the file is absent, UsageError when it is not made for the device."""
    if not file.path.is_file():
        raise InputError("not in the folder")
    if device not in ("auto", *file.spec.devices):
        raise UsageError(f"a file for {file.spec.name}, device is {device}")
    if device not in ("auto", *(file.devices or (device,))):
        raise UsageError(f"a file for {' or '.join(file.devices)}, device is {device}")


def refuse_mismatch(file: ModelFile) -> None:
    """Raises UnavailableError, with both values, when an engine is for another version, platform or GPU."""
    if file.artifact is None:
        return
    reasons = machine.mismatches(file.artifact, machine.facts())
    if reasons:
        raise UnavailableError(f"{file.path.name} cannot run here: {'; '.join(reasons)}", MISMATCH)
