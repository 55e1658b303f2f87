"""The `Device` of the tests: kernels run on the CPU through the host shim, on CPU tensors."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

import host
import torch
from torch import Tensor

from compress.kernels.device import Facts

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
    """File name -> text that replaces it: planted faults."""
    launches: list[tuple[str, host.Counters]] = field(default_factory=list)
    _tickets: Tensor = field(default_factory=lambda: torch.zeros(1 << 16, dtype=torch.int32))

    def launch(
        self,
        source: str,
        kernel: str,
        args: ctypes.Structure,
        *,
        grid: int,
        block: int,
        shared: int = 0,
        cluster: int = 1,
        defines: tuple[str, ...] = (),
    ) -> None:
        assert block % 32 == 0
        assert grid % cluster == 0
        assert shared <= self.facts.shared_bytes
        assert cluster == 1 or self.facts.capability >= (9, 0)
        headers = {name: text for name, text in self.texts.items() if name.endswith(".cuh")}
        path = host.KERNELS / source
        library = host.build(path, defines, optimise=self.optimise, text=self.texts.get(source), headers=headers)
        counters = library.launch(kernel, grid, block, bytes(args), shared=shared, cluster=cluster, seed=self.seed)
        self.launches.append((kernel, counters))
        assert not self._tickets.any(), f"{kernel} left a ticket behind"

    def tickets(self, count: int) -> Tensor:
        assert count <= len(self._tickets)
        return self._tickets

    def moved_bytes(self) -> tuple[int, int]:
        """Bytes of global memory read and written by all launches."""
        return sum(c.read for _, c in self.launches), sum(c.written for _, c in self.launches)
