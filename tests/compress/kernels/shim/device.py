"""The `Device` of the tests: kernels run on the CPU through the host shim, on CPU tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from compress.kernels.device import Facts, Launch
from shim import host

H100 = Facts(capability=(9, 0), l2_bytes=50 << 20, shared_bytes=227 << 10)
A100 = Facts(capability=(8, 0), l2_bytes=40 << 20, shared_bytes=163 << 10)
ORIN = Facts(capability=(8, 7), l2_bytes=4 << 20, shared_bytes=163 << 10)


@dataclass
class ShimDevice:
    """A GPU's facts, a schedule's seed, and what was launched."""

    facts: Facts = H100
    seed: int = 0
    optimise: str = "-O2"
    texts: dict[str, str] = field(default_factory=dict)
    """Path from the kernels' folder -> text that replaces the file's: planted faults."""
    launches: list[tuple[str, host.Counters]] = field(default_factory=list)
    _tickets: Tensor = field(default_factory=lambda: torch.zeros(1 << 16, dtype=torch.int32))

    def launch(self, launch: Launch) -> None:
        source, shared, cluster = launch.source, launch.shared, launch.cluster
        assert launch.block % 32 == 0
        assert launch.grid % cluster == 0
        assert shared <= self.facts.shared_bytes
        assert cluster == 1 or self.facts.capability >= (9, 0)
        headers = {name: text for name, text in self.texts.items() if name.endswith(".cuh")}
        text = self.texts.get(f"{source.folder}/kernel.cu")
        library = host.build(source.path, source.defines, optimise=self.optimise, text=text, headers=headers)
        given = (launch.kernel, launch.grid, launch.block, bytes(launch.args))
        self.launches.append((launch.kernel, library.launch(*given, shared=shared, cluster=cluster, seed=self.seed)))
        assert not self._tickets.any(), f"{launch.kernel} left a ticket behind"

    def tickets(self, count: int) -> Tensor:
        assert count <= len(self._tickets)
        return self._tickets

    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of global memory read and written by all launches."""
        return sum(c.read for _, c in self.launches), sum(c.written for _, c in self.launches)
