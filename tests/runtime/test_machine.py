from __future__ import annotations

import json

import pytest

from runtime import machine
from runtime.card import Artifact


def plan(**changes):
    values = {
        "file": "a.plan",
        "sha256": "0" * 64,
        "bytes": 1,
        "precision": "fp16",
        "backend": "tensorrt",
        "targets": ("sm87",),
        "versions": {"tensorrt": "10.3.0", "platform": "linux-aarch64"},
    }
    return Artifact(**(values | changes))


def orin(**changes):
    gpu = {"name": "Jetson AGX Orin", "compute_capability": "8.7"}
    return {"packages": {"tensorrt": "10.3.0.26"}, "platform": "linux-aarch64", "gpus": [gpu]} | changes


def test_facts_are_json_and_say_nothing_of_host_or_user():
    found = machine.facts()
    assert json.loads(json.dumps(found)) == found
    assert {"cpu", "cores", "ram_bytes", "os", "python", "gpus", "packages", "providers"} <= set(found)
    assert found["packages"]["numpy"]
    assert not {"host", "hostname", "node", "user"} & set(found)


def test_an_inference_takes_a_thread_a_core_and_counts_hyper_threads_once(monkeypatch):
    siblings = {0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5", 6: ""}
    monkeypatch.setattr(machine, "usable_cpus", lambda: list(siblings))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(machine, "_read_text", lambda path: siblings[int(path.parts[-3].removeprefix("cpu"))])
    assert machine.compute_threads() == 3


@pytest.mark.parametrize(
    ("groups", "files", "quota", "cores"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0, 2),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5, 1),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 0.5, 1),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None, 8),
        ("0::/pod/app\n", {"cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000\n"}, 3.0, 3),
        (
            "5:memory:/\n4:cpu,cpuacct:/docker/abc\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            4.0,
            4,
        ),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None, 8),
        ("", {}, None, 8),
    ],
)
def test_a_containers_cpu_quota_counts_as_its_cores(monkeypatch, tmp_path, groups, files, quota, cores):
    (tmp_path / "cgroup").write_text(groups)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "CGROUPS_OF_PROCESS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "usable_cpus", lambda: list(range(8)))
    monkeypatch.setattr(machine, "SIBLINGS", str(tmp_path / "none{}"))
    assert machine.cpu_quota() == quota
    assert machine.usable_cores() == machine.compute_threads() == cores


def test_a_plan_on_the_machine_it_was_built_for_fits():
    assert machine.mismatches(plan(), orin()) == []
    assert machine.mismatches(plan(targets=()), orin(packages={"tensorrt": machine.UNKNOWN})) == []


@pytest.mark.parametrize(
    ("here", "both"),
    [
        ({"packages": {"tensorrt": "8.6.2"}}, ("10.3.0", "8.6.2")),
        ({"packages": {"tensorrt": "10.3.1"}}, ("10.3.0", "10.3.1")),
        ({"packages": {}}, ("tensorrt 10.3.0", "not installed")),
        ({"platform": "linux-x86_64"}, ("linux-aarch64", "linux-x86_64")),
        ({"gpus": [{"name": "RTX 3060", "compute_capability": "8.6"}]}, ("sm87", "sm86")),
        ({"gpus": []}, ("NVIDIA GPU", "none")),
    ],
)
def test_each_mismatch_names_both_values(here, both):
    (reason,) = machine.mismatches(plan(), orin(**here))
    assert all(value in reason for value in both)


def test_onnx_files_run_anywhere():
    assert machine.mismatches(plan(backend="onnx"), orin(gpus=[], packages={})) == []


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [("10.3.0", "10.3.0.26", True), ("10.3.0", "10.3.0", True), ("10.3.0", "10.3.1", False), ("10", "10.3.0", False)],
)
def test_versions_agree_as_far_as_both_are_given(left, right, same):
    assert machine.same_version(left, right) is same


def test_nvidia_smi_lines_become_gpus():
    text = "NVIDIA H200, 9.0, 570.1, 143771\nNVIDIA RTX, 8.6, 570.1, 12288\n\n"
    assert [gpu["compute_capability"] for gpu in machine.parse_gpus(text)] == ["9.0", "8.6"]
    assert machine.parse_gpus("No devices were found\n") == []


def test_a_jetsons_nvidia_smi_does_not_hide_what_its_board_tells(monkeypatch, tmp_path):
    board = tmp_path / "model"
    board.write_bytes(b"NVIDIA Orin Nano Developer Kit\0")
    monkeypatch.setattr(machine, "JETSON_MODEL", board)
    monkeypatch.setattr(machine.shutil, "which", lambda name: name)
    monkeypatch.setattr(machine, "_output", lambda command: "Orin (nvgpu), [N/A], 540.4.0, [N/A]\n")
    assert machine.gpus() == [{"name": "NVIDIA Orin Nano Developer Kit", "compute_capability": "8.7"}]


@pytest.mark.parametrize(
    ("board", "capability"),
    [
        ("NVIDIA Jetson Orin Nano Developer Kit", "8.7"),
        ("NVIDIA Jetson AGX Thor", "11.0"),
        ("NVIDIA Jetson Nano", "5.3"),
    ],
)
def test_a_jetson_is_known_by_its_board(board, capability):
    assert machine.jetson_gpu(board)[0]["compute_capability"] == capability


def test_other_boards_have_no_jetson_gpu():
    assert not any(machine.jetson_gpu(board) for board in ("Raspberry Pi 5", "FriendlyElec NanoPi", ""))
