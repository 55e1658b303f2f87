from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from compress.losses.detection import DetectionLoss, padded
from compress.losses.distill import LOSSES
from compress.losses.distill.features import box_density
from compress.training import graphs
from compress.training.graphs import BatchGraphs, CudaRecorder, Work
from runtime.errors import EdgestillError

from . import toys
from .toys import batch, config, network, trainer

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")


class Recorder:
    """In place of CUDA graphs: calls the work again. It counts what was recorded."""

    recorded = 0

    def __call__(self, work: Work) -> Work:
        self.recorded += 1
        return work


class Calls:
    """Work that keeps what it was given, and graphs of it."""

    def __init__(self) -> None:
        self.given: list[tuple[int, list[float]]] = []
        self.recorders: list[Recorder] = []
        self.graphs = BatchGraphs(self.work, CPU, self.recorder)

    def recorder(self) -> Recorder:
        self.recorders.append(Recorder())
        return self.recorders[-1]

    def work(self, images: Tensor, *_: object) -> Tensor:
        self.given.append((images.data_ptr(), images.flatten()[:2].tolist()))
        return images.sum()

    def __call__(
        self, value: float, *, images: int = 2, targets: int = 3, factor: float = 1.0, measure: bool = False
    ) -> None:
        self.graphs(torch.full((images, 3), value), torch.ones(targets, 6), (factor,), None, measure)

    @property
    def recorded(self) -> list[int]:
        return [recorder.recorded for recorder in self.recorders if recorder.recorded]


def test_a_kind_of_batch_runs_once_is_recorded_then_and_reads_every_batch_at_one_place() -> None:
    calls = Calls()
    for value in (1.0, 2.0, 3.0):
        calls(value)
    assert [numbers for _, numbers in calls.given] == [[value] * 2 for value in (1.0, 2.0, 3.0)]
    assert len({place for place, _ in calls.given}) == 1
    assert calls.recorded == [1]


@pytest.mark.parametrize("other", [{"images": 3}, {"targets": 65}, {"measure": True}])
def test_another_kind_of_batch_has_a_graph_of_its_own(other: dict[str, int]) -> None:
    calls = Calls()
    for _ in range(3):
        calls(1.0)
        calls(2.0, **other)  # type: ignore[arg-type]
    assert calls.recorded == [2]


def test_other_factors_are_recorded_anew_without_another_run_before() -> None:
    calls = Calls()
    for factor in (1.0, 1.0, 1.0, 0.5, 0.5):
        calls(1.0, factor=factor)
    assert calls.recorded == [1, 1]


def test_no_loss_sees_what_targets_are_padded_with() -> None:
    model, targets = network(), batch(0).targets
    filled = padded(targets)
    raw, features = model.forward_features(batch(0).images / 255)
    detection = DetectionLoss(model.detect.anchors, model.arch.strides, model.arch.nc)
    torch.testing.assert_close(detection(raw, filled), detection(raw, targets))
    assert all(torch.equal(box_density(x, filled), box_density(x, targets)) for x in features)


def test_a_training_by_graphs_ends_as_one_without(tmp_path: Path) -> None:
    ends = []
    for by_graphs in (False, True):
        settings = config(losses={"soft": "auto", "fgd": "auto"}, optimizer={"nominal_batch": 8})
        made, recorder = trainer(settings, tmp_path, distils=True), Recorder()
        made.graphs = BatchGraphs(made.add_gradients, CPU, lambda recorder=recorder: recorder) if by_graphs else None
        terms = [made.train_batch(batch(number), number) for number in range(6)]
        ends.append((terms, dict(made.objective.named_parameters()), made.ema.module.state_dict()))
    assert recorder.recorded == 2  # with and without a measurement of gradients
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-6)


class HostTraffic(TorchDispatchMode):
    """Operators that on a GPU would bring a number of the host to the device, or wait for one from there."""

    NAMES = ("lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        chooses = name == "index" and any(one is not None and one.dtype == torch.bool for one in args[1])
        if chooses or name in self.NAMES:
            self.found.append(name)
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if loss.replays])
def test_a_batch_with_any_loss_that_replays_needs_nothing_of_the_host(name: str, tmp_path: Path) -> None:
    made = trainer(config(losses={name: "auto"}), tmp_path, distils=True)
    given = batch(0).images, batch(0).targets, (1.0,), None, True
    made.add_gradients(*given)  # some tensors are made once
    with HostTraffic() as traffic:
        made.add_gradients(*given)
    assert traffic.found == []


def test_one_line_tells_why_graphs_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(toys, "quiet", told.append)
    made = trainer(config(cuda_graph=True), tmp_path)
    assert made.graphs is None
    assert told == ["cuda_graph is left out: the device is a CPU"]


def test_work_that_a_graph_cannot_hold_is_one_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    for name in ("graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(graphs.torch.cuda, name, lambda: None)
    monkeypatch.setattr(graphs.torch.cuda, "graph", refused)
    with pytest.raises(EdgestillError, match=r"as a CUDA graph: .*not permitted.*Set cuda_graph=false"):
        CudaRecorder()(lambda: torch.ones(1))
