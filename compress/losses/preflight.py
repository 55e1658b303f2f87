"""Preflight checks of a distillation, before the first epoch: every loss must have an effect, and the right one.

In: student, teacher, losses, one batch. Out: a list of checks, each with what was seen. Most failures of distillation
are silent: a loss that is zero, that has no gradient at the student, or that compares different things.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from compress.compute.resize import reduced
from compress.kernels.soft_head import completed
from compress.losses.distill import Context, DistillLoss, Outputs, reference_of
from compress.losses.gradients import LARGEST_SUM, limited, neck_gradients

_SHOWN = 3
LABELS = "detection"
"""The label loss among the terms."""
LARGEST_SHARE = 10.0
"""Times the label loss's gradient above which a loss with a fixed weight is told: 36 times cost 6 mAP. It is no error,
since one batch of an untrained network tells the factor only roughly."""
DROWNS = "may drown the labels"
SCALED = "shares are scaled down"


class Check(NamedTuple):
    """One finding: `detail` says what was seen and, if `ok` is False, the remedy."""

    name: str
    ok: bool
    detail: str
    warns: bool = False
    """Whether the user should read it although nothing failed."""


class Frozen(Protocol):
    """A teacher: its networks, and its outputs for float images (B, 3, S, S), which mean what `arch` says."""

    @property
    def arch(self) -> Any: ...
    @property
    def networks(self) -> Sequence[nn.Module]: ...
    def __call__(self, images: Tensor) -> Outputs: ...


class Batch(Protocol):
    """The fields of a batch that are read: images (B, 3, H, W), uint8 0..255 or float 0..1; targets (nt, 6); the number
    of images, the first ones, whose labels are known, None if those of all are.
    """

    @property
    def images(self) -> Tensor: ...
    @property
    def targets(self) -> Tensor: ...
    @property
    def labelled(self) -> int | None: ...


TaskLoss = Callable[[Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]


def preflight(
    student: Any,
    teacher: Frozen,
    losses: Mapping[str, DistillLoss],
    batch: Batch,
    *,
    task: TaskLoss | None = None,
    imgsz: int | None = None,
    label_weight: float = 1.0,
) -> list[Check]:
    """Examine a distillation on one batch. Changes neither network, nor the losses, nor any gradient.

    Args:
        student: network with `arch` (names, anchors in pixels, strides) and `forward_features(images)`.
        teacher: on the same device.
        losses: by name, made for these two networks.
        batch: a few labelled training images.
        task: the detection loss, to print its share of the gradient; None where no label is known.
        label_weight: the weight by which it is trained; shares of the other losses refer to it unweighted.
        imgsz: pixels of the student's images, where the teacher's are larger.
    """
    heads = [name for name, loss in losses.items() if loss.compares_heads]
    checks = [*_same_meaning(student.arch, teacher.arch, heads), _frozen(teacher.networks)]
    probe = copy.deepcopy(student).train()  # batch statistics and gradients of the real student stay as they are
    images = _as_input(batch.images, probe)
    with torch.enable_grad():
        outputs = Outputs(*probe.forward_features(reduced(images, imgsz or images.shape[-1])))
    with torch.no_grad():
        teacher_outputs = teacher(images)
    losses = {name: copy.deepcopy(loss) for name, loss in losses.items()}  # some count how often they were computed
    targets = batch.targets.to(images.device)
    context = Context(targets, labelled=batch.labelled)
    checks += [_gives_logits("student", outputs.raw), _gives_logits("teacher", teacher_outputs.raw)]
    terms = {name: loss(outputs, teacher_outputs, context).sum() for name, loss in losses.items()}
    whole = _whole(outputs, teacher_outputs) if heads else teacher_outputs
    for name, loss in losses.items():
        checks += [*_one_loss(name, loss, terms[name], probe), _vanishes(name, loss, whole, context)]
    if task is not None:
        total, _ = task(outputs.raw, targets)
        terms = {LABELS: total / len(images), **terms}
    return [*checks, *_shares(terms, losses, outputs.features, label_weight)]


def _whole(student: Outputs, teacher: Outputs) -> Outputs:
    """The teacher's outputs with the student's logits in place of those that it does not give."""
    return teacher._replace(raw=[completed(own, raw)[1] for own, raw in zip(student.raw, teacher.raw, strict=True)])


def _as_input(images: Tensor, network: nn.Module) -> Tensor:
    images = images.to(next(network.parameters()).device)
    return images.float() / 255 if images.dtype == torch.uint8 else images


def _one_loss(name: str, loss: DistillLoss, term: Tensor, student: nn.Module) -> list[Check]:
    checks = [_is_alive(name, term), _reaches(name, term, "the student", _trainable(student), at_least=1)]
    if adapters := _trainable(loss):
        checks.append(_reaches(name, term, "its adapters", adapters, at_least=len(adapters)))
    return checks


def _same_meaning(student: Any, teacher: Any, heads: Sequence[str]) -> list[Check]:
    """Names, anchors and strides of the two architectures; only strides matter if no head is compared."""
    facts = {
        "classes": (tuple(student.names), tuple(teacher.names), "fine-tune the teacher on the student's classes"),
        "anchors": (_rounded(student.anchors), _rounded(teacher.anchors), "set autoanchor: false for the student"),
        "strides": (tuple(student.strides), tuple(teacher.strides), "use networks with the same levels"),
    }
    return [_agreement(name, *fact, needed=name == "strides" or bool(heads)) for name, fact in facts.items()]


def _rounded(anchors: Any) -> tuple[tuple[float, float], ...]:
    """(width, height) of each anchor in pixels to 1/10: float16 files move them by less."""
    return tuple((round(w, 1), round(h, 1)) for w, h in torch.as_tensor(anchors).reshape(-1, 2).tolist())


def _agreement(name: str, student: tuple[Any, ...], teacher: tuple[Any, ...], remedy: str, *, needed: bool) -> Check:
    if student == teacher:
        return Check(f"{name} agree", True, f"{len(student)} {name}")
    places = [f"{i}: {s} / {t}" for i, (s, t) in enumerate(zip(student, teacher, strict=False)) if s != t]
    seen = f"student {len(student)}, teacher {len(teacher)}; differ at {', '.join(places[:_SHOWN]) or 'the end'}"
    return Check(f"{name} agree", not needed, f"{seen}; {remedy if needed else 'no loss compares them'}")


def _frozen(networks: Sequence[nn.Module]) -> Check:
    ok = not any(module.training for network in networks for module in network.modules())
    return Check("teacher is in eval mode", ok, "batch statistics stay as they are" if ok else "call teacher.eval()")


def _gives_logits(who: str, raw: Sequence[Tensor]) -> Check:
    """A trained head has negative objectness logits nearly everywhere; probabilities never are."""
    given = torch.cat([r[..., 4].detach().flatten() for r in raw])
    least, greatest = given[~given.isnan()].aminmax()
    ok = bool(least < 0 or greatest > 1)
    return Check(
        f"{who} gives logits",
        ok,
        f"objectness {least:.2f}..{greatest:.2f}" + ("" if ok else ": pass raw maps, before the sigmoid"),
    )


def _is_alive(name: str, term: Tensor) -> Check:
    value = float(term.detach())
    ok = 0 < value < float("inf")
    return Check(
        f"{name} is finite and not zero",
        ok,
        f"{value:.4g}" + ("" if ok else ": student and teacher may be one network, or a map overflows"),
    )


def _trainable(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _gradients(term: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    if not (tensors and term.requires_grad):
        return []
    found = torch.autograd.grad(term, tensors, retain_graph=True, allow_unused=True)
    return [gradient for gradient in found if gradient is not None]


def _reaches(name: str, term: Tensor, whom: str, parameters: list[Tensor], *, at_least: int) -> Check:
    gradients = _gradients(term, parameters)
    moved = sum(bool(gradient.any()) and bool(gradient.isfinite().all()) for gradient in gradients)
    detail = f"{moved} of {len(parameters)} tensors get a finite gradient"
    return Check(f"{name} reaches {whom}", moved >= at_least, detail)


def _vanishes(name: str, loss: DistillLoss, teacher_outputs: Outputs, context: Context) -> Check:
    value = float(loss.compare(teacher_outputs, teacher_outputs, context).detach().sum())
    return Check(f"{name} is zero if student equals teacher", value == 0, f"{value:.4g}")


def _shares(
    terms: Mapping[str, Tensor], losses: Mapping[str, DistillLoss], features: Sequence[Tensor], label_weight: float
) -> Iterator[Check]:
    """How the gradient at the neck is divided, whether a fixed weight drowns the labels, and whether shares are asked
    for that are too large together.

    A weight that follows the gradients gives its loss the share that is asked for, or as much of it as it may have.
    """
    norms, asked = neck_gradients(terms, features), {n: x.share for n, x in losses.items() if x.weight is None}
    shares = dict(zip(asked, limited([*asked.values()]), strict=True))
    labels = norms[LABELS if LABELS in norms else reference_of(losses)]
    fixed = {name: loss.weight for name, loss in losses.items() if loss.weight is not None}
    weights = {LABELS: label_weight, **fixed}
    weighted = {name: shares[name] * labels if name in shares else weights[name] * norm for name, norm in norms.items()}
    total = sum(weighted.values())
    ok = 0 < total < float("inf")
    parts = ", ".join(f"{name} {norm / total:.1%}" for name, norm in weighted.items()) if ok else f"norms {weighted}"
    if shares != asked:
        pairs = ", ".join(f"{name} {asked[name]:g} to {share:.3g}" for name, share in shares.items())
        yield Check(
            SCALED, True, f"{pairs}; together they may be {LARGEST_SUM:g} times the label loss's gradient", warns=True
        )
    for name in fixed if LABELS in terms else ():
        if weighted[name] > LARGEST_SHARE * labels:
            told = f"{weighted[name] / labels:.2g} times their gradient; {name}: auto avoids it"
            yield Check(f"{name} {DROWNS}", True, told, warns=True)
    yield Check("parts of the whole gradient at the neck", ok, parts)
