"""A recipe is a YAML file with the settings of a whole run; this module reads, changes and writes it."""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ValidationError

from compress.config import QuantizeConfig, Recipe
from runtime.errors import InputError, UsageError, one_line

MAX_YAML_BYTES = 1 << 20
ANY, A_PATH = "*", dict[str, Any]()
ARM_PATHS = {"student": {"weights": A_PATH}, "distill": {"unlabelled": A_PATH, "teachers": A_PATH}}
PATHS = {
    "data": A_PATH,
    "teacher": {"weights": A_PATH},
    "qad": {"unlabelled": A_PATH, "teachers": A_PATH},
    **ARM_PATHS,
    "study": {"arms": {ANY: ARM_PATHS}},
    "report": {"study": A_PATH},
}
"""The keys of a recipe whose values are paths."""
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
"""Raised for wrong syntax; for bytes that are no UTF-8, a 13th month or a number of 5000 digits; for deep nesting."""


def load_recipe(path: Path, changes: Iterable[str] = ()) -> Recipe:
    """Read the recipe at `path` and apply `changes` ("quantize.calibration_images=64") to it.

    Paths in the recipe are relative to its folder. Raises InputError for an unreadable file and UsageError for a
    key or value that no stage knows, naming the nearest key.
    """
    raw = read_yaml(path)
    for change in changes:
        raw = with_change(raw, change)
    recipe: Recipe = parse(Recipe, _with_absolute_paths(raw, path.resolve().parent), origin=path.name)
    return recipe


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read as data: no tags, no aliases, at most 1 MiB."""
    if not path.is_file():
        raise InputError(f"{path}: no such recipe", "Write one with `edgestill init`")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise InputError(f"{path}: {path.stat().st_size} bytes, expected a recipe of at most {MAX_YAML_BYTES}")
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            raise InputError(f"{path}: YAML aliases are not accepted", "Write the values out")
        raw = yaml.safe_load(text)
    except NOT_YAML as error:
        raise InputError(f"{path}: not plain YAML ({one_line(error)})", "Remove tags and fix the syntax") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: holds a {type(raw).__name__}, expected `key: value` lines")
    return raw


def with_change(raw: Mapping[str, Any], change: str) -> dict[str, Any]:
    """`raw` with the one value that `change` ("group.key=value") names replaced.

    Raises UsageError when `change` has another form or reaches into a single value.
    """
    dotted, equals, text = change.partition("=")
    if not equals or not dotted:
        raise UsageError(f"--set {change!r}: expected KEY=VALUE", "For example --set quantize.calibration_images=64")
    try:
        value = yaml.safe_load(text)
    except NOT_YAML:
        raise UsageError(f"--set {reprlib.repr(change)}: the value of {dotted} is not plain YAML") from None
    return with_value(raw, dotted, value)


def with_value(raw: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """`raw` with `value` at the key `dotted` ("group.key"). Raises UsageError when a group holds a single value."""
    head, *rest = dotted.split(".")
    if not rest:
        return {**raw, head: value}
    inner = raw.get(head) or {}
    if not isinstance(inner, Mapping):
        raise UsageError(f"{dotted} cannot be set: {head} holds a single value, not a group")
    return {**raw, head: with_value(inner, ".".join(rest), value)}


def parse(model: type[Any], raw: Mapping[str, Any], origin: str) -> Any:
    """`raw` as `model`. Raises UsageError, in one line, when it does not fit."""
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{origin}: {_explain(model, first)}") from None


def _explain(model: type[BaseModel], error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}. {suggestion(location[-1], _group(model, location[:-1]).model_fields)}"
    if error["type"] == "missing":
        return f"{key!r} is missing"
    return f"{key}: {not_accepted(error)}"


def not_accepted(error: Mapping[str, Any]) -> str:
    """One of the errors that pydantic found, in words: the value and what was expected."""
    return f"{reprlib.repr(error['input'])} is not accepted: {error['msg']}"


def suggestion(name: str, known: Collection[str]) -> str:
    """Hint for an unknown name: the nearest of the known ones, or all of them where none is near."""
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(known) or 'none'}"


def _group(model: type[BaseModel], location: Iterable[str]) -> type[BaseModel]:
    for part in location:
        model = model.model_fields[part].annotation  # type: ignore[assignment]
    return model


def _with_absolute_paths(raw: Any, folder: Path, paths: Mapping[str, Any] = PATHS) -> Any:
    """`raw` with the texts at the keys of the tree `paths`, alone or in lists, as absolute paths from `folder`."""
    if isinstance(raw, Mapping):
        known = {key: paths.get(key, paths.get(ANY)) for key in raw}
        return {
            key: value if known[key] is None else _with_absolute_paths(value, folder, known[key])
            for key, value in raw.items()
        }
    if isinstance(raw, list):
        return [_with_absolute_paths(one, folder, paths) for one in raw]
    return str((folder / Path(raw).expanduser()).resolve()) if isinstance(raw, str) and paths is A_PATH else raw


TEMPLATE = """\
# edgestill recipe: one file from checkpoint and data to engines and a report.
# Run it with `edgestill run {file}`; run it again and only what changed is done again.
# Any value can be changed for one run: `--set distill.epochs=30`.

name: {name}
data: {data}            # data.yaml: path, train, val, names
imgsz: {imgsz}              # pixels of training, and of all that follows unless export.imgsz says otherwise
seed: 0
device: auto            # auto, cpu, or a GPU number

teacher:                # used as it is if its classes are the data's, fine-tuned if they are not
  weights: {weights}
  # finetune: never     # use it as it is; distill.class_map says what its classes are for the data
  epochs: {teacher_epochs}            # {teacher_reason}
  batch: 16
  # preset: finetune    # or yolov5-low, yolov5-med: the original's schedules for large data

student:
  scale: {student}             # p (smallest), n, s, m, l, x
  # init: scratch       # default: slices of the teacher's weights, where the student is no wider
  # activation: relu    # faster in INT8 and on many NPUs than the default, silu

distill:
  epochs: {epochs}            # {reason}
  batch: 16
  # preset: student     # its learning rate is for small networks; finetune halves it
  # strategy: offline   # or joint, soft_labels, features, label_free: see docs/distillation.md
  # unlabelled: images  # a folder of images or a video of the camera, to learn from without labels
  losses:               # name: auto (the weight follows the gradients) or a fixed weight
    soft: auto          # classes, boxes and objectness as the teacher sees them
    # pkd: auto         # how each channel of the neck varies; or cwd, fgd, mgd, feat_mse, feat_sl2
    # kd: {{share: 0.5, temperature: 2}} # a loss with settings of its own
  # teachers: [other.pt] # further teachers: the student sees the mean of their logits
  # teacher_flip: true  # and the mean of each image and its mirror image
  # teacher_imgsz: 640  # the teachers see larger images, a multiple of imgsz
  # class_map: {{car: vehicle, truck: vehicle}} # of a teacher with finetune: never, or a further one

export:
  conf: 0.25            # default confidence threshold of the runtime; the graph itself has none
  iou: 0.6              # IoU threshold of the NMS inside the graph
  # imgsz: [384, 640]   # height and width of the exported files; training stays square
  # batch: 4            # images of one call; or dynamic: true for any number
  # frame: [1080, 1920] # letterbox inside the graph: camera frame in, boxes in frame pixels out

quantize:
  flavours: [{flavours}]
  calibration_images: 128
  max_map_drop: 0.02    # a flavour that loses more mAP50-95 stays out of the bundle
  # float_layers: auto  # the worst 2 of INT8, then 4, 8, 16 until that holds; or a number, or names as [2.cv1]
  # weight_bits: 7      # for x86 CPUs without VNNI

qad:                    # where INT8 loses more than max_map_drop: training that rounds as the file does, without labels
  when: needed          # or always, never
  epochs: 8

build:
  targets: [sm86, sm89, sm120]

bench:
  latency_samples: 700  # 662 are the fewest that support a p99

study:                  # `edgestill study {file}` compares these ways, seed by seed, on the {split} split
  split: {split}           # test where there is one: val also chose the best epoch of the teacher
  seeds: 5              # trainings of each arm; more make the intervals narrower
  arms:                 # name: what it changes of `student` and `distill` above
    scratch:            # the baseline: labels alone, whatever the strategy above
      student: {{init: scratch, weights: null}}
      distill: {{strategy: offline, losses: {{}}, label_weight: 1, unlabelled: null}}
    inherit:            # labels alone, from slices of the teacher
      distill: {{strategy: offline, losses: {{}}, label_weight: 1, unlabelled: null}}
    scratch_soft:       # the losses above, from scratch
      student: {{init: scratch, weights: null}}
    soft: {{}}            # as above: slices and losses
"""


FINETUNED_DRAWS, TRAINED_DRAWS = 12_000, 20_000
"""Images, counted each time they are drawn, that a training needs at least: from a checkpoint that only learns other
classes, and else. With 205 images a student from scratch gained 6.8 points mAP50-95 between 6,000 and 12,000 draws, and
one that was distilled 4.1."""
FEWEST_EPOCHS, MOST_EPOCHS = 60, 300
USUAL_IMAGES = 250
"""Stands for the training images where nothing is known about them."""


def epochs_for(images: int, draws: int) -> int:
    """The epochs, in tens, in which `images` are drawn `draws` times together, within the limits."""
    return min(max(10 * math.ceil(draws / images / 10), FEWEST_EPOCHS), MOST_EPOCHS)


def recipe_text(
    *,
    file: str,
    name: str,
    data: str,
    weights: str | None,
    student: str,
    imgsz: int,
    images: int | None = None,
    split: Literal["val", "test"] = "test",
) -> str:
    """A commented recipe; `weights` None trains the teacher from scratch.

    Args:
        images: images of the train split, by which the epochs are chosen; None where they cannot be counted yet.
        split: images that judge a study.
    """
    quoted = {"data": _quote(data), "weights": "null" if weights is None else _quote(weights), "name": _quote(name)}
    flavours = ", ".join(QuantizeConfig().flavours)
    count = images or USUAL_IMAGES
    teacher_epochs, epochs = (
        epochs_for(count, draws) for draws in (FINETUNED_DRAWS if weights else TRAINED_DRAWS, TRAINED_DRAWS)
    )
    return TEMPLATE.format(
        file=file, student=student, imgsz=imgsz, flavours=flavours, split=split, teacher_epochs=teacher_epochs,
        teacher_reason=_reason(teacher_epochs, images), epochs=epochs, reason=_reason(epochs, images), **quoted,
    )  # fmt: skip


def _reason(epochs: int, images: int | None) -> str:
    """The comment beside a number of epochs."""
    if images is None:
        return f"suits {USUAL_IMAGES} training images; few need more, up to {MOST_EPOCHS}"
    return f"x {images} training images = {epochs * images} draws; few images need many epochs"


def _quote(text: str) -> str:
    """`text` as a YAML scalar on one line, quoted only if it must be."""
    style = None if text.isprintable() else '"'  # the one with escapes
    dumped = yaml.safe_dump(text, width=10_000, default_flow_style=True, default_style=style)
    return dumped.splitlines()[0].removesuffix("...").strip()
