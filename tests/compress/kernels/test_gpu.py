"""The launcher against a driver that only takes notes; the real one is tested by tests/gpu/ on a GPU."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from compress.kernels import gpu as module
from compress.kernels.device import Launch
from compress.kernels.gpu import Gpu
from compress.kernels.toolchain import Source
from runtime.errors import EdgestillError, UnavailableError

CONTEXT, OTHER = 77, 88


ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9, "COMPUTE_CAPABILITY_MINOR": 0,
    "L2_CACHE_SIZE": 50 << 20, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN": 227 << 10,
}  # fmt: skip


class Driver:
    """Notes every call; `current` is the calling thread's context."""

    CUdevice_attribute = SimpleNamespace(**{f"CU_DEVICE_ATTRIBUTE_{name}": name for name in ATTRIBUTES})

    class CUfunction_attribute:
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = "shared"

    class CUlaunchAttributeID:
        CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION = "cluster"

    def __init__(self):
        self.current, self.calls, self.fails = CONTEXT, [], {}
        self.answers = {
            "cuDevicePrimaryCtxRetain": CONTEXT, "cuLibraryGetKernel": "kernel", "cuKernelGetFunction": "function",
            "cuLibraryLoadData": "library", "cuDeviceGet": 0,
        }  # fmt: skip

    def CUlaunchConfig(self):
        return SimpleNamespace()

    def CUlaunchAttribute(self):
        return SimpleNamespace(id=None, value=SimpleNamespace(clusterDim=SimpleNamespace()))

    def cuDeviceGetAttribute(self, name, device):
        return 0, ATTRIBUTES[name]

    def cuCtxGetCurrent(self):
        return 0, self.current

    def cuCtxPushCurrent(self, context):
        self.calls.append(("push", context))
        self.current = context
        return (0,)

    def cuCtxPopCurrent(self):
        self.calls.append(("pop",))
        self.current = OTHER
        return 0, CONTEXT

    def cuGetErrorString(self, code):
        return 0, b"invalid argument"

    def __getattr__(self, name):
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments):
            self.calls.append((name, *arguments))
            return (self.fails.get(name, 0), self.answers[name]) if name in self.answers else (self.fails.get(name, 0),)

        return call

    def named(self, name):
        return [call for call in self.calls if call[0] == name]


class Args(ctypes.Structure):
    _fields_ = (("value", ctypes.c_uint32),)


@pytest.fixture
def driver(monkeypatch):
    driver = Driver()
    monkeypatch.setattr(module, "load_driver", lambda: driver)
    monkeypatch.setattr(module.toolchain, "architecture_for", "sm_{0[0]}{0[1]}".format)
    monkeypatch.setattr(module.toolchain, "code_for", lambda source, target: f"{source.folder} {target}".encode())
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: SimpleNamespace(cuda_stream=5))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return driver


def test_what_planning_needs_is_asked_of_the_driver(driver):
    assert Gpu(0).facts == ((9, 0), 50 << 20, 227 << 10)


def test_a_kernel_is_compiled_for_the_gpu_and_launched_on_torchs_stream(driver):
    Gpu(0).launch(Launch(Source("cwd"), "cwd_f16", Args(7), grid=10, block=256, shared=64))
    assert [call[1] for call in driver.named("cuLibraryLoadData")] == [b"rescale sm_90", b"cwd sm_90"]
    (launch,) = driver.named("cuLaunchKernel")
    assert launch[1:10] == ("function", 10, 1, 1, 256, 1, 1, 64, 5)


def test_the_argument_struct_is_handed_over_by_address(driver):
    seen = []

    def launch(*arguments):
        array = (ctypes.c_void_p * 1).from_address(arguments[9])
        seen.append(Args.from_address(array[0]).value)
        return (0,)

    driver.cuLaunchKernel = launch
    Gpu(0).launch(Launch(Source("cwd"), "cwd_f16", Args(7), grid=1, block=32))
    assert seen == [7]


def test_a_source_is_loaded_once(driver):
    gpu = Gpu(0)
    for kernel in ("cwd_f16", "cwd_f32", "cwd_f16"):
        gpu.launch(Launch(Source("cwd"), kernel, Args(), grid=1, block=32))
    assert [call[1] for call in driver.named("cuLibraryLoadData")].count(b"cwd sm_90") == 1
    assert len(driver.named("cuKernelGetFunction")) == 2


def test_each_set_of_defines_is_a_library_of_its_own(driver):
    gpu = Gpu(0)
    for channels in (64, 128):
        gpu.launch(Launch(Source("adapter_mse", (f"C={channels}",)), "k", Args(), grid=1, block=32))
    assert [call[1] for call in driver.named("cuLibraryLoadData")].count(b"adapter_mse sm_90") == 2


def test_a_thread_without_a_context_gets_ours_for_the_launch(driver):
    """The backward pass runs on a thread of its own."""
    gpu = Gpu(0)
    driver.current = 0
    gpu.launch(Launch(Source("cwd"), "cwd_f16", Args(), grid=1, block=32))
    names = [call[0] for call in driver.calls]
    assert names.index("push") < names.index("cuLaunchKernel") < names.index("pop")


def test_a_failed_launch_leaves_the_context_as_it_was_and_says_what_failed(driver):
    gpu = Gpu(0)
    driver.current, driver.fails["cuLaunchKernel"] = OTHER, 1
    with pytest.raises(EdgestillError, match=r"CUDA cuLaunchKernel: invalid argument \(1\)"):
        gpu.launch(Launch(Source("cwd"), "cwd_f16", Args(), grid=1, block=32))
    assert driver.calls[-1] == ("pop",)


def test_shared_memory_and_clusters_are_asked_for(driver):
    Gpu(0).launch(Launch(Source("pkd"), "k", Args(), grid=32, block=512, shared=100 << 10, cluster=8))
    assert {call[2:] for call in driver.named("cuFuncSetAttribute")} == {("shared", 100 << 10)}
    ((_, config, function, _, _),) = driver.named("cuLaunchKernelEx")
    assert (config.gridDimX, config.blockDimX, config.sharedMemBytes, config.hStream) == (32, 512, 100 << 10, 5)
    assert config.attrs[0].value.clusterDim.x == 8
    assert function == "function"


def test_the_limit_of_shared_memory_is_raised_and_never_lowered(driver):
    gpu = Gpu(0)
    for kibibytes in (47, 100, 60, 100, 120):
        gpu.launch(Launch(Source("pkd"), "k", Args(), grid=32, block=512, shared=kibibytes << 10))
    assert [call[3] >> 10 for call in driver.named("cuFuncSetAttribute")] == [47, 100, 120]


@pytest.fixture
def zeros(monkeypatch):
    """Tickets on the CPU; the sizes that were asked for."""
    made, real = [], torch.zeros

    def on_cpu(size, dtype, device):
        made.append(size)
        return real(size, dtype=dtype)

    monkeypatch.setattr(torch, "zeros", on_cpu)
    return made


def on_stream(monkeypatch, number, *, capturing=False):
    stream = SimpleNamespace(cuda_stream=number, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)


def test_a_stream_keeps_its_tickets(driver, zeros, monkeypatch):
    gpu = Gpu(0)
    on_stream(monkeypatch, 5)
    first = gpu.tickets(3)
    assert gpu.tickets(3) is first
    on_stream(monkeypatch, 6)
    assert gpu.tickets(3) is not first


def test_each_call_in_a_graph_has_tickets_that_were_zero_before_the_capture(driver, zeros, monkeypatch):
    gpu = Gpu(0)
    on_stream(monkeypatch, 5)
    eager = gpu.tickets(3)
    made = len(zeros)
    on_stream(monkeypatch, 5, capturing=True)
    calls = [eager, *(gpu.tickets(count) for count in (3, 1000, 3, 1))]
    assert len(zeros) == made, "the graph would set them to zero in each replay"
    assert [len(tickets) for tickets in calls[1:]] == [3, 1000, 3, 1]
    for number, tickets in enumerate(calls):
        tickets.fill_(1 + number)
    assert all((tickets == 1 + number).all() for number, tickets in enumerate(calls)), "two calls share a ticket"


def test_a_slab_of_tickets_outlives_its_successor(driver, zeros, monkeypatch):
    """A graph that was captured long ago still counts in it."""
    gpu = Gpu(0)
    on_stream(monkeypatch, 5)
    gpu.tickets(1)
    on_stream(monkeypatch, 5, capturing=True)
    address = gpu.tickets(module.SLAB_TICKETS - 1).data_ptr()
    on_stream(monkeypatch, 5)
    gpu.tickets(1)
    on_stream(monkeypatch, 5, capturing=True)
    assert gpu.tickets(module.SLAB_TICKETS // 2).data_ptr() != address
    first, _ = gpu._slabs
    assert first.data_ptr() < address < first.data_ptr() + first.nbytes
    assert zeros.count(module.SLAB_TICKETS) == 2


def test_a_graph_makes_its_own_tickets_where_the_slab_has_too_few(driver, zeros, monkeypatch):
    gpu = Gpu(0)
    on_stream(monkeypatch, 5, capturing=True)
    assert len(gpu.tickets(3)) == 3
    assert zeros == [3]
    on_stream(monkeypatch, 5)
    gpu.tickets(1)
    on_stream(monkeypatch, 5, capturing=True)
    assert len(gpu.tickets(module.SLAB_TICKETS + 1)) == module.SLAB_TICKETS + 1


def test_a_gpu_that_the_driver_cannot_serve_shows_at_once(driver):
    driver.fails["cuLibraryLoadData"] = 209
    with pytest.raises(EdgestillError, match="cuLibraryLoadData"):
        Gpu(0)


def test_without_the_bindings_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(UnavailableError, match=r"cuda-bindings is not here.*edgestill\[kernels\]"):
        module.load_driver()


def test_without_the_drivers_library_one_line_says_so(monkeypatch):
    bindings = pytest.importorskip("cuda.bindings")

    def open_library():
        raise RuntimeError("Failed to dlopen libcuda.so.1:\nno such file")

    monkeypatch.setattr(bindings, "driver", SimpleNamespace(cuDriverGetVersion=open_library), raising=False)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", bindings.driver)
    with pytest.raises(UnavailableError, match="the NVIDIA driver is not here: Failed to dlopen") as caught:
        module.load_driver()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [AssertionError("Torch not compiled with CUDA enabled"), RuntimeError("No GPUs")])
def test_a_torch_that_sees_no_gpu_is_told_in_one_line(driver, monkeypatch, error):
    def init():
        raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    with pytest.raises(UnavailableError, match=f"torch has no GPU here: {error}"):
        Gpu(0)


LAUNCHES = """
from types import SimpleNamespace
import torch
from compress.kernels import gpu
from compress.kernels.losses import FUSED
from shim.cases import arguments

class Noting(gpu.Gpu):
    def launch(self, launch):
        print("asked", launch.kernel, launch.grid, launch.block, launch.shared, launch.cluster, 5, flush=True)
        super().launch(launch)

    def _zeros(self, count):
        return torch.zeros(count, dtype=torch.int32)

gpu.toolchain.architecture_for = lambda capability: "sm_90"
gpu.toolchain.code_for = lambda source, architecture: b"machine code"
torch.cuda.init = lambda: None
torch.cuda.current_stream = lambda index: SimpleNamespace(cuda_stream=5, synchronize=lambda: None)
torch.cuda.is_current_stream_capturing = lambda: False
device = Noting(0)
print(*device.facts, flush=True)
for name in FUSED:
    for layout in ("nchw", "channels_last"):
        FUSED[name].run(device, arguments(name, torch.float16, layout=layout, scale=8.0))
FUSED["pkd"].run(device, arguments("pkd", shapes=[(5, 2, 160, 160)], scale=8.0))
"""


def test_the_real_bindings_hand_every_launch_to_the_driver_as_it_was_asked_for(tmp_path):
    """NVIDIA's bindings with a driver that only prints, in a process of its own, since they look for it once."""
    pytest.importorskip("cuda.bindings")
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    source, library = Path(__file__).with_name("stub_driver.c"), tmp_path / "libcuda.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    here = {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", LAUNCHES], env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts, *lines = done.stdout.splitlines()
    assert facts == f"(9, 0) {50 << 20} {227 << 10}"
    asked = [line.removeprefix("asked ") for line in lines[::2]]
    assert asked == [line.removeprefix("launched ") for line in lines[1::2]]
    assert {"cwd_rows_f16", "pkd_gradient_last_f16", "adapter_sums"} <= {line.split()[0] for line in asked}
    assert asked[-1].startswith("pkd_cluster_f32")
    assert asked[-1].endswith(" 8 5"), "a cluster of 8 blocks, on torch's stream"
