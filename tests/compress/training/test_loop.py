from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from compress.config import PRESETS, LossConfig, OptimizerConfig, TrainConfig
from compress.data.loader import Batch
from compress.models.checkpoint import load, load_model
from compress.training import loop
from compress.training.loop import Job, Trainer, run_job
from compress.training.objective import Objective, detection_loss
from compress.training.progress import Progress
from compress.training.resume import BEST
from compress.training.state import STATE, load_state
from compress.training.together import require_shares
from runtime.errors import EdgestillError, UnavailableError, UsageError

from .toys import batch, config, network, quiet, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def sums(model: torch.nn.Module, keys: Any) -> dict[str, list[float]]:
    """[sum, L2 norm] in float64, as the reference has them."""
    state = model.state_dict()
    return {key: [state[key].double().sum().item(), state[key].double().norm().item()] for key in keys}


def gradients(made: Trainer) -> list[torch.Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in made.objective.parameters()]


def weights(made: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in made.objective.parameters()]


@pytest.fixture
def official(weights: Path, tmp_path: Path) -> Trainer:
    """YOLOv5's optimiser without warm-up or accumulation, on the official yolov5n."""
    optimizer = PRESETS["yolov5-low"]["optimizer"] | {"warmup_epochs": 0, "nominal_batch": 0}
    settings = TrainConfig(
        epochs=10, batch=2, imgsz=640, optimizer=OptimizerConfig(**optimizer), loss=LossConfig(), tensorboard=False
    )
    model = load_model(weights).train().requires_grad_(True)
    six_images = cast(Any, [None] * 6)  # only their number matters
    job = Job(settings, Objective(model, detection_loss(model, settings)), six_images, (), tmp_path)
    return Trainer(job, "cpu", print)


def test_three_sgd_steps_with_ema_follow_the_reference(official: Trainer, reference: Path) -> None:
    arrays = np.load(reference / "train_reference.npz")
    expected = json.loads((reference / "train_reference.json").read_text())["sgd_3_steps"]
    images = Batch(torch.from_numpy(arrays["imgs_u8"]), torch.from_numpy(arrays["targets"]).float(), (0, 1))
    model = official.objective.model
    groups = [[len(g["params"]), g["weight_decay"], sum(p.numel() for p in g["params"])] for g in
              official.optimizer.param_groups]  # fmt: skip
    assert groups == [[count, decay, numel] for count, decay, _, _, _, numel in
                      expected["groups_count_wd_lr_mom_nesterov_numel"]]  # fmt: skip
    model.train()
    for number, step in enumerate(expected["steps"]):
        terms = official.train_batch(images, number)
        assert terms.tolist() == pytest.approx(step["items"], rel=2e-5)
        for found, wanted in ((model, step["params"]), (official.ema.module, step["ema"])):
            for key, pair in sums(found, wanted).items():
                assert pair == pytest.approx(wanted[key], rel=1e-5, abs=1e-4), key


# -- a batch --------------------------------------------------------------------------------------


def test_a_nominal_batch_of_four_batches_moves_weights_and_average_at_every_fourth(tmp_path: Path) -> None:
    made = trainer(config(optimizer={"nominal_batch": 16}), tmp_path)
    moved = []
    for number in range(9):
        before = weights(made)
        made.train_batch(batch(number), number)
        moved.append(not all(map(torch.equal, before, weights(made))))
    assert moved == [False, False, False, True] * 2 + [False]
    assert made.ema.updates == 2


def test_pending_gradients_are_the_sum_of_their_batches(tmp_path: Path) -> None:
    alone = []
    for number in range(2):
        made = trainer(config(optimizer={"nominal_batch": 16}), tmp_path)
        made.train_batch(batch(number), 0)
        alone.append(gradients(made))
    made = trainer(config(optimizer={"nominal_batch": 16}), tmp_path)
    for number in range(2):
        made.train_batch(batch(number), number)
    for together, *parts in zip(gradients(made), *alone, strict=True):
        assert together is not None
        torch.testing.assert_close(together, sum(parts), rtol=1e-5, atol=1e-6)


def test_a_step_leaves_no_gradient_behind(tmp_path: Path) -> None:
    made = trainer(config(), tmp_path)
    made.train_batch(batch(0), 0)
    assert all(gradient is None for gradient in gradients(made))


def test_gradients_are_clipped_to_the_norm_of_the_settings(tmp_path: Path) -> None:
    still = {"clip_norm": 0.01, "momentum": 0.5, "weight_decay": 0}
    made = trainer(config(optimizer=still), tmp_path)
    before = weights(made)
    made.train_batch(batch(0), 0)
    moved = torch.cat([(a - b).flatten() for a, b in zip(weights(made), before, strict=True)])
    nesterov = 1 + 0.5
    assert moved.norm().item() == pytest.approx(0.01 * nesterov * 0.01, rel=1e-3)  # rate, momentum, norm


def test_the_loss_terms_carry_no_graph(tmp_path: Path) -> None:
    assert not trainer(config(), tmp_path).train_batch(batch(0), 0).requires_grad


def test_teacher_and_student_see_the_same_images_once_a_batch(tmp_path: Path) -> None:
    made, seen = trainer(config(), tmp_path, distils=True), []
    teacher_outputs, student_outputs = made.teacher_outputs, made.objective.student_outputs
    made.teacher_outputs = lambda images: seen.append(images) or teacher_outputs(images)
    made.objective.student_outputs = lambda images: seen.append(images) or student_outputs(images)
    made.train_batch(batch(0), 0)
    assert len(seen) == 2
    assert seen[0] is seen[1]
    torch.testing.assert_close(seen[0], batch(0).images / 255)


def test_distillation_terms_shrink_with_the_epochs_and_detection_terms_do_not(tmp_path: Path) -> None:
    losses = {"feat_mse": {"weight": 1.0, "until": 0.5}}
    made = trainer(config(losses=losses, optimizer={"nominal_batch": 4000}), tmp_path, distils=True)
    first = made.train_batch(batch(0), 0)
    made.state.epoch = 1  # of 4: half of the way to the end of the loss
    half = made.train_batch(batch(0), 0)
    made.state.epoch = 2
    last = made.train_batch(batch(0), 0)
    assert made.objective.terms == ("box", "obj", "cls", "feat_mse")
    torch.testing.assert_close(half[3:], 0.5 * first[3:], rtol=1e-3, atol=0)
    assert float(last[3]) == 0.0
    torch.testing.assert_close(last[:3], first[:3], rtol=1e-3, atol=1e-6)


def test_a_distillation_without_the_teachers_outputs_is_an_error(tmp_path: Path) -> None:
    objective = trainer(config(), tmp_path, distils=True).objective
    with pytest.raises(ValueError, match="teacher's outputs"):
        objective(batch(0).images / 255, batch(0).targets)


# -- precision ------------------------------------------------------------------------------------


def test_bfloat16_computes_in_it_and_keeps_weights_and_gradients_in_float32(tmp_path: Path) -> None:
    terms, seen = {}, []
    for precision in ("float32", "bfloat16"):
        losses = {"losses": {"soft": 1.0}, "precision": precision}
        made = trainer(config(**losses, optimizer={"nominal_batch": 4000}), tmp_path, distils=True)
        made.objective.model.model[0].register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        terms[precision] = made.train_batch(batch(0), 3)
    assert seen == [torch.float32, torch.bfloat16]
    torch.testing.assert_close(terms["bfloat16"], terms["float32"], rtol=0.05, atol=1e-3)
    assert {tensor.dtype for tensor in (*weights(made), *gradients(made))} == {torch.float32}
    assert not made.skips


def test_losses_on_a_gpu_learn_what_gradient_they_will_get_without_a_scaler_too(tmp_path: Path) -> None:
    made = trainer(config(), tmp_path)
    assert made._upstream() is None
    made.device = torch.device("meta")  # any that is no CPU
    assert made._upstream().dtype == torch.float32


def test_float16_on_a_cpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="precision float16 is none in which this CPU computes"):
        trainer(config(precision="float16"), tmp_path)


@pytest.fixture
def scaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    """A training with a gradient scaler, which accelerate gives to GPUs only."""
    scaler, own = torch.amp.GradScaler("cpu", init_scale=1024.0), Accelerator
    made_accelerators = []

    def accelerator(*args: Any, **options: Any) -> Accelerator:
        made = own(*args, **options)
        made.scaler, made.native_amp, made.state._mixed_precision = scaler, True, "fp16"
        made_accelerators.append(made)
        return made

    monkeypatch.setattr("compress.training.together.Accelerator", accelerator)
    made = trainer(config(optimizer={"name": "adamw"}), tmp_path)
    assert isinstance(made.optimizer, AcceleratedOptimizer)
    assert made.optimizer.scaler is scaler
    return made


def test_a_batch_that_overflows_moves_no_weight_and_no_statistic(scaled: Trainer) -> None:
    scaled.train_batch(batch(0), 0)
    stem = scaled.objective.model.model[0]
    before = copy.deepcopy(scaled.objective.state_dict())
    moments = copy.deepcopy(scaled.optimizer.state_dict()["state"])
    overflow = stem.register_forward_pre_hook(lambda _, args: (args[0] * float("inf"),))
    assert not scaled.train_batch(batch(1), 1).isfinite().all()
    overflow.remove()
    torch.testing.assert_close(scaled.objective.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(scaled.optimizer.state_dict()["state"], moments, rtol=0, atol=0)
    assert scaled.accelerator.scaler.get_scale() == 512
    assert scaled.train_batch(batch(2), 2).isfinite().all()
    assert not torch.equal(stem.conv.weight, before["model.model.0.conv.weight"])


def test_an_epoch_tells_how_many_batches_overflowed(scaled: Trainer) -> None:
    told, inputs = [], iter([1.0, float("inf")])
    scaled.log = told.append
    scaled.objective.model.model[0].register_forward_pre_hook(lambda _, args: (args[0] * next(inputs),))
    record = scaled.train_epoch(Progress())
    assert told == ["epoch 1: 1 of 2 batches overflowed and were skipped"]
    assert record["train/box_loss"] > 0


# -- compiled networks ----------------------------------------------------------------------------


def test_compiled_networks_train_as_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as by torch.compile, and run by torch: machine code takes minutes. Gradients are
    measured in both batches, at features that lie between compiled sections.
    """
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = []
    for compiled in (False, True):
        made = trainer(config(compile=compiled, losses={"soft": "auto", "pkd": "auto"}), tmp_path, distils=True)
        made.wrapped.train()
        terms = [made.train_batch(batch(number), number) for number in range(2)]
        ends.append((terms, made.objective.weights.measured, weights(made), made.ema.module.state_dict()))
    torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-5)


def test_a_compiler_that_fails_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    job = trainer(config(compile=True), tmp_path).job
    with pytest.raises(EdgestillError, match=r"torch.compile failed: .*no C\+\+ compiler.*Set compile=false"):
        run_job(job, device="cpu", log=quiet)


# -- epochs ---------------------------------------------------------------------------------------


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Fitnesses that the next validations find."""
    found: list[float] = []

    def evaluate(*_: object, **__: object) -> SimpleNamespace:
        figures = SimpleNamespace(precision=0.5, recall=0.5, map50=0.5, map50_95=0.5)
        return SimpleNamespace(yolo=figures, loss=None, fitness=found.pop(0))

    monkeypatch.setattr(loop, "evaluate", evaluate)
    return found


def validated(made: Trainer) -> list[int]:
    """Epochs (from 1) of the history that have an accuracy."""
    return [int(record["epoch"]) + 1 for record in made.state.history if "metrics/mAP_0.5" in record]


def test_the_last_epoch_is_validated_whatever_the_interval(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.1, 0.2, 0.3]
    made = trainer(config(epochs=5, val_interval=2), tmp_path, images=4)
    made.run()
    assert validated(made) == [2, 4, 5]


def test_the_later_of_two_equal_epochs_is_the_best(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.2, 0.3, 0.3, 0.1]
    made = trainer(config(val_interval=1), tmp_path, images=4)
    result = made.run()
    assert (made.state.best_epoch, made.state.best_fitness) == (2, 0.3)
    assert result.metrics["epoch"] == 2


def test_patience_counts_epochs_without_a_better_fitness(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.1, 0.5, 0.4, 0.3, 0.2, 0.6]
    made = trainer(config(epochs=9, val_interval=1, patience=3), tmp_path, images=4)
    result = made.run()
    assert (result.epochs, made.state.best_epoch, made.finished) == (5, 1, True)
    assert (tmp_path / "curves.png").is_file()


def test_no_patience_never_stops_early(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.5, 0.4, 0.3, 0.2]
    assert trainer(config(val_interval=1, patience=0), tmp_path, images=4).run().epochs == 4


def test_the_state_is_written_at_its_interval_and_at_the_end(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.1]
    made, epochs = trainer(config(epochs=5, val_interval=9, checkpoint_interval=2), tmp_path, images=4), []
    made.log = lambda _: epochs.append(
        load_state(tmp_path / "state.pt")["train_state"]["epoch"] if (tmp_path / "state.pt").exists() else 0
    )
    made.run()
    assert epochs == [0, 2, 2, 4, 5, 5]  # after each epoch, and with the result


class Stop(BaseException):
    """Raised in place of a kill: nothing in the product catches it."""


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("killed_at", [STATE, BEST])
def test_the_best_weights_are_of_an_epoch_that_the_state_knows_wherever_it_was_killed(
    tmp_path: Path, judged: list[float], monkeypatch: pytest.MonkeyPatch, killed_at: str, interval: int
) -> None:
    """As on a GPU, where an epoch that is repeated does not come out the same."""
    settings = config(epochs=4, val_interval=1, checkpoint_interval=interval)
    made = trainer(settings, tmp_path, images=4)

    def killed_in_epoch_2(write: Any) -> Any:
        def write_or_stop(content: Any, path: Path, *more: Any) -> None:
            if path.name == killed_at and made.state.epoch == 2:
                raise Stop
            write(content, path, *more)

        return write_or_stop

    judged += [0.1, 0.9]
    with monkeypatch.context() as killing:
        for name in ("save_state", "save_model"):
            killing.setattr(loop, name, killed_in_epoch_2(getattr(loop, name)))
        with pytest.raises(Stop):
            made.run()
    judged[:] = [0.05] * 4
    resumed = run_job(
        trainer(settings, tmp_path, images=4).job, device="cpu", resume=load_state(tmp_path / STATE), log=quiet
    )
    assert resumed.metrics["epoch"] == (0 if killed_at == STATE else 1)
    assert load(resumed.best).meta["record"] == resumed.metrics


def test_a_batch_without_an_image_for_each_process_is_refused() -> None:
    require_shares(network(), config(batch=2), 8, processes=2)
    with pytest.raises(UsageError, match="a batch of 2 for 3 processes"):
        require_shares(network(), config(batch=2), 8, processes=3)


@pytest.mark.parametrize(
    ("images", "batch", "processes"), [(1, 4, 1), (9, 4, 1), (5, 1, 1), (8, 4, 4), (10, 4, 2), (7, 4, 2)]
)
def test_a_share_of_one_image_of_one_cell_is_refused_where_there_is_batch_norm(
    images: int, batch: int, processes: int
) -> None:
    small = config(batch=batch, imgsz=32)
    with pytest.raises(UsageError, match=r"too few for BatchNorm\. Set imgsz to 64 or more"):
        require_shares(network(), small, images, processes)
    require_shares(network().fuse(), small, images, processes)
    require_shares(network(), config(batch=batch, imgsz=64), images, processes)
    require_shares(network(), config(batch=4 * processes, imgsz=32), 10 * processes, processes)


def test_a_training_counts_the_processes_that_share_its_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = config(batch=4, imgsz=32)
    trainer(small, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match="1 image of one cell of 32 pixels"):
        trainer(small, tmp_path)


def test_mosaic_closes_before_the_end(tmp_path: Path) -> None:
    made = trainer(config(epochs=10), tmp_path, images=4)
    for epoch in (7, 8):
        made.state.epoch = epoch
        list(made.epoch_batches())
    assert made.job.train.mosaics == [True] * 4 + [False] * 4


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_closes_its_loader_however_it_ends(
    tmp_path: Path, judged: list[float], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    judged += [0.1]
    made, closed = trainer(config(epochs=1), tmp_path, images=4), []
    monkeypatch.setattr(made.loader, "close", lambda: closed.append(True))
    if fails:
        monkeypatch.setattr(made, "train_batch", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        made.run()
    assert closed == [True]


# -- compute threads ------------------------------------------------------------------------------


@pytest.fixture
def users_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """No user has set the number of threads, so it is measured."""
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.mark.usefixtures("users_silence")
def test_measuring_the_threads_leaves_the_training_as_it_is(tmp_path: Path) -> None:
    made = trainer(config(optimizer={"nominal_batch": 4000}), tmp_path, distils=True)
    made.train_batch(batch(0), 0)  # leaves its gradients pending
    before = copy.deepcopy(made.state_dict())
    made.choose_threads()
    after = made.state_dict()
    assert after["train_state"] == before["train_state"] | {"threads": torch.get_num_threads()}
    assert before["gradients"][0].any()
    for part in ("objective", "gradients", "ema"):
        torch.testing.assert_close(after[part], before[part], rtol=0, atol=0)
    assert torch.equal(after["random"]["torch"], before["random"]["torch"])


@pytest.mark.usefixtures("users_silence")
def test_the_number_of_threads_changes_between_epochs_and_is_saved_with_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judged: list[float]
) -> None:
    judged += [0.1]
    made, used, picks = trainer(config(epochs=3, val_interval=9), tmp_path, images=4), [], iter([2, 2, 1])
    monkeypatch.setattr(made.thread_choice, "best", lambda prepare, current: next(picks))
    made.objective.register_forward_pre_hook(lambda *_: used.append(torch.get_num_threads()))
    made.log = lambda line: used.append(line) if line.startswith("compute threads") else None
    made.run()
    first, second = (f"compute threads: {number}, measured to serve this network best now" for number in (2, 1))
    assert used == [first, 2, 2, second, 1]
    assert load_state(tmp_path / STATE)["train_state"]["threads"] == 1
    assert torch.get_num_threads() == 1  # as before the training


def test_the_users_threads_are_taken_without_a_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, expected in ((config(threads=2), 2), (config(), 1)):  # by OMP_NUM_THREADS, 1 in all tests
        made = trainer(settings, tmp_path)
        monkeypatch.setattr(made.thread_choice, "best", None)
        made.choose_threads()
        assert torch.get_num_threads() == made.state.threads == expected
        torch.set_num_threads(1)


# -- kill and resume ------------------------------------------------------------------------------


def test_the_state_holds_everything_that_the_next_batch_depends_on(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.1, 0.1]
    settings = config(epochs=9, val_interval=1, optimizer={"nominal_batch": 12, "warmup_epochs": 2})
    made = trainer(settings, tmp_path, images=12, distils=True)
    for _ in range(2):
        made.close_epoch(made.train_epoch(Progress()))
    other = trainer(settings, tmp_path, images=12, distils=True, seed=5)
    other.load_state_dict(load_state(tmp_path / STATE))
    assert other.state == made.state
    for number in range(6, 9):
        assert torch.equal(made.train_batch(batch(number), number), other.train_batch(batch(number), number))
    assert all(map(torch.equal, weights(made), weights(other)))
    averaged = other.ema.module.state_dict()
    assert all(torch.equal(value, averaged[key]) for key, value in made.ema.module.state_dict().items())


def test_the_time_of_a_resumed_training_is_that_of_its_parts(tmp_path: Path, judged: list[float]) -> None:
    judged += [0.1] * 4
    made = trainer(config(epochs=2, val_interval=1), tmp_path)
    made.close_epoch(made.train_epoch(Progress()))
    first = load_state(tmp_path / STATE)
    assert first["train_state"]["seconds"] == made.state.seconds > 0
    first["train_state"]["seconds"] = 1000.0  # as if the epoch had been slow
    resumed = run_job(trainer(config(epochs=2, val_interval=1), tmp_path).job, device="cpu", resume=first, log=quiet)
    assert 1000 < resumed.figures["seconds"] < 1100


def test_the_states_parts_have_these_names(tmp_path: Path) -> None:
    assert set(trainer(config(), tmp_path).state_dict()) == {
        "config", "origin", "architecture", "objective", "gradients", "ema", "ema_updates", "optimizer", "scaler",
        "random", "train_state",
    }  # fmt: skip


def test_a_full_gpu_is_one_line_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Trainer, "train_epoch", full)
    job = trainer(config(), tmp_path).job
    with pytest.raises(EdgestillError, match=r"batch 4 at 64 pixels do not fit.*Lower batch or imgsz"):
        run_job(job, device="cpu", log=quiet)
