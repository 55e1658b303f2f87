"""Every stage's settings and defaults: the one truth that the recipe, the commands and the stages share.

All models are frozen and refuse unknown keys. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError, to_jsonable_python

from compress.flavours import FLAVOURS, PLAN_PRECISIONS
from runtime.card import USUAL_BATCHES

MAX_COUNT = 1_000_000_000


def _number(value: Any) -> Any:
    """Refuses `true` and `yes`, which would pass for 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean_number", "expected a number")
    return value


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Int = Annotated[int, BeforeValidator(_number)]
Positive = Annotated[Float, Field(gt=0)]
NonNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, le=1)]
Count = Annotated[Int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[Int, Field(ge=0, le=MAX_COUNT)]
Workers = Annotated[Int, Field(ge=0, le=256)]
Seed = Annotated[Int, Field(ge=0, lt=2**63)]
"""A seed that the random generators of NumPy and of torch both take."""
Device = Annotated[str, BeforeValidator(lambda value: str(value) if type(value) is int else value)]
"""auto, cpu, or a GPU number, which YAML reads as a number."""
Side = Annotated[Int, Field(ge=1, le=8192)]
"""Pixels. Which image sizes a network takes is a matter of its strides: `Architecture.require_image_size`."""
IMGSZ = 640


def _sides(value: Any) -> list[Any]:
    """The sides in 640, [384, 640], "384x640" and "384 640"; the field judges them."""
    sides = re.split(r"[x,\s]+", value.strip().lower()) if isinstance(value, str) else value
    return list(sides) if isinstance(sides, list | tuple) else [sides]


def _both_sides(value: Any) -> list[Any]:
    sides = _sides(value)
    if len(sides) not in (1, 2):
        raise PydanticCustomError("shape_sides", "expected one side, or height and width")
    return [sides[0], sides[-1]]


def _frame_sides(value: Any) -> list[Any]:
    sides = _sides(value)
    if len(sides) != 2:
        raise PydanticCustomError("frame_sides", "expected height and width, such as 1080x1920")
    return sides


Shape = Annotated[tuple[Side, Side], BeforeValidator(_both_sides)]
"""(height, width) in pixels; one number is both."""
FrameShape = Annotated[tuple[Side, Side], BeforeValidator(_frame_sides)]
"""(height, width) in pixels; both are given, as no camera is square."""


def _listed(value: Any) -> Any:
    """The parts of a text with commas."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _ascending(counts: tuple[int, int, int]) -> tuple[int, int, int]:
    if list(counts) != sorted(counts):
        raise PydanticCustomError("not_ascending", "expected smallest, usual and largest, in this order")
    return counts


Profile = Annotated[tuple[Count, Count, Count], BeforeValidator(_listed), AfterValidator(_ascending)]
"""Smallest, usual and largest batch."""
Targets = Annotated[tuple[str, ...], BeforeValidator(_listed)]
"""Compute capabilities of GPUs: sm86, sm89."""

SCALES: dict[str, tuple[float, float]] = {
    "p": (0.33, 0.125),
    "n": (0.33, 0.25),
    "s": (0.33, 0.50),
    "m": (0.67, 0.75),
    "l": (1.00, 1.00),
    "x": (1.33, 1.25),
}
"""Name -> (depth multiple, width multiple) of a network. All but `p`, half the width of `n`, are YOLOv5's."""
ScaleName: TypeAlias = Literal[tuple(SCALES)]  # type: ignore[valid-type]
"""One of `SCALES`."""
STUDENT_ACTIVATIONS = {"silu": "SiLU", "relu": "ReLU"}
"""Name in a recipe -> the activation of an architecture; checkpoints may have others."""
ActivationName: TypeAlias = Literal[tuple(STUDENT_ACTIVATIONS)]  # type: ignore[valid-type]
"""One of `STUDENT_ACTIVATIONS`."""

PRECISIONS = ("auto", "float32", "float16", "bfloat16")
PrecisionName: TypeAlias = Literal[PRECISIONS]  # type: ignore[valid-type]
"""One of `PRECISIONS`; auto is float16 on a GPU and float32 on a CPU."""

NO_RESULT = "no result depends on this setting"
"""Marks a field whose value changes no number and no published file: neither the fingerprint of a stage nor a resumed
training looks at it."""


def _one_of(known: Iterable[str]) -> AfterValidator:
    """Accepts the names of a table. Raises one line that lists them for any other."""
    names = tuple(known)

    def check(name: str) -> str:
        if name not in names:
            raise PydanticCustomError("unknown_name", "expected one of {names}", {"names": ", ".join(names)})
        return name

    return AfterValidator(check)


Flavours = Annotated[tuple[Annotated[str, _one_of(FLAVOURS)], ...], BeforeValidator(_listed)]
PlanPrecisions = Annotated[tuple[Annotated[str, _one_of(PLAN_PRECISIONS)], ...], BeforeValidator(_listed)]


def _folder_name(name: str) -> str:
    """Accepts what names a folder within another. The runs of a recipe lie in `runs/<name>`."""
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise PydanticCustomError("no_folder_name", "expected a name for a folder, without /")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


class Settings(BaseModel):
    """A frozen, closed group of settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def result_settings(settings: Settings) -> dict[str, Any]:
    """The settings that a result depends on, groups within groups included, as values that JSON can hold."""
    return {
        name: _plain(getattr(settings, name))
        for name, field in type(settings).model_fields.items()
        if NO_RESULT not in field.metadata
    }


def _plain(value: Any) -> Any:
    return result_settings(value) if isinstance(value, Settings) else to_jsonable_python(value)


class NoSettings(Settings):
    """For a stage that reads none."""


G = TypeVar("G", bound=Settings)


class OptimizerConfig(Settings):
    """Optimiser and learning-rate schedule. Defaults are for fine-tuning on small data."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    lr0: Positive = 0.002
    lrf: Fraction = 0.05
    momentum: Fraction = 0.937
    weight_decay: NonNegative = 0.0005
    warmup_epochs: NonNegative = 2.0
    warmup_min_iterations: CountOrZero = 0
    warmup_momentum: Fraction = 0.8
    warmup_bias_lr: NonNegative = 0.0
    schedule: Literal["linear", "cosine"] = "cosine"
    clip_norm: Positive = 10.0
    nominal_batch: CountOrZero = 0
    """Gradients are accumulated up to this many images a step; 0 steps on every batch."""
    ema_decay: Annotated[Float, Field(gt=0, lt=1)] = 0.999
    ema_ramp: Positive = 200.0
    """EMA decay after update n is `ema_decay * (1 - exp(-n / ema_ramp))`."""


class LossConfig(Settings):
    """Gains of the detection loss before scaling to levels, classes and image size."""

    box: NonNegative = 0.05
    obj: NonNegative = 1.0
    cls: NonNegative = 0.5
    cls_pw: Positive = 1.0
    obj_pw: Positive = 1.0
    anchor_t: Annotated[Float, Field(gt=1)] = 4.0
    fl_gamma: NonNegative = 0.0
    label_smoothing: Fraction = 0.0


class AugmentConfig(Settings):
    """Strength of each augmentation; every random draw is a function of (seed, epoch, index)."""

    hsv_h: Fraction = 0.015
    hsv_s: Fraction = 0.7
    hsv_v: Fraction = 0.4
    degrees: NonNegative = 0.0
    translate: Fraction = 0.1
    scale: Fraction = 0.5
    shear: NonNegative = 0.0
    perspective: Annotated[Float, Field(ge=0, le=0.001)] = 0.0
    flipud: Fraction = 0.0
    fliplr: Fraction = 0.5
    mosaic: Fraction = 1.0
    mixup: Fraction = 0.0
    close_mosaic: CountOrZero = 10
    """The last this many epochs run without mosaic and mixup (capped at a fifth of the epochs)."""


def _yolov5_preset(scale: float, mixup: float, lrf: float, cls: float, obj: float) -> dict[str, dict[str, Any]]:
    return {
        "optimizer": {
            "name": "sgd",
            "lr0": 0.01,
            "lrf": lrf,
            "warmup_epochs": 3.0,
            "warmup_min_iterations": 100,
            "warmup_bias_lr": 0.1,
            "schedule": "linear",
            "nominal_batch": 64,
            "ema_decay": 0.9999,
            "ema_ramp": 2000.0,
        },
        "loss": {"cls": cls, "obj": obj},
        "augment": {"scale": scale, "mixup": mixup, "close_mosaic": 0},
    }


PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "finetune": {"optimizer": {}, "loss": {}, "augment": {}},
    "student": {"optimizer": {"lr0": 0.004}, "loss": {}, "augment": {}},
    "yolov5-low": _yolov5_preset(scale=0.5, mixup=0.0, lrf=0.01, cls=0.5, obj=1.0),
    "yolov5-med": _yolov5_preset(scale=0.9, mixup=0.1, lrf=0.1, cls=0.3, obj=0.7),
    "qad": {
        "optimizer": {"name": "adam", "lr0": 5e-5, "weight_decay": 0.0, "warmup_epochs": 1.0},
        "loss": {},
        "augment": {"hsv_h": 0.0, "hsv_s": 0.2, "hsv_v": 0.2, "translate": 0.0, "scale": 0.0, "mosaic": 0.0},
    },
}
"""Named tables of hyper-parameters; a value that a recipe gives beside a preset wins over it.

`student` is for small networks with little to forget: on 205 images the student `p` gained 1.6 points mAP50-95 when
distilled, 2.1 on labels alone and 1.1 from scratch with twice the learning rate of `finetune` (60 epochs, 160 pixels).
`qad` moves weights by parts of an INT8 step, on images as they are deployed; four times its learning rate raises the
loss.
"""
PresetName: TypeAlias = Literal[tuple(PRESETS)]  # type: ignore[valid-type]
"""One of `PRESETS`."""


class TrainConfig(Settings):
    """One training: a teacher, a plain student, or (with `DistillConfig`) a distilled one."""

    preset: PresetName = "finetune"
    """Where the settings of `optimizer`, `loss` and `augment` start from."""
    epochs: Count = 60
    batch: Count = 16
    imgsz: Side = IMGSZ
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    autoanchor: bool = True
    freeze: CountOrZero = 0
    """Layers 0..freeze-1 are not trained."""
    patience: CountOrZero = 0
    """Stop after this many epochs without a better fitness; 0 never stops early."""
    val_interval: Count = 5
    """Validate every this many epochs and always after the last."""
    checkpoint_interval: Annotated[Count, NO_RESULT] = 1
    """Save the state to resume from every this many epochs, and always after the last and a new best one."""
    precision: PrecisionName = "auto"
    """Arithmetic of the networks; auto is float16 on a GPU and float32 on a CPU. Weights and losses are float32."""
    compile: bool = False
    """Compile student and teacher by torch.compile: minutes at the start, and fewer passes over memory then. Compiled
    code rounds at other places, in half precision at fewer, so results depend on it."""
    cuda_graph: Annotated[bool, NO_RESULT] = False
    """Launch forward and backward of a batch as one CUDA graph, for a GPU that waits for the host; left out with more
    than one process, the loss mgd, or a teacher's ONNX file. Only the last bits of the results depend on it."""
    workers: Annotated[Workers | None, NO_RESULT] = None
    """Threads, or beside a GPU processes, that load data; 0 loads between the steps. None takes one thread, and beside
    a GPU a process for each core but one, 16 at most."""
    threads: Annotated[Workers, NO_RESULT] = 0
    """Compute threads on a CPU; 0 takes OMP_NUM_THREADS, else measures them at the start and again now and then.

    Only the last bits of the results depend on it. A resumed training goes on with the number it had; where a machine's
    load changes, two trainings are equal to the last bit only with a number that is set."""
    seed: Seed = 0
    tensorboard: Annotated[bool, NO_RESULT] = True

    @property
    def image_side(self) -> int:
        """Pixels of the images that are loaded; the network sees them reduced to `imgsz`."""
        return self.imgsz

    @model_validator(mode="before")
    @classmethod
    def _start_from_preset(cls, raw: Any) -> Any:
        """Groups given as plain tables are laid over those of the preset."""
        default = cls.model_fields["preset"].default
        preset = PRESETS.get(raw.get("preset", default)) if isinstance(raw, dict) else None
        if preset is None:
            return raw
        laid = {
            group: table | raw.get(group, {}) for group, table in preset.items() if isinstance(raw.get(group, {}), dict)
        }
        return raw | laid


AUTO = "auto"


class LossChoice(BaseModel):
    """A distillation loss in a recipe: `soft: auto`, `cwd: 0.2`, or with its own settings `cwd: {share: 0.3, tau: 2}`.

    With `auto` or a `share` its weight follows the gradients: at the neck its gradient is that share of the label
    loss's (see `compress.training.ratio`). A number, or `weight`, fixes the weight.

    The loss itself knows its settings: `compress.losses.distill.check_losses` judges them.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    weight: NonNegative | None = None
    share: Positive | None = None
    """None, without a weight, takes the loss's own."""
    until: Annotated[Float, Field(gt=0, le=1)] | None = None
    """Part of the epochs after which the loss has faded out; 1 keeps it to the end, None takes the loss's own."""

    @model_validator(mode="before")
    @classmethod
    def _from_short_form(cls, raw: Any) -> Any:
        if isinstance(raw, dict | LossChoice):
            return raw
        return {} if raw == AUTO else {"weight": raw}

    @model_validator(mode="after")
    def _weigh_in_one_way(self) -> LossChoice:
        if self.weight is not None and self.share is not None:
            raise PydanticCustomError("two_weights", "give a weight or a share, not both")
        return self

    @property
    def is_used(self) -> bool:
        return self.weight != 0

    @property
    def settings(self) -> dict[str, Any]:
        """All but the weight."""
        return dict(self.model_extra or {})


class Strategy(NamedTuple):
    """A way to distil: what it sets unless the recipe says otherwise, and what it needs."""

    losses: tuple[str, ...] = ("soft",)
    """The distillation losses."""
    label_weight: float = 1.0
    takes: Literal["any", "head", "features"] = "any"
    """The only kind of loss that it takes."""
    trains_teacher: bool = False
    """Whether the teacher learns from the labels too, beside the student."""
    needs_unlabelled: bool = False


STRATEGIES: dict[str, Strategy] = {
    "offline": Strategy(),
    "joint": Strategy(trains_teacher=True),
    "soft_labels": Strategy(label_weight=0.0, takes="head"),
    "features": Strategy(losses=("pkd",), takes="features"),
    "label_free": Strategy(label_weight=0.0, needs_unlabelled=True),
}
StrategyName: TypeAlias = Literal[tuple(STRATEGIES)]  # type: ignore[valid-type]
"""One of `STRATEGIES`."""


def _losses_of_strategy(settings: dict[str, Any]) -> dict[str, LossChoice]:
    return {name: LossChoice() for name in STRATEGIES[settings["strategy"]].losses}


class DistillConfig(TrainConfig):
    """Training with a teacher: the strategy, which losses of the LOSSES table, their weights and settings."""

    preset: PresetName = "student"
    strategy: StrategyName = "offline"
    losses: dict[str, LossChoice] = Field(default_factory=_losses_of_strategy)
    """By default those of the strategy; none at all trains the student on the labels alone."""
    label_weight: NonNegative = Field(default_factory=lambda settings: STRATEGIES[settings["strategy"]].label_weight)
    """Weight of the label loss; by default that of the strategy. At 0 no label is trained on."""
    unlabelled: Annotated[Path | None, NO_RESULT] = None
    """A folder of images, or a video, for the student to learn from without labels: as many of them in a batch as
    images of the train split, or alone where the strategy is label_free and label_weight 0. Results depend on its
    content, not on its path."""
    frame_stride: Count = 10
    """Every this many frames of an unlabelled video are looked at."""
    duplicate_threshold: NonNegative = 1.0
    """Grey levels of 255 by which an unlabelled image must differ from the ones before it, or it is left out: mean
    difference of thumbnails of 32x32 pixels without their mean brightness."""
    unsure: Fraction = 0.1
    """Least best objectness that the teacher must see in an unlabelled image to teach background there."""
    teacher_rate: Fraction = 0.1
    """Learning rate of a teacher that trains too, as a share of the student's."""

    teachers: Annotated[tuple[Path, ...], NO_RESULT] = ()
    """Further teachers beside the first; the losses see the mean of their logits. The files' contents are compared in
    place of this list."""
    teacher_flip: bool = False
    """The teachers also see each image mirrored; the losses see the mean of both."""
    teacher_imgsz: Side | None = None
    """Pixels of the teachers' images, a multiple of imgsz; None gives them the student's."""
    class_map: dict[str, str | None] | None = None
    """Teacher's class -> class of the data, or None to leave it out; classes of equal names need no entry. Without a
    map the classes must be the same."""

    @property
    def rules(self) -> Strategy:
        """The strategy's row of the table."""
        return STRATEGIES[self.strategy]

    @property
    def used_losses(self) -> list[str]:
        """Names of the losses whose weight is not 0."""
        return [name for name, choice in self.losses.items() if choice.is_used]

    @property
    def uses_train_split(self) -> bool:
        """Whether the images of the train split take part; without, the unlabelled ones are alone."""
        return self.label_weight > 0 or not self.rules.needs_unlabelled

    @property
    def image_side(self) -> int:
        return self.teacher_imgsz or self.imgsz

    @model_validator(mode="after")
    def _enlarge_by_whole_cells(self) -> DistillConfig:
        if self.image_side % self.imgsz:
            text = "teacher_imgsz {teacher} is no multiple of imgsz {imgsz}: set {imgsz}, {double} or {triple}"
            sizes = {"teacher": self.teacher_imgsz, "imgsz": self.imgsz}
            raise PydanticCustomError(
                "teacher_size", text, {**sizes, "double": 2 * self.imgsz, "triple": 3 * self.imgsz}
            )
        return self


class ExportConfig(Settings):
    """Settings that are fixed inside the exported graphs."""

    imgsz: Shape | None = None
    """(height, width) of the files; None takes the recipe's `imgsz` for both. Training stays square."""
    batch: Count = 1
    """Images of one call."""
    dynamic: bool = False
    """Any number of images a call; the conventional file then takes images of any size, too."""
    half: bool = False
    """The conventional file in float16. The shipped graph has its FP16 from the stage quantize."""
    iou: Annotated[Float, Field(gt=0, lt=1)] = 0.6
    conf: Fraction = 0.25
    """Not inside the graph: the default threshold that the card carries."""
    max_det: Annotated[Int, Field(ge=1, le=30_000)] = 300
    candidates: CountOrZero = 0
    """Rows that enter NMS; 0 takes one for each 25 rows of the head, at least 320. More let larger crowds through."""
    nms_iterations: Annotated[Int, Field(ge=1, le=1000)] = 8
    """Length of the longest suppression chain that is followed in one round; on COCO128 none is longer than 7."""
    frame: FrameShape | None = None
    """(height, width) of camera frames: puts the letterbox inside the graph."""
    opset: Annotated[Int, Field(ge=12, le=21)] = 19
    """ONNX operator set of the conventional file; the shipped one has 17 to 20."""
    max_box_error: Positive = 0.05
    """Pixels; the export fails above it."""
    max_score_error: Positive = 1e-3

    @model_validator(mode="after")
    def _take_one_batch(self) -> ExportConfig:
        if self.dynamic and self.batch > 1:
            raise PydanticCustomError("two_batches", "dynamic files take any batch: give batch or dynamic, not both")
        return self


def _float_layers(value: Any) -> Any:
    """Names that YAML reads as numbers, such as `1`, become text."""
    if isinstance(value, (list, tuple)) and all(type(name) in (str, int) for name in value):
        return tuple(map(str, value))
    if value == AUTO or (type(value) is int and 0 <= value <= MAX_COUNT):
        return value
    raise PydanticCustomError("float_layers", "expected auto, a number of layers, or a list of their names")


FloatLayers = Annotated[Literal["auto"] | int | tuple[str, ...], BeforeValidator(_float_layers)]


class QuantizeConfig(Settings):
    """Calibration, and the gate that keeps a lossy flavour out of the bundle."""

    flavours: Flavours = tuple(FLAVOURS)
    calibration_images: Count = 128
    method: Literal["auto", "minmax", "mse"] = "auto"
    """Ranges of activations: all values, or those of the smallest mean squared error; auto tries the second where the
    first loses more than `max_map_drop`, before more layers stay in float."""
    weight_bits: Literal[7, 8] = 8
    """7 is for x86 CPUs without VNNI, where fast kernels cut sums of 8-bit products off. With 8 the runtime takes
    slower, exact kernels of ONNX Runtime there; OpenVINO has none."""
    draws: Count = 4
    """Files, alike but for the rounding, over which the loss of an INT8 flavour is averaged."""
    float_layers: FloatLayers = "auto"
    """Layers of an INT8 flavour that stay in float: auto takes the worst 2, then 4, 8 and 16 until `max_map_drop`
    holds, and for int8-ort none before these; a number takes that many of the worst, names take those, as `2.cv1`."""
    max_map_drop: NonNegative = 0.02
    """mAP50-95 that a flavour may lose against FP32, the mean of its draws; from 1 on it keeps any accuracy."""
    max_latency_ratio: Positive = 1.0
    """Latency against FP32 that a flavour for this CPU may have; the others are made for other hardware."""


class QadConfig(DistillConfig):
    """Quantisation-aware distillation: a distillation whose student rounds as its INT8 file does, and whose teacher is
    that student in float.
    """

    when: Literal["needed", "always", "never"] = "needed"
    """needed: for the INT8 flavours of which calibration makes no file that passes the gate, by any method and number
    of layers in float that `quantize` lets them have, because it loses more than `quantize.max_map_drop`."""
    with_teacher: bool = False
    """The run's teacher teaches too: the losses see the mean of its logits and those of the float student."""
    preset: PresetName = "qad"
    strategy: StrategyName = "soft_labels"
    losses: dict[str, LossChoice] = {"soft": LossChoice(weight=1.0)}
    epochs: Count = 8
    val_interval: Count = MAX_COUNT
    """Only the last epoch is validated and kept: a best one would be chosen on the images that judge the file."""
    precision: Literal["float32"] = "float32"
    """In half precision the sums would not be those of the file."""
    compile: Literal[False] = False
    """The body is computed node by node as the graph has it."""
    unsure: Fraction = 0.0
    """The float student teaches background everywhere: it is the student's own."""


class BuildConfig(Settings):
    """TensorRT plans, one per precision that passed its gate."""

    backend: Literal["auto", "tensorrt", "tensorrt_rtx", "none"] = "auto"
    targets: Targets = ("sm86", "sm89", "sm120")
    """Compute capabilities for ahead-of-time plans (tensorrt_rtx); plain TensorRT builds for the GPU that is there."""
    precisions: PlanPrecisions = PLAN_PRECISIONS
    batches: Profile = USUAL_BATCHES
    """Smallest, usual and largest batch of plans of dynamic files."""
    workspace_mib: Annotated[Int, Field(ge=1, le=1 << 20)] = 2048


class BenchConfig(Settings):
    """The measurement: same files, same run, for latency and mAP."""

    latency_samples: Annotated[Int, Field(ge=11, le=MAX_COUNT)] = 700
    """662 are the fewest that support a p99."""
    warmup_ms: NonNegative = 200.0
    accuracy_conf: Fraction = 0.001
    batch: Count = 1
    """Images of a timed call, of files that leave it open; others have their own."""
    max_images: CountOrZero = 0
    """Validation images to use; 0 takes all."""


class ValConfig(Settings):
    """Settings of `edgestill val` alone."""

    batch: Count = 32


class BeltConfig(Settings):
    """The data set that `edgestill data make` generates."""

    images: Annotated[Int, Field(ge=2, le=MAX_COUNT)] = 240
    size: Annotated[Int, Field(ge=64, le=4096)] = 320
    seed: Seed = 0


class TeacherConfig(TrainConfig):
    """The teacher: a checkpoint used as it is where its classes are the data's, fine-tuned where they are not."""

    weights: Path | None = None
    scale: ScaleName = "n"
    """Architecture when there is no checkpoint to start from."""
    finetune: Literal["auto", "always", "never"] = "auto"
    """auto: where its classes are not the data's. never: `distill.class_map` may then say what its classes are."""


class StudentConfig(Settings):
    init: Literal["auto", "inherit", "scratch"] = "auto"
    """inherit starts from slices of `weights`, else of the teacher; auto does so where the student is no wider.

    With auto, weights of the student's own size are copied as they are."""
    scale: ScaleName | None = "p"
    """None takes the size of `weights`."""
    weights: Path | None = None
    """Checkpoint to start from, of this size or a larger one."""
    activation: ActivationName | None = None
    """relu is free inside an INT8 convolution and on many NPUs; None takes that of the network that the student starts
    from, else silu."""

    @model_validator(mode="after")
    def _start_in_one_way(self) -> StudentConfig:
        if self.init == "scratch" and self.weights:
            raise PydanticCustomError("two_starts", "scratch would leave the weights unused: give one of both")
        return self


NO_START = StudentConfig(scale=None)
"""Says nothing: for a training that is resumed, whose state has its network."""


class StudyConfig(Settings):
    """Ways to train the student that `edgestill study` compares."""

    arms: dict[FolderName, dict[str, Any]] = {}
    """Name -> settings of `student` and `distill` that are laid over the recipe's."""
    split: Literal["val", "test"] = "test"
    """Images that judge; `val` also chose the best epoch of the teacher."""
    seeds: Count = 5
    """Trainings of each arm; more make the intervals narrower."""
    jobs: Annotated[Count, NO_RESULT] = 1
    """Trainings at a time, each with one CPU thread."""
    time_limit_s: Annotated[Positive | None, NO_RESULT] = None
    """Seconds from the start of the study, its teacher included, after which trainings are stopped, to be gone on with
    next time. The study is written with those that are done."""


class ReportConfig(Settings):
    study: Annotated[Path | None, NO_RESULT] = None
    """The study.json, or its folder, that says what the distillation gained; None looks for the folder
    `<name>-study` beside that of the run. Its content counts, not its place."""


class Recipe(Settings):
    """The whole pipeline in one file. `imgsz`, `seed` and `device` hold for every stage."""

    name: FolderName = "run"
    data: Path
    imgsz: Side = IMGSZ
    seed: Seed = 0
    device: Device = "auto"
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    distill: DistillConfig = DistillConfig()
    export: ExportConfig = ExportConfig()
    quantize: QuantizeConfig = QuantizeConfig()
    qad: QadConfig = QadConfig()
    build: BuildConfig = BuildConfig()
    bench: BenchConfig = BenchConfig()
    report: ReportConfig = ReportConfig()
    study: StudyConfig = StudyConfig()

    def part(self, group: type[G]) -> G:
        """The settings that `group` has fields for, as they are here."""
        return group.model_validate({name: getattr(self, name) for name in group.model_fields})

    @model_validator(mode="before")
    @classmethod
    def _share(cls, raw: Any) -> Any:
        """`imgsz` and `seed` of the recipe are those of its trainings, unless a training names its own."""
        if not isinstance(raw, dict):
            return raw
        shared = {key: raw[key] for key in ("imgsz", "seed") if key in raw}
        return raw | {
            stage: shared | raw.get(stage, {})
            for stage in ("teacher", "distill", "qad")
            if isinstance(raw.get(stage, {}), dict)
        }
