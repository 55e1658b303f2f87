"""The TensorRT backend's logic, on a stand-in for a GPU whose memory is checked; the libraries need a real one."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from runtime.backends import LoadOptions, LoadRequest
from runtime.backends import cuda as cuda_module
from runtime.backends import tensorrt as backend_module
from runtime.backends.tensorrt import LoadedEngine, TensorRTBackend, collecting_logger, deserialize, errors_of
from runtime.errors import EngineError, InputError, UnavailableError, UsageError

PATH = Path("toy.plan")


class Memory:
    """Device memory as a table of pointers; uploads and downloads must match the allocation's size."""

    stream = 77

    def __init__(self):
        self.blocks, self.hosts, self.next, self.closed = {}, {}, 1000, False

    def allocate(self, nbytes):
        self.next += 1
        self.blocks[self.next] = np.zeros(nbytes, np.uint8)
        return self.next

    def free(self, pointer):
        del self.blocks[pointer]

    def pinned(self, nbytes):
        host = np.zeros(nbytes, np.uint8)
        self.hosts[host.ctypes.data] = host
        return host

    def free_pinned(self, host):
        del self.hosts[host.ctypes.data]

    def upload(self, pointer, host):
        assert host.flags.c_contiguous
        self.blocks[pointer][: host.nbytes] = host.view(np.uint8).ravel()

    def download(self, host, pointer):
        host.view(np.uint8).ravel()[:] = self.blocks[pointer][: host.nbytes]

    def synchronize(self):
        pass

    def close(self):
        assert self.blocks == {}
        assert self.hosts == {}
        self.closed = True


class Engine:
    """Outputs the input's mean brightness as [1, 2] and, unread, the input's first element."""

    def __init__(self, memory, *, dtype="UINT8", batch=1, out_shape=None, ok=True, inputs=("canvas",), cutoff=None):
        self.memory, self.out_shape, self.ok = memory, out_shape, ok
        self.tensors = dict.fromkeys(inputs, ("INPUT", dtype, (batch, 4, 4, 3)))
        self.tensors |= {"mean": ("OUTPUT", "FLOAT", (1, 2)), "first": ("OUTPUT", "HALF", (1,))}
        self.tensors |= {} if cutoff is None else {"cutoff": ("OUTPUT", "FLOAT", (1,))}
        self.cutoff = cutoff
        self.num_io_tensors = len(self.tensors)
        self.contexts = 0

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=self.tensors[name][1])

    def get_tensor_shape(self, name):
        return self.tensors[name][2]

    def create_execution_context(self):
        self.contexts += 1
        return Context(self)


class Context:
    def __init__(self, engine):
        self.engine, self.addresses, self.busy = engine, {}, False

    def set_input_shape(self, name, shape):
        wanted = self.engine.tensors[name][2]
        self.shape = shape
        return len(shape) == 4 and all(side in (-1, own) for side, own in zip(wanted, shape, strict=True))

    def get_tensor_shape(self, name):
        return self.engine.out_shape or self.engine.tensors[name][2]

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def execute_async_v3(self, stream):
        assert stream == Memory.stream
        assert set(self.addresses) == set(self.engine.tensors)
        assert not self.busy
        self.busy = True
        blocks = self.engine.memory.blocks
        pixels = blocks[self.addresses["canvas"]][: np.prod(self.shape)]
        blocks[self.addresses["mean"]][:] = np.full(2, pixels.mean(), np.float32).view(np.uint8)
        if "cutoff" in self.addresses:
            blocks[self.addresses["cutoff"]][:] = np.float32([self.engine.cutoff]).view(np.uint8)
        self.busy = False
        return self.engine.ok


TRT = SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="INPUT", OUTPUT="OUTPUT"))


def opened(**options):
    memory = Memory()
    engine = Engine(memory, **options)
    return TensorRTBackend(LoadedEngine(engine, None, None), TRT, memory, PATH, "TensorRT"), memory, engine


def canvas(value=10, batch=1):
    return np.full((batch, 4, 4, 3), value, np.uint8)


def test_input_and_output_come_from_the_engine():
    backend, _, _ = opened(batch=-1)
    assert (backend.input.name, backend.input.dtype, backend.input.shape) == ("canvas", np.uint8, (None, 4, 4, 3))
    assert (backend.output.name, backend.output.dtype, backend.output.shape) == ("mean", np.float32, (1, 2))


def test_an_array_goes_in_and_memory_of_the_callers_own_comes_out():
    backend, _, _ = opened()
    first, second = backend.run(canvas(10)), backend.run(canvas(20))
    assert (first.array.tolist(), second.array.tolist()) == ([[10, 10]], [[20, 20]])


def test_the_cutoff_is_read_where_the_engine_has_one():
    assert opened()[0].run(canvas()).cutoff is None
    assert opened(cutoff=0.5)[0].run(canvas()).cutoff.tolist() == [0.5]


def test_a_thousand_runs_use_one_context_and_the_same_memory():
    backend, memory, engine = opened()
    backend.run(canvas())
    blocks = set(memory.blocks)
    for _ in range(1000):
        backend.run(canvas())
    assert set(memory.blocks) == blocks
    assert engine.contexts == 1


def test_closing_frees_everything_and_may_be_repeated():
    backend, memory, _ = opened()
    backend.run(canvas())
    backend.close()
    backend.close()
    assert memory.closed
    with pytest.raises(UsageError, match="closed"):
        backend.run(canvas())


def test_batches_that_change_use_the_memory_of_the_largest():
    backend, memory, _ = opened(batch=-1)
    assert backend.run(canvas(1, batch=2)).array.tolist() == [[1, 1]]
    assert backend.run(canvas(8, batch=5)).array.tolist() == [[8, 8]]
    held = set(memory.blocks), set(memory.hosts)
    assert [len(blocks) for blocks in held] == [3, 2]
    for batch in (2, 5, 1, 5):
        assert backend.run(canvas(batch, batch=batch)).array.tolist() == [[batch, batch]]
    assert (set(memory.blocks), set(memory.hosts)) == held
    backend.close()
    assert memory.closed


def test_the_wrong_shape_or_type_is_refused():
    backend, _, _ = opened()
    with pytest.raises(InputError, match="shape"):
        backend.run(np.zeros((1, 9, 9, 3), np.uint8))
    with pytest.raises(TypeError):
        backend.run(canvas().astype(np.float32))


def test_an_output_whose_size_depends_on_the_data_is_refused():
    backend, _, _ = opened(out_shape=(-1, 6))
    with pytest.raises(InputError, match="depends on the data"):
        backend.run(canvas())


def test_an_engine_that_refuses_to_run_is_an_error():
    backend, _, _ = opened(ok=False)
    with pytest.raises(EngineError, match="refused to run"):
        backend.run(canvas())


def test_unknown_types_and_several_inputs_are_refused():
    with pytest.raises(InputError, match="FP8"):
        opened(dtype="FP8")
    with pytest.raises(InputError, match="2 inputs"):
        opened(inputs=("a", "b"))


def test_two_threads_get_their_own_answers():
    backend, _, _ = opened()
    wrong = []

    def work(value):
        for _ in range(200):
            if backend.run(canvas(value)).array.tolist() != [[value, value]]:
                wrong.append(value)

    threads = [threading.Thread(target=work, args=(value,)) for value in (3, 200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


class Severity(int):
    pass


class FakeLogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = map(Severity, range(5))


def fake_module(engine):
    def runtime(logger):
        def load(data):
            if engine is None:
                logger.log(FakeLogger.ERROR, "Version tag does not match")
            return engine

        return SimpleNamespace(deserialize_cuda_engine=load)

    return SimpleNamespace(__name__="tensorrt", __version__="10.3.0", ILogger=FakeLogger, Runtime=runtime)


def test_an_engine_that_comes_back_as_none_tells_tensorrts_reason():
    with pytest.raises(EngineError, match=r"tensorrt 10\.3\.0 cannot load it: Version tag does not match"):
        deserialize(fake_module(None), b"plan", PATH)


def test_host_code_inside_an_engine_stays_forbidden():
    loaded = deserialize(fake_module("engine"), b"plan", PATH)
    assert loaded.engine == "engine"
    assert loaded.runtime.engine_host_code_allowed is False


def test_the_logger_keeps_warnings_and_errors_only():
    logger = collecting_logger(fake_module(None))
    for severity in range(5):
        logger.log(Severity(severity), str(severity))
    assert [text for _, text in logger.lines] == ["0", "1", "2"]
    assert errors_of(logger) == ["0", "1"]


def test_the_real_logger_is_the_same():
    trt = pytest.importorskip("tensorrt_rtx")
    logger = collecting_logger(trt)
    logger.log(trt.ILogger.ERROR, "bad")
    logger.log(trt.ILogger.INFO, "chatter")
    assert errors_of(logger) == ["bad"]
    with pytest.raises(EngineError, match="tensorrt_rtx"):
        deserialize(trt, b"vtrt" + bytes(100), PATH)


def test_engines_want_a_gpu_and_checked_bytes():
    with pytest.raises(UsageError, match="GPU"):
        backend_module.load(LoadRequest("tensorrt", PATH, {PATH.name: b"plan"}, LoadOptions("cpu")))
    with pytest.raises(EngineError, match="hash"):
        backend_module.load(LoadRequest("tensorrt", PATH))


def test_a_missing_library_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UnavailableError, match="JetPack"):
        backend_module.import_tensorrt("tensorrt")
    monkeypatch.setattr(cuda_module, "PACKAGES", {"no_such_cuda.driver": cuda_module.PyCuda})
    with pytest.raises(UnavailableError, match="pip install cuda-bindings"):
        cuda_module.open_cuda()


class Runtime(ModuleType):
    """NVIDIA's cuda.bindings.runtime: each function returns (code, values...); `fail` names one that fails."""

    def __init__(self, fail=""):
        super().__init__("cuda.bindings.runtime")
        self.fail, self.calls, self.host = fail, [], {}
        self.cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)

    def __getattr__(self, name):
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *arguments: self.answer(name, *arguments)

    def answer(self, name, *arguments):
        if name == "cudaGetErrorString":
            return 0, b"out of memory"
        self.calls.append(name)
        if name == self.fail:
            return (2,)
        if name == "cudaMallocHost":
            block = np.zeros(arguments[0], np.uint8)
            self.host[block.ctypes.data] = block
            return 0, block.ctypes.data
        return (0, 4096) if name in ("cudaMalloc", "cudaStreamCreate") else (0,)


@pytest.fixture
def bindings(monkeypatch):
    def install(fail=""):
        module = Runtime(fail)
        monkeypatch.setattr(cuda_module, "_exists", lambda name: name == "cuda.bindings.runtime")
        monkeypatch.setattr(cuda_module, "import_module", lambda name: module)
        return module

    return install


def test_cuda_bindings_allocate_copy_and_give_everything_back(bindings):
    module = bindings()
    cuda = cuda_module.open_cuda()
    host = cuda.pinned(24)
    assert (host.shape, host.dtype, host.flags.writeable) == ((24,), np.uint8, True)
    pointer = cuda.allocate(host.nbytes)
    cuda.upload(pointer, host)
    cuda.download(host, pointer)
    cuda.synchronize()
    cuda.free(pointer)
    cuda.free_pinned(host)
    cuda.close()
    assert [call for call in module.calls if "Free" in call or "Destroy" in call] == [
        "cudaFree",
        "cudaFreeHost",
        "cudaStreamDestroy",
    ]


def test_cuda_error_codes_become_one_line(bindings):
    bindings("cudaMalloc")
    with pytest.raises(EngineError, match=r"cudaMalloc: out of memory \(2\)"):
        cuda_module.open_cuda().allocate(10)


def test_a_machine_without_a_driver_is_unavailable(bindings):
    bindings("cudaSetDevice")
    with pytest.raises(UnavailableError, match="nvidia-smi"):
        cuda_module.open_cuda()


class Driver(ModuleType):
    """pycuda.driver, with a context stack that must be empty between calls."""

    Error = type("Error", (Exception,), {})  # pycuda's own inherits from nothing nearer

    def __init__(self):
        super().__init__("pycuda.driver")
        self.stack, self.freed, self.detached = [], [], False
        context = SimpleNamespace(push=lambda: self.stack.append(1), detach=self._detach)
        self.Device = lambda index: SimpleNamespace(retain_primary_context=lambda: context)
        self.Context = SimpleNamespace(pop=self.stack.pop)

    def _detach(self):
        self.detached = True

    def init(self):
        pass

    def _inside(self):
        assert len(self.stack) == 1

    def Stream(self):
        self._inside()
        return SimpleNamespace(handle=5, synchronize=self._inside)

    def mem_alloc(self, nbytes):
        self._inside()
        if nbytes > 1000:
            raise self.Error("cuMemAlloc failed: out of memory")
        block = SimpleNamespace(free=self._inside)
        return type("Allocation", (), {"__int__": lambda _: 64, "free": lambda _: block.free()})()

    def pagelocked_empty(self, shape, dtype):
        """As pycuda: the base of the array is the allocation."""
        self._inside()
        host = np.empty(shape, dtype)

        def free():
            self._inside()
            self.freed.append(host.nbytes)

        return SimpleNamespace(base=SimpleNamespace(free=free), nbytes=host.nbytes, view=host.view)

    def memcpy_htod_async(self, pointer, host, stream):
        self._inside()

    memcpy_dtoh_async = memcpy_htod_async


def test_pycuda_enters_its_context_for_each_call_and_leaves_it(monkeypatch):
    """pycuda aborts the process at exit when a context is left on a thread's stack."""
    driver = Driver()
    monkeypatch.setattr(cuda_module, "_exists", lambda name: name == "pycuda.driver")
    monkeypatch.setattr(cuda_module, "import_module", lambda name: driver)
    cuda = cuda_module.open_cuda()
    host = cuda.pinned(8)
    pointer = cuda.allocate(host.nbytes)
    cuda.upload(pointer, host)
    cuda.download(host, pointer)
    cuda.synchronize()
    with pytest.raises(EngineError, match="out of memory"):
        cuda.allocate(10_000)
    assert driver.stack == []
    cuda.free(pointer)
    cuda.free_pinned(host)
    cuda.close()
    assert driver.freed == [8]
    assert driver.detached
    assert driver.stack == []


def test_pycuda_without_a_device_is_one_line(monkeypatch):
    def init():
        raise Driver.Error("cuInit failed: no CUDA-capable device is detected")

    driver = Driver()
    driver.init = init
    monkeypatch.setattr(cuda_module, "_exists", lambda name: name == "pycuda.driver")
    monkeypatch.setattr(cuda_module, "import_module", lambda name: driver)
    with pytest.raises(UnavailableError, match="no CUDA-capable device"):
        cuda_module.open_cuda()


def test_a_library_that_tensorrt_misses_is_one_line(monkeypatch):
    def load(name):
        raise OSError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(backend_module, "import_module", load)
    with pytest.raises(UnavailableError, match="libnvinfer"):
        backend_module.import_tensorrt("tensorrt")
