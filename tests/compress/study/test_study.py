from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from compress import study
from compress.config import STRATEGIES, Recipe
from compress.data import Dataset
from compress.gain import training_of
from compress.models import Architecture, YOLOv5, save_model
from compress.pipeline import stage
from compress.processes import JOBS
from compress.recipe import load_recipe, recipe_text
from compress.store import Outcome, fingerprint
from compress.study import (
    _in_processes,
    _run_apart,
    _status_of,
    arm_recipe,
    check_arm,
    chosen_arms,
    count_in_folder,
    kept_runs,
    run_study,
    shared_by,
)
from compress.study.__main__ import share_frames
from compress.study.figures import Run
from compress.study.judge import measured_by
from runtime.errors import EdgestillError, InputError, UsageError
from runtime.files import write_json

ARMS = {
    "scratch": {"student": {"init": "scratch"}, "distill": {"losses": {}}},
    "soft": {"distill": {"optimizer": {"lr0": 0.001}}},
}


def recipe(data: Path, **changes: object) -> Recipe:
    short = {"epochs": 1, "batch": 4, "val_interval": 1, "workers": 0, "tensorboard": False}
    base = {
        "data": data, "imgsz": 64, "seed": 3, "device": "cpu", "study": {"arms": ARMS, "seeds": 2, "jobs": 2},
        "teacher": short, "distill": {**short, "optimizer": {"lrf": 0.5}},
    }  # fmt: skip
    return Recipe.model_validate(base | changes)


def test_an_arm_replaces_values_and_merges_groups() -> None:
    made = arm_recipe(recipe(Path("data.yaml")), "soft", 7)
    assert (made.distill.optimizer.lr0, made.distill.optimizer.lrf) == (0.001, 0.5)
    assert (made.distill.seed, made.teacher.seed) == (7, 3)
    assert list(made.distill.losses) == ["soft"]
    assert arm_recipe(recipe(Path("data.yaml")), "scratch", 7).distill.losses == {}


def test_an_arms_preset_takes_the_place_of_the_recipes_and_leaves_what_was_set_beside_it() -> None:
    optimizer = {"lr0": 0.02, "momentum": 0.5}
    arms = {"low": {}, "med": {"distill": {"preset": "yolov5-med"}}, "fine": {"distill": {"preset": "finetune"}}}
    made = recipe(Path("data.yaml"), distill={"preset": "yolov5-low", "optimizer": optimizer}, study={"arms": arms})
    low, med, fine = (arm_recipe(made, arm, 0).distill for arm in arms)
    assert [one.optimizer.name for one in (low, med, fine)] == ["sgd", "sgd", "adamw"]
    assert [one.augment.scale for one in (low, med, fine)] == [0.5, 0.9, 0.5]
    assert all((one.optimizer.lr0, one.optimizer.momentum) == (0.02, 0.5) for one in (low, med, fine))


def test_an_arms_strategy_brings_its_own_losses_and_label_weight() -> None:
    arms = {"base": {}, "joint": {"distill": {"strategy": "joint"}}, "features": {"distill": {"strategy": "features"}}}
    made = recipe(Path("data.yaml"), distill={"strategy": "soft_labels"}, study={"arms": arms})
    base, joint, features = (arm_recipe(made, arm, 0).distill for arm in arms)
    assert [one.label_weight for one in (base, joint, features)] == [0, 1, 1]
    assert ([*base.losses], [*joint.losses], [*features.losses]) == (["soft"], ["soft"], ["pkd"])


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ({"teacher": {"epochs": 3}}, "changes 'teacher'"),
        ({"distill": {"epoch": 3}}, "unknown key 'distill.epoch'. Did you mean 'epochs'"),
    ],
)
def test_an_arm_that_changes_what_all_share_or_nothing_known_is_refused(arm: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        arm_recipe(recipe(Path("data.yaml"), study={"arms": {"odd": arm}}), "odd", 0)


def test_arms_are_chosen_in_the_recipes_order() -> None:
    made = recipe(Path("data.yaml"))
    assert chosen_arms(made, []) == ["scratch", "soft"]
    assert chosen_arms(made, ["soft"]) == ["soft"]
    with pytest.raises(UsageError, match=r"unknown arm 'sof'\. The recipe has scratch, soft"):
        chosen_arms(made, ["sof"])
    with pytest.raises(UsageError, match="no arms"):
        chosen_arms(recipe(Path("data.yaml"), study={}), [])


@pytest.fixture
def three_splits(tiny_data: Dataset, tmp_path: Path) -> Path:
    """The tiny data set with its val images as test images too."""
    root = shutil.copytree(tiny_data.root, tmp_path / "data")
    with (root / "data.yaml").open("a") as file:
        file.write("test: images/val\n")
    return root / "data.yaml"


def test_without_the_split_that_judges_nothing_is_trained(tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no test split"):
        run_study(recipe(tiny_data.path), tmp_path / "out")
    assert not (tmp_path / "out/teacher").exists()


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ({"distill": {"strategy": "joint", "losses": {}}}, "strategy joint has no loss"),
        ({"distill": {"losses": {"sof": "auto"}}}, "loss 'sof' is not known"),
        ({"distill": {"imgsz": 65}}, "65"),
        ({"distill": {"class_map": {"car": "red"}}}, "class_map has nothing to map"),
        ({"student": {"weights": "none.pt"}}, "none.pt cannot be read"),
        ({"distill": {"patience": 5}}, "patience 5 may end its trainings before the last epoch"),
    ],
)
def test_before_the_teacher_every_arm_is_judged(
    arm: dict[str, object], says: str, three_splits: Path, tmp_path: Path
) -> None:
    with pytest.raises(EdgestillError, match=rf"^study\.arms\.odd: .*{says}"):
        run_study(recipe(three_splits, study={"arms": {**ARMS, "odd": arm}}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fact_of_the_study_is_one_that_all_arms_share() -> None:
    assert shared_by([3, 3]) == 3
    assert shared_by([3, 5, 3]) is None
    assert shared_by([None, None]) is None


def test_judging_images_among_the_unlabelled_ones_are_counted(tiny_data: Dataset) -> None:
    val = tiny_data.splits["val"]
    assert count_in_folder(val, tiny_data.root / "images/train") == 0
    assert count_in_folder(val, tiny_data.root / "images") == len(val.samples)
    assert count_in_folder(val, tiny_data.path) == 0


def test_without_a_label_in_the_split_that_judges_nothing_is_trained(three_splits: Path, tmp_path: Path) -> None:
    shutil.rmtree(three_splits.parent / "labels/val")
    with pytest.raises(InputError, match=r"test: no image has a label.*, or set study\.split"):
        run_study(recipe(three_splits), tmp_path / "out")
    assert not (tmp_path / "out/teacher").exists()


def test_the_teacher_is_measured_again_where_its_classes_mean_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(({"map50_95": 0.1, "map50": 0.2}, {"map50_95": 0.3, "map50": 0.4}))
    monkeypatch.setattr(study, "teacher_accuracy_of", lambda *_: next(found))
    teacher = Outcome("teacher", tmp_path, True, 0.0, {}, "f" * 64)
    judges = Dataset(tmp_path / "data.yaml", tmp_path, ("red",), (), {})
    maps = ({"car": "red"}, {"car": "red"}, {"bus": "red"})
    reached = [
        study._teacher_accuracy(recipe(Path("d.yaml"), distill={"class_map": one}), teacher, judges, tmp_path)["map50"]
        for one in maps
    ]
    assert reached == [0.2, 0.2, 0.4]


def test_an_arm_that_is_not_named_keeps_what_it_reached_if_it_would_be_trained_alike(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    made, run = recipe(tiny_data.path), Run("soft", 1, 0.5, 0.7, 0.1)
    for stage_name in ("data", "teacher"):
        (tmp_path / stage_name).mkdir()
        (tmp_path / stage_name / "file").write_text(stage_name)
    training = fingerprint(stage("distill").task(arm_recipe(made, "soft", 1), tmp_path))
    file = tmp_path / "runs/soft-1/result.json"
    write_json(file, {"of": measured_by(training, tiny_data), "found": run._asdict()})
    assert kept_runs(made, ["scratch", "soft"], tmp_path, tiny_data) == [run]
    assert kept_runs(made, ["scratch"], tmp_path, tiny_data) == []
    longer = {**made.distill.model_dump(exclude_unset=True), "epochs": 2}
    assert kept_runs(recipe(tiny_data.path, distill=longer), ["soft"], tmp_path, tiny_data) == []
    other = recipe(tiny_data.path, study={"arms": {"soft": {"distill": {"epoch": 1}}}, "seeds": 2})
    assert kept_runs(other, ["soft"], tmp_path, tiny_data) == []
    (tmp_path / "teacher/file").write_text("another")
    assert kept_runs(made, ["soft"], tmp_path, tiny_data) == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_arms_of_the_template_suit_every_strategy(strategy: str, three_splits: Path, tmp_path: Path) -> None:
    text = recipe_text(file="r.yaml", name="r", data=str(three_splits), weights=None, student="p", imgsz=64)
    file, images = tmp_path / "r.yaml", three_splits.parent / "images/val"
    file.write_text(text)
    losses = {"losses": dict.fromkeys(STRATEGIES[strategy].losses, "auto")}
    changes = {"strategy": strategy, "unlabelled": str(images), **losses}
    made = load_recipe(file, [f"distill.{key}={json.dumps(value)}" for key, value in changes.items()])
    for arm in made.study.arms:
        check_arm(made, arm, tmp_path / "out")
    baselines = [arm_recipe(made, arm, 0).distill for arm in ("scratch", "inherit")]
    assert all(one.uses_train_split and one.label_weight and not one.losses for one in baselines)


def test_the_arms_of_the_template_suit_a_student_with_weights_of_its_own(three_splits: Path, tmp_path: Path) -> None:
    weights, file = tmp_path / "n.safetensors", tmp_path / "r.yaml"
    save_model(YOLOv5(Architecture.of_scale("n", ("cat",))), weights)
    file.write_text(recipe_text(file="r.yaml", name="r", data=str(three_splits), weights=None, student="p", imgsz=64))
    made = load_recipe(file, [f"student.weights={weights}"])
    for arm in made.study.arms:
        check_arm(made, arm, tmp_path / "out")
    kept = {arm: arm_recipe(made, arm, 0).student.weights for arm in made.study.arms}
    assert kept == {"scratch": None, "inherit": weights, "scratch_soft": None, "soft": weights}


@pytest.mark.slow
def test_a_study_trains_each_arm_once_and_measures_it_on_the_test_split(three_splits: Path, tmp_path: Path) -> None:
    out, lines, arm = tmp_path / "out", [], arm_recipe(recipe(three_splits), "soft", 5)
    document = json.loads(run_study(recipe(three_splits), out, log=lines.append).read_text())
    assert [(run["arm"], run["seed"]) for run in document["runs"]] == [
        ("scratch", 0), ("soft", 0), ("scratch", 1), ("soft", 1),
    ]  # fmt: skip
    assert [(d["arm"], d["against"], d["pairs"]) for d in document["differences"]] == [("soft", "scratch", 2)]
    assert document["trainings"]["soft"] == training_of(arm.student, arm.distill)
    assert document["teacher"].keys() == {"fingerprint", "map50_95", "map50"}
    assert all(run["seconds_per_step"] > 0 for run in document["runs"])
    assert {path.name for path in out.iterdir()} >= {"study.json", "study.md", "study.png", "data", "teacher", "runs"}
    assert (out / "runs/soft-0/distill/inheritance.json").is_file()
    assert not (out / "runs/scratch-0/distill/inheritance.json").exists()

    weights = {path: path.stat().st_mtime_ns for path in out.glob("runs/soft-*/distill/last.safetensors")}
    shutil.rmtree(out / "runs/soft-1")  # as if it had been killed
    again = json.loads(run_study(recipe(three_splits), out, ["soft"], log=lines.append).read_text())
    same = [path for path, at in weights.items() if path.stat().st_mtime_ns == at]
    assert same == [out / "runs/soft-0/distill/last.safetensors"]
    figures = [run["map50_95"] for run in document["runs"]]
    assert [run["map50_95"] for run in again["runs"]] == figures

    files = sorted(out.glob("runs/soft-*/result.json"))
    results = [json.loads(file.read_text()) for file in files]
    weights = {path: path.stat().st_mtime_ns for path in weights}
    judged_by_val = recipe(three_splits, study={"arms": ARMS, "seeds": 2, "split": "val"})
    run_study(judged_by_val, out, ["soft"], log=lines.append)  # trains nothing
    assert {path: path.stat().st_mtime_ns for path in weights} == weights
    others = [json.loads(file.read_text()) for file in files]
    for one, other in zip(results, others, strict=True):
        assert one["of"]["training"] == other["of"]["training"]
        assert one["of"]["judges"] != other["of"]["judges"]


def test_runs_share_the_frames_of_a_video(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "two")]
    for run in runs:
        for number, content in enumerate((b"first", b"second", b"first")):
            file = run / f"unlabelled/digest/{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        (run / "unlabelled/digest/index.json").write_text("{}")
    for run in (*runs, *runs):
        share_frames(run, tmp_path / "frames")
    frames = {file.read_bytes(): file.stat() for file in (tmp_path / "frames").iterdir()}
    assert {content: found.st_nlink for content, found in frames.items()} == {b"first": 5, b"second": 3}
    for run in runs:
        files = sorted((run / "unlabelled/digest").iterdir())
        assert [file.name for file in files] == ["0.jpg", "1.jpg", "2.jpg", "index.json"]
        assert [file.read_bytes() for file in files[:3]] == [b"first", b"second", b"first"]
        assert all(file.stat().st_ino == frames[file.read_bytes()].st_ino for file in files[:3])


def test_a_process_is_stopped_when_its_time_is_up_even_if_it_does_not_listen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("compress.study.GRACE_S", 0.2)
    log = tmp_path / "log"
    assert _status_of(["sh", "-c", "echo a; exit 3"], log, None) == 3
    assert _status_of(["sh", "-c", "echo b"], log, 50) == 0
    assert _status_of(["sh", "-c", "trap '' TERM; echo c; exec sleep 600"], log, 2) is None
    assert _status_of(["sh", "-c", f"echo ${JOBS}"], log, None, jobs=3) == 0
    assert log.read_text().split() == ["a", "b", "c", "3"]


def test_no_run_is_begun_when_the_time_is_up(tmp_path: Path) -> None:
    made = recipe(tmp_path)
    assert _run_apart("soft", 0, made, out=tmp_path, until=time.monotonic(), wanted_fd=0, log=print) is None
    assert not list(tmp_path.iterdir())


def test_an_interrupted_study_ends_the_runs_that_it_has_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()

    def run(arm: str, _seed: int, _recipe: Recipe, *, out: Path, wanted_fd: int, **_: object) -> None:
        if arm == "interrupted":
            assert begun.wait(60)
            raise KeyboardInterrupt
        begun.set()
        assert _status_of(["sh", "-c", f"cat /dev/fd/{wanted_fd}; echo closed"], out / "log", None, [wanted_fd]) == 0

    monkeypatch.setattr(study, "_run_apart", run)
    with pytest.raises(KeyboardInterrupt):
        _in_processes([(arm, 0, recipe(tmp_path)) for arm in ("interrupted", "runs")], 2, tmp_path, None, print)
    assert (tmp_path / "log").read_text() == "closed\n"


KILLED = """
import sys
from pathlib import Path
from compress.config import Recipe
from compress.study import _in_processes

out = Path(sys.argv[1])
_in_processes([("arm", 0, Recipe(data=out / "data.yaml"))], 1, out, None, print)
"""


@pytest.mark.slow
def test_no_run_outlives_a_study_that_is_killed(tmp_path: Path) -> None:
    """The run waits for a lock that the test holds, so it never ends by itself."""
    work = tmp_path / "runs/arm-0/.work"
    work.mkdir(parents=True)
    with (work / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        killed = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
        try:
            while not (children := psutil.Process(killed.pid).children()):
                assert killed.poll() is None
                time.sleep(0.05)
        finally:
            killed.kill()
        killed.wait()
        _, still = psutil.wait_procs(children, timeout=300)
    assert not still


@pytest.mark.slow
def test_a_study_whose_time_is_up_is_written_with_what_is_done_and_goes_on(three_splits: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "out", []
    study = {"arms": ARMS, "jobs": 2}
    limited = recipe(three_splits, study={**study, "seeds": 3, "time_limit_s": 0.1})  # only the teacher is trained
    document = json.loads(run_study(limited, out, log=lines.append).read_text())
    assert lines[-1] == "6 of 6 runs are not done; run the study again to go on"
    assert (document["runs"], document["differences"], document["failed"], document["seeds"]) == ([], [], {}, 1)
    assert (out / "study.md").read_text().count("seed 0") == 1
    whole = recipe(three_splits, study={**study, "seeds": 1, "time_limit_s": 1e6})
    assert len(json.loads(run_study(whole, out, log=lines.append).read_text())["runs"]) == 2


@pytest.mark.slow
def test_a_run_that_fails_costs_the_others_nothing(three_splits: Path, tmp_path: Path) -> None:
    wild = {"distill": {"optimizer": {"name": "sgd", "lr0": 1e30, "clip_norm": 1e30}}}
    made = recipe(three_splits, study={"arms": {"scratch": ARMS["scratch"], "wild": wild}, "seeds": 1})
    with pytest.raises(EdgestillError, match="1 of 2 runs failed; wild-0: ") as caught:
        run_study(made, tmp_path / "out")
    assert "\n" not in str(caught.value)
    document = json.loads((tmp_path / "out/study.json").read_text())
    assert [run["arm"] for run in document["runs"]] == ["scratch"]
    assert list(document["failed"]) == ["wild-0"]
