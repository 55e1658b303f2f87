"""Batches that worker processes make. A process takes a second to start, so a test starts few."""

from __future__ import annotations

import gc
import logging
import math
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from compress.config import AugmentConfig
from compress.data import shared_array, train_loader
from compress.data.dataset import Sample
from compress.data.loader import Batch, as_tensor, epoch_tasks, train_batch
from compress.data.train_dataset import Task, TrainDataset, TrainItems
from compress.data.train_loader import SLOTS, ProcessLoader, ThreadLoader, open_loader, worker_count
from compress.data.worker import PIECE
from compress.data.worker_pool import WorkerPool, piece_size
from runtime.errors import EdgestillError
from tests.compress.data.conftest import PLAIN, assert_equal, mixed

CPU = torch.device("cpu")
HARD = AugmentConfig(mixup=0.5, degrees=10)
BATCH, EPOCHS, MOSAIC_EPOCHS = 4, 3, 2
LAST_S = 60.0
"""Seconds after which a process that should end is taken to go on for ever."""


def tasks_of(dataset: TrainItems, world: int = 1, rank: int = 0) -> Callable[[int], list[Task]]:
    return lambda epoch: epoch_tasks(dataset, epoch, batch=BATCH, rank=rank, world=world, mosaic=epoch < MOSAIC_EPOCHS)


def by_threads(dataset: TrainItems, epoch: int, **options: int) -> list[Batch]:
    return list(ThreadLoader(dataset, tasks_of(dataset, **options), 0).epoch(epoch))


def opened(dataset: TrainItems, workers: int = 1, epochs: int = EPOCHS, **options: int) -> ProcessLoader:
    return ProcessLoader(dataset, tasks_of(dataset, **options), epochs, batch=BATCH, workers=workers, device=CPU)


def processes(dataset: TrainItems, workers: int = 1, **options: Any) -> closing[ProcessLoader]:
    return closing(opened(dataset, workers, **options))


def children_of(loader: ProcessLoader) -> list[subprocess.Popen[bytes]]:
    return list(loader._pool._processes.values())


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_processes_makes_the_batches_of_threads(samples: tuple[Sample, ...], workers: int) -> None:
    with processes(TrainDataset(samples, 64, HARD), workers) as loader:
        for epoch in range(EPOCHS):
            expected = by_threads(TrainDataset(samples, 64, HARD), epoch)
            found = list(loader.epoch(epoch))
            assert_equal(found, expected)
            assert all(batch.images.is_contiguous(memory_format=torch.channels_last) for batch in found)


def test_what_is_labelled_and_what_a_rank_takes_are_the_same_by_processes(samples: tuple[Sample, ...]) -> None:
    with processes(mixed(samples, 6, HARD), world=3, rank=1) as loader:
        for epoch in range(2):
            expected = by_threads(mixed(samples, 6, HARD), epoch, world=3, rank=1)
            found = list(loader.epoch(epoch))
            assert [batch.labelled for batch in found] == [batch.labelled for batch in expected]
            assert_equal(found, expected)


def test_an_epoch_can_be_left_repeated_and_chosen(samples: tuple[Sample, ...]) -> None:
    with processes(TrainDataset(samples, 64, HARD)) as loader:
        left = loader.epoch(0)
        first = next(left)
        left.close()
        for epoch in (0, 0, 2, 1):
            found = list(loader.epoch(epoch))
            assert_equal(found, by_threads(TrainDataset(samples, 64, HARD), epoch))
        assert_equal([first], by_threads(TrainDataset(samples, 64, HARD), 0)[:1])
        assert list(loader.epoch(EPOCHS)) == []


class LateUpload:
    """A copy that arrives only when it is waited for, as one to a GPU may."""

    def __init__(self, sources: Sequence[torch.Tensor]) -> None:
        self._sources, self._copies = sources, [torch.empty_like(source) for source in sources]

    def wait(self) -> None:
        for copy, source in zip(self._copies, self._sources, strict=True):
            copy.copy_(source)

    def copies(self) -> list[torch.Tensor]:
        return self._copies


def test_no_batch_is_made_where_another_still_has_to_leave(
    samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with processes(TrainDataset(samples, 64, HARD)) as loader:
        monkeypatch.setattr(loader._uploader, "start", lambda *tensors: LateUpload(tensors))
        found = [list(loader.epoch(epoch)) for epoch in range(EPOCHS)]
    for epoch in range(EPOCHS):
        assert_equal(found[epoch], by_threads(TrainDataset(samples, 64, HARD), epoch))


def test_a_process_reads_the_images_that_another_decoded(samples: tuple[Sample, ...]) -> None:
    """The second works only when the files are gone."""
    count = len(samples)
    dataset, untouched = (TrainDataset(samples, 64, PLAIN, cache=True) for _ in range(2))
    tasks = [epoch_tasks(dataset, epoch, batch=count)[0] for epoch in (0, 1)]
    expected = [train_batch(untouched, task) for task in tasks]
    dataset.load(0)  # before there are processes
    with closing(WorkerPool(dataset, workers=2, batch=count, slots=1)) as pool:
        first, second = pool._processes.values()
        for working, stopped, task, batch in zip((first, second), (second, first), tasks, expected, strict=True):
            stopped.send_signal(signal.SIGSTOP)
            os.waitpid(stopped.pid, os.WUNTRACED)  # only now it takes no more work
            working.send_signal(signal.SIGCONT)
            pool.start(0, task)
            assert torch.equal(torch.from_numpy(pool.finish(0)), batch.targets)
            assert torch.equal(as_tensor(pool.images[0]), batch.images)
            for sample in samples:
                sample.image.unlink(missing_ok=True)
    assert_equal([train_batch(dataset, tasks[1])], expected[1:])
    assert not dataset.store.problems


def test_a_broken_image_is_reported_once_and_loses_its_labels(
    samples: tuple[Sample, ...], caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    samples[2].image.write_bytes(b"broken")
    dataset = TrainDataset(samples, 64, PLAIN)
    with caplog.at_level(logging.WARNING), processes(dataset, 2) as loader:
        batches = [*loader.epoch(0), *loader.epoch(1)]
    assert len([record for record in caplog.records if "02.png" in record.getMessage()]) == 1
    assert list(dataset.store.problems) == [2]
    assert capfd.readouterr().err == ""
    for batch in batches:
        for position, index in enumerate(batch.indices):
            assert (batch.targets[:, 0] == position).sum() == (0 if index == 2 else 2)


# -- ends -----------------------------------------------------------------------------------------


def test_a_killed_process_is_told_in_one_line(samples: tuple[Sample, ...]) -> None:
    with processes(TrainDataset(samples, 64, PLAIN), 2, epochs=1000) as loader:
        next(loader.epoch(0))
        killed, other = children_of(loader)
        killed.kill()
        with pytest.raises(EdgestillError, match=r"loads data has ended: signal 9 \(Killed\)\. Where memory is short"):
            all(list(loader.epoch(epoch)) for epoch in range(1000))
        assert other.returncode == -signal.SIGKILL


class Faulty(TrainDataset):
    def item(self, epoch: int, index: int, *, mosaic: bool = True) -> Any:
        raise ArithmeticError("a fault of the program")


def test_a_process_that_fails_says_why_and_its_status_is_told(
    samples: tuple[Sample, ...], capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(EdgestillError, match=r"exit code 1\. Its own message says why"),
        processes(Faulty(samples, 64, PLAIN)) as loader,
    ):
        list(loader.epoch(0))
    assert capfd.readouterr().err.rstrip().endswith("ArithmeticError: a fault of the program")


def test_a_loader_that_nobody_closes_ends_its_processes_with_itself(samples: tuple[Sample, ...]) -> None:
    loader = opened(TrainDataset(samples, 64, PLAIN))
    next(loader.epoch(0))
    children, files = children_of(loader), psutil.Process().num_fds()
    del loader
    gc.collect()
    assert [child.returncode for child in children] == [-signal.SIGKILL]
    assert psutil.Process().num_fds() < files


TRAINER = """
import signal, sys, torch
from pathlib import Path
from compress.config import AugmentConfig
from compress.data import index_dataset, load_data
from compress.data.loader import epoch_tasks
from compress.data.train_dataset import TrainDataset
from compress.data.train_loader import ProcessLoader

samples = index_dataset(load_data(Path(sys.argv[1])), ("train",)).splits["train"].samples
data = TrainDataset(samples, 64, AugmentConfig())
tasks = lambda epoch: epoch_tasks(data, epoch, batch=2)
loader = ProcessLoader(data, tasks, 10**9, batch=2, workers=2, device=torch.device("cpu"))
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may have it ignored
try:
    for epoch in range(10**9):
        for batch in loader.epoch(epoch):
            if epoch == 1:
                print(*(process.pid for process in loader._pool._processes.values()), flush=True)
except KeyboardInterrupt:
    sys.exit(130)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=lambda how: how.name)
def test_nothing_stays_of_a_training_that_is_killed_or_interrupted(dataset: Path, how: signal.Signals) -> None:
    """The script has no guard, as `multiprocessing` would want it; Ctrl-C reaches all of a terminal's processes."""
    command = [sys.executable, "-c", TRAINER, str(dataset)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as trainer:
        assert trainer.stdout
        assert trainer.stderr
        workers = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        maps = Path(f"/proc/{trainer.pid}/maps").read_text()
        os.killpg(trainer.pid, how)
        try:
            assert trainer.wait(LAST_S) == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how]
        finally:
            trainer.kill()
        assert trainer.stderr.read() == b""  # closed by the workers' ends
    assert len(workers) == 2
    assert "memfd:edgestill" in maps
    assert "/dev/shm" not in maps
    deadline = time.monotonic() + LAST_S
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_memory_and_files_stay_the_same_over_epochs(samples: tuple[Sample, ...]) -> None:
    """A batch has 1.2 MB: if each of 60 were kept, it would show."""

    def used(*processes: psutil.Process) -> tuple[int, int]:
        return sum(p.memory_info().rss for p in processes), sum(p.num_fds() for p in processes)

    with processes(TrainDataset(samples, 320, AugmentConfig()), epochs=23) as loader:
        own = psutil.Process(), psutil.Process(children_of(loader)[0].pid)
        for epoch in range(3):
            list(loader.epoch(epoch))
        before, files = used(*own)
        for epoch in range(3, 23):
            for _ in loader.epoch(epoch):
                pass
        after, files_after = used(*own)
    assert after - before < 10e6
    assert files_after == files


def test_a_worker_needs_no_torch() -> None:
    """Without it a process starts in a second and takes 65 MB."""
    code = "import sys, compress.data.worker; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- choices --------------------------------------------------------------------------------------


def test_beside_a_cpu_threads_load_the_data(samples: tuple[Sample, ...]) -> None:
    dataset = TrainDataset(samples, 64, HARD)
    for workers in (0, 2):
        loader = open_loader(
            dataset, batch=BATCH, epochs=EPOCHS, mosaic_epochs=MOSAIC_EPOCHS, workers=workers, device=CPU
        )
        assert isinstance(loader, ThreadLoader)
        for epoch in (1, 2):
            assert_equal(list(loader.epoch(epoch)), by_threads(dataset, epoch))
        loader.close()


def test_beside_a_gpu_processes_do_where_the_system_has_memory_to_share(
    samples: tuple[Sample, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(train_loader, "ProcessLoader", lambda *_, **options: asked.append(options))
    ask = partial(
        open_loader, TrainDataset(samples, 64, PLAIN), batch=7, epochs=1, mosaic_epochs=1, device=torch.device("cuda")
    )
    ask(workers=5, rank=1, world=2)
    assert asked == [{"batch": 4, "workers": 5, "device": torch.device("cuda")}]
    assert isinstance(ask(workers=0), ThreadLoader)
    monkeypatch.setattr(shared_array, "AVAILABLE", False)
    assert isinstance(ask(workers=5), ThreadLoader)


@pytest.mark.parametrize(
    ("device", "cores", "here", "expected"),
    [
        ("cpu", 8, 1, 1),
        ("cuda", 8, 1, 7),
        ("cuda", 1, 1, 1),
        ("cuda", 128, 1, 16),
        ("cuda", 16, 4, 3),
        ("cuda", 2, 4, 1),
    ],
)
def test_the_workers_are_those_that_the_cores_serve(
    device: str, cores: int, here: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.data.train_loader.usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert worker_count(None, torch.device(device)) == expected
    assert worker_count(0, torch.device(device)) == 0
    assert worker_count(5, torch.device(device)) == 5


def test_the_pieces_of_the_started_batches_fit_into_the_smallest_pipe() -> None:
    for batch in (1, 7, 32, 100, 5000):
        for workers in (1, 2, 15, 256):
            size = piece_size(batch, workers)
            assert 1 <= size <= batch
            assert SLOTS * math.ceil(batch / size) * PIECE.size <= mmap.PAGESIZE
