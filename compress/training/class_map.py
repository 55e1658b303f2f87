"""The meaning of a teacher's classes for the data: renamed, merged, left out, or unknown to the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.data.class_names import few
from compress.recipe import suggestion
from runtime.errors import UsageError

BOX_AND_OBJECT = 5
"""tx, ty, tw, th, objectness: they come before the classes."""
LEAST, LEAST_LOG = 1e-30, 1e-6
"""Least -log of a union's complement and of an objectness, so that their logits are finite."""


@dataclass(frozen=True)
class ClassMap:
    """For each class of the data the teacher's classes that it is; and those of its classes that the data lacks."""

    sources: tuple[tuple[int, ...], ...]
    dropped: tuple[int, ...]

    @property
    def unknown(self) -> tuple[int, ...]:
        """Classes of the data that the teacher cannot tell."""
        return tuple(index for index, sources in enumerate(self.sources) if not sources)

    @property
    def first(self) -> tuple[int | None, ...]:
        """For each class of the data the first of the teacher's classes that it is."""
        return tuple(sources[0] if sources else None for sources in self.sources)

    @property
    def is_identity(self) -> bool:
        return not self.dropped and self.sources == tuple((index,) for index in range(len(self.sources)))

    def __call__(self, raw: Tensor) -> Tensor:
        """Rows (..., 5 + teacher's classes) of box, objectness and class logits -> (..., 5 + data's classes).

        A class that several were merged into has the probability of their union, 1 - prod(1 - p), since each is a
        sigmoid of its own. An unknown class is NaN. The objectness is multiplied by the part of the best class
        probability that is the data's, m / (m + d), so that an object of a class that the data lacks is background.
        """
        if self.is_identity:
            return raw
        classes = raw[..., BOX_AND_OBJECT:].float()
        columns = [self._union(classes, sources) for sources in self.sources]
        objectness = raw[..., 4:5].float() if not self.dropped else self._without_dropped(raw[..., 4].float(), classes)
        return torch.cat((raw[..., :4].float(), objectness, torch.stack(columns, -1)), -1)

    def _union(self, classes: Tensor, sources: Sequence[int]) -> Tensor:
        if not sources:
            return torch.full_like(classes[..., 0], torch.nan)
        if len(sources) == 1:
            return classes[..., sources[0]]
        none_of_them = F.softplus(classes[..., list(sources)]).sum(-1).clamp_min(LEAST)  # -log prod(1 - p)
        return none_of_them + torch.log(-torch.expm1(-none_of_them))

    def _without_dropped(self, objectness: Tensor, classes: Tensor) -> Tensor:
        mapped = [index for sources in self.sources for index in sources]
        ours, others = (F.logsigmoid(classes[..., list(columns)].amax(-1)) for columns in (mapped, self.dropped))
        log_p = (F.logsigmoid(objectness) - F.softplus(others - ours)).clamp_max(-LEAST_LOG)
        return (log_p - torch.log(-torch.expm1(log_p)))[..., None]


def class_map_of(sources: Sequence[int | None]) -> ClassMap:
    """The map by which each class is one of the network's, or unknown to it; none of the network's is left out."""
    return ClassMap(tuple(() if source is None else (source,) for source in sources), ())


def map_classes(
    who: str, names: Sequence[str], data_names: Sequence[str], changes: Mapping[str, str | None]
) -> ClassMap:
    """The map of a teacher's classes `names`: by `changes`, else to the class of the same name, else left out.

    Raises UsageError when `changes` names a class that the data does not have, or no class is left.
    """
    for target in changes.values():
        if target is not None and target not in data_names:
            raise UsageError(f"class_map: the data has no class {target!r}", suggestion(target, data_names))
    sources: list[list[int]] = [[] for _ in data_names]
    dropped = []
    for index, name in enumerate(names):
        target = changes.get(name, name)
        if target in data_names:
            sources[data_names.index(target)].append(index)
        else:
            dropped.append(index)
    if not any(sources):
        raise UsageError(f"class_map leaves no class of {who} for the data", map_to_write(names, data_names))
    return ClassMap(tuple(map(tuple, sources)), tuple(dropped))


def require_known(changes: Mapping[str, str | None], several_names: Sequence[Sequence[str]]) -> None:
    """Raises UsageError when the map names a class that no teacher has."""
    known = tuple(dict.fromkeys(name for names in several_names for name in names))
    for name in changes:
        if name not in known:
            raise UsageError(f"class_map: no teacher has a class {name!r}", suggestion(name, known))


def map_to_write(names: Sequence[str], data_names: Sequence[str], key: str = "distill.class_map") -> str:
    """The hint that shows the map of these classes, the setting `key`: those of equal names need no entry, others
    become the data's class of the nearest spelling, or are left out.
    """
    free = {name.casefold(): name for name in data_names if name not in names}
    near = {name: get_close_matches(name.casefold(), free, n=1) for name in names if name not in data_names}
    found = sorted(near.items(), key=lambda one: not one[1])  # those that may be the data's first
    entries = few([f"{name}: {free[spelt[0]] if spelt else 'null'}" for name, spelt in found])
    return f"Fine-tune the teacher on this data, or map its classes to the data's: {key}: {{{entries}}}"
