"""Forward and backward of a batch as CUDA graphs: the host launches one graph in place of some thousand kernels.

A graph replays the same kernels on the same memory. So each kind of batch, by its shapes and by what is computed of it,
has a graph of its own, and a batch's tensors are copied to where the graph reads them. Targets are padded to few
different lengths. The optimiser and the average stay outside, with learning rates and momenta that are the host's: they
are a few dozen launches, which the host makes while the GPU still computes the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import EdgestillError, one_line

Work = Callable[[], Tensor]
Recorder = Callable[[Work], Work]
"""From work to something that repeats it on the same memory, and returns the same tensor."""


class Kind(NamedTuple):
    """Whatever makes a batch need a graph of its own."""

    images: torch.Size
    targets: int
    labelled: int | None
    measure: bool


class BatchGraphs:
    """Calls `work(images, targets, factors, labelled, measure)` -> (terms,) as a graph, once it has run for real.

    The first batch of a kind runs by itself: libraries choose their algorithms and allocate their memory then. With
    other `factors`, which are numbers inside of the kernels' arguments, all graphs are recorded anew.

    `recorder` makes what records the graphs that share memory.
    """

    def __init__(
        self, work: Callable[..., Tensor], device: torch.device, recorder: Callable[[], Recorder] | None = None
    ) -> None:
        self._work, self._device, self._new_recorder = work, device, recorder or CudaRecorder
        self._recorder = self._new_recorder()
        self._inputs: dict[Any, Tensor] = {}
        self._seen: set[Kind] = set()
        self._graphs: dict[Kind, Work] = {}
        self._factors: tuple[float, ...] = ()

    def __call__(
        self, images: Tensor, targets: Tensor, factors: tuple[float, ...], labelled: int | None, measure: bool
    ) -> Tensor:
        """The terms of one batch; its gradients are added to the pending ones."""
        kind = Kind(images.shape, len(targets), labelled, measure)
        given = self._in_place("images", images), self._in_place("targets", targets), factors, labelled, measure
        if kind not in self._seen:
            self._seen.add(kind)
            return self._work(*given)
        if factors != self._factors:
            self._graphs, self._factors, self._recorder = {}, factors, self._new_recorder()
        if kind not in self._graphs:
            self._graphs[kind] = self._recorder(lambda: self._work(*given))
        return self._graphs[kind]().clone()

    def _in_place(self, name: str, given: Tensor) -> Tensor:
        """A copy where graphs read tensors of this name and shape."""
        key = name, given.shape
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(given, device=self._device)
        return self._inputs[key].copy_(given, non_blocking=True)


class CudaRecorder:
    """Records CUDA graphs that share their memory, as they never run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Record `work`, which does not run. Raises EdgestillError when it does what a graph cannot hold."""
        graph = torch.cuda.CUDAGraph()
        try:
            # the loader's threads may allocate and copy meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise EdgestillError(
                f"the step cannot be recorded as a CUDA graph: {one_line(error)}", "Set cuda_graph=false"
            ) from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay
