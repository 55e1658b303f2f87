"""No file, however made, runs code, exhausts the machine, or ends in anything but one line."""

from __future__ import annotations

import io
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.models import load
from compress.models.pickle_reader import PickleError, read_pickle
from runtime.errors import InputError

CALLS = {
    "os system": "touch {}",
    "posix system": "touch {}",
    "nt system": "touch {}",
    "os popen": "touch {}",
    "subprocess Popen": "touch {}",
    "subprocess getoutput": "touch {}",
    "subprocess check_output": "touch {}",
    "commands getoutput": "touch {}",
    "pty spawn": "touch {}",
    "builtins eval": "open({!r}, 'w')",
    "builtins exec": "open({!r}, 'w')",
    "builtins compile": "open({!r}, 'w')",
    "builtins __import__": "{}",
    "builtins open": "{}",
    "builtins getattr": "{}",
    "__builtin__ eval": "open({!r}, 'w')",
    "__builtin__ apply": "{}",
    "runpy run_path": "{}",
    "runpy _run_code": "open({!r}, 'w')",
    "importlib import_module": "{}",
    "timeit timeit": "open({!r}, 'w')",
    "cProfile run": "open({!r}, 'w')",
    "profile run": "open({!r}, 'w')",
    "pdb run": "open({!r}, 'w')",
    "bdb Bdb": "{}",
    "trace Trace": "{}",
    "code interact": "{}",
    "codeop compile_command": "{}",
    "doctest debug_script": "open({!r}, 'w')",
    "idlelib.run Executive": "{}",
    "idlelib.pyshell ModifiedInterpreter.runcommand": "{}",
    "lib2to3.pgen2.grammar Grammar.loads": "{}",
    "pydoc pipepager": "{}",
    "pip main": "install {}",
    "ensurepip _run_pip": "{}",
    "venv create": "{}",
    "asyncio.unix_events _UnixSubprocessTransport._start": "{}",
    "multiprocessing.util spawnv_passfds": "{}",
    "ctypes CDLL": "{}",
    "_ctypes dlopen": "{}",
    "webbrowser open": "file://{}",
    "urllib.request urlretrieve": "{}",
    "socket create_connection": "{}",
    "smtplib SMTP": "{}",
    "shutil copyfile": "{}",
    "pickle loads": "{}",
    "_pickle loads": "{}",
    "marshal loads": "{}",
    "types CodeType": "{}",
    "types FunctionType": "{}",
    "functools partial": "{}",
    "functools reduce": "{}",
    "operator attrgetter": "{}",
    "operator methodcaller": "{}",
    "logging.config listen": "{}",
    "test.support.script_helper assert_python_ok": "{}",
    "numpy f2py": "{}",
    "numpy.f2py.crackfortran getlincoef": "{}",
    "numpy.testing._private.utils runstring": "{}",
    "numpy load": "{}",
    "numpy save": "{}",
    "torch load": "{}",
    "torch save": "{}",
    "torch.hub load": "{}",
    "torch.storage _load_from_bytes": "{}",
    "torch.serialization load": "{}",
    "torch._utils _import_dotted_name": "{}",
    "torch.jit load": "{}",
    "torch._inductor.codecache compile_file": "{}",
    "torch.utils._config_module ConfigModule.load_config": "{}",
    "torch.distributed.rpc.internal deserialize": "{}",
    "copyreg _reconstructor": "{}",
    "models": "{}",
    "sys setrecursionlimit": "{}",
    "compress.models.checkpoint load": "{}",
}
PLACES = {
    "as the object": lambda payload: payload,
    "as the model": lambda payload: b"}X\x05\x00\x00\x00model" + payload + b"s",
    "among the options": lambda payload: b"}X\x03\x00\x00\x00opt" + payload + b"s",
    "as a key": lambda payload: b"}" + payload + b"K\x01s",
}


def archive(path: Path, pickled: bytes, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        for name, content in members.items():
            file.writestr(f"archive/data/{name}", content)
    return path


def legacy(path: Path, pickled: bytes, keys: bytes = b"\x80\x02].", tail: bytes = b"") -> Path:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system]
    path.write_bytes(b"".join(pickle.dumps(part, 2) for part in parts) + pickled + keys + tail)
    return path


def call(name: str, argument: str) -> bytes:
    module, _, attribute = name.partition(" ")
    text = argument.encode()
    return f"c{module}\n{attribute or 'x'}\n".encode() + b"X" + struct.pack("<I", len(text)) + text + b"\x85R"


@contextmanager
def one_line(expected: type[Exception]) -> Iterator[None]:
    """Nothing but `expected` may leave the block, and that in one line."""
    try:
        yield
    except expected as error:
        if not str(error).isprintable():
            raise AssertionError(repr(error)) from error


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(path)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


@pytest.mark.parametrize("name", CALLS)
def test_a_payload_is_refused_and_never_runs(tmp_path, name):
    canary = tmp_path / "canary"
    module = name.split()[0]
    known = module in sys.modules
    payload = call(name, CALLS[name].format(str(canary)))
    for place in PLACES.values():
        pickled = b"\x80\x02" + place(payload) + b"."
        for path in (archive(tmp_path / "a.pt", pickled), legacy(tmp_path / "b.pt", pickled)):
            assert "it may be an attack" in refusal(path)
    assert not canary.exists()
    assert (module in sys.modules) == known


def test_a_real_reduce_payload_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'canary')!r}, 'w').close()",)

    for new in (True, False):
        torch.save({"model": Payload()}, tmp_path / "a.pt", _use_new_zipfile_serialization=new)
        assert "builtins.exec" in refusal(tmp_path / "a.pt") or "__builtin__.exec" in refusal(tmp_path / "a.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Payload()))
    assert "pickle outside of torch.save's containers" in refusal(tmp_path / "plain.pt")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [4, 5])
def test_names_from_the_stack_are_refused_too(tmp_path, protocol):
    class Payload:
        def __reduce__(self):
            return print, ("\x1b[31m\nno",)

    assert "builtins.print" in refusal(archive(tmp_path / "a.pt", pickle.dumps(Payload(), protocol)))


def test_a_name_with_control_characters_stays_on_one_line(tmp_path):
    evil = b"\x80\x04\x8c\x04a\n\x1b[\x8c\x03b\r\n\x93."
    assert "\\n\\x1b" in refusal(archive(tmp_path / "a.pt", evil))


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ"


def tensor(offset: bytes, shape: bytes, stride: bytes, count: bytes = b"K\x04") -> bytes:
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % count + offset + shape + stride + b"\x89}tR."


HUGE = b"\x8a\x08" + struct.pack("<q", 1 << 61)
LIES = {
    "a shape beyond the storage": tensor(b"K\x00", b"K\x05\x85", b"K\x01\x85"),
    "an offset beyond the storage": tensor(b"K\x04", b"K\x01\x85", b"K\x01\x85"),
    "a stride beyond the storage": tensor(b"K\x00", b"K\x02\x85", b"K\x04\x85"),
    "a shape that explodes by stride 0": tensor(b"K\x00", HUGE + b"\x85", b"K\x00\x85"),
    "sides whose product wraps around": tensor(b"K\x00", HUGE + HUGE + b"\x86", b"K\x00K\x00\x86"),
    "a negative offset": tensor(b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
    "a negative stride": tensor(b"K\x03", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "a negative side": tensor(b"K\x00", b"J\xff\xff\xff\xff\x85", b"K\x01\x85"),
    "a fractional side": tensor(b"K\x00", b"G@\x00\x00\x00\x00\x00\x00\x00\x85", b"K\x01\x85"),
    "a shape that is text": tensor(b"K\x00", b"X\x01\x00\x00\x004", b"K\x01\x85"),
    "fewer strides than sides": tensor(b"K\x00", b"K\x01K\x01\x86", b"K\x01\x85"),
    "too many dimensions": tensor(b"K\x00", b"(" + b"K\x01" * 40 + b"t", b"(" + b"K\x01" * 40 + b"t"),
    "a storage of 2^61 elements": tensor(b"K\x00", b"K\x01\x85", b"K\x01\x85", HUGE),
    "a storage of -1 elements": tensor(b"K\x00", b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"),
    "a storage of unknown type": tensor(b"K\x00", b"K\x01\x85", b"K\x01\x85").replace(b"FloatStorage", b"HalfFloat"),
    "no storage": b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(NK\x00))\x89}tR.",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_a_tensor_is_refused(lie):
    with pytest.raises(PickleError):
        read_pickle(LIES[lie])


def test_a_tensor_without_elements_and_a_scalar_are_no_lies():
    assert read_pickle(tensor(b"K\x00", b"K\x00\x85", b"K\x01\x85")).value.shape == (0,)
    assert read_pickle(tensor(b"K\x03", b")", b")")).value.span == (3, 4)


def _frame(*opcodes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(opcodes) + b"."


DOUBLED = b"]" + b"".join(b"q\x01]h\x01ah\x01a" for _ in range(60))
"""60 lists, each holding the one before twice: 2^60 values in 500 bytes."""
TUPLES = b")" + b"".join(b"q\x01h\x01\x86" for _ in range(60))
BOMBS = {
    "doubled lists": _frame(DOUBLED),
    "doubled lists as a shape": tensor(b"K\x00", DOUBLED + b"\x85", b"K\x01\x85"),
    "doubled tuples as a key": _frame(b"}", TUPLES, b"K\x01s"),
    "doubled tuples in a set": _frame(b"c__builtin__\nset\n]", TUPLES, b"a\x85R"),
    "doubled lists as a storage key": _frame(STORAGE.replace(b"X\x01\x00\x00\x000", DOUBLED) % b"K\x04"),
    "a million nested lists": _frame(b"]" * 1_000_000, b"a" * 999_999),
    "a memo index of 2^32": _frame(b"]r\xff\xff\xff\xff"),
    "a text of 4 GB": _frame(b"X\xff\xff\xff\xff"),
    "a long of 2 GB": _frame(b"\x8b\xff\xff\xff\x7f"),
    "more opcodes than the limit": _frame(b"N" * 3_500_000),
    "no end": b"\x80\x02]",
    "an empty stack": b"\x80\x02.",
    "a mark without items": _frame(b"t"),
    "a reduce of nothing": _frame(b"R"),
    "a reduce of a list": _frame(b"])R"),
    "text opcodes": b"I1\n.",
    "an extension": _frame(b"\x82\x01"),
    "an old instance": _frame(b"(ios\nsystem\n"),
    "a get of nothing": _frame(b"h\x07"),
    "attributes for a number": _frame(b"K\x01}b"),
    "a name without an end": _frame(b"c" + b"a" * 10_000),
    "bytes in rot13": _frame(b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R"),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_costs_little_and_ends_in_one_line(tmp_path, bomb):
    path = archive(tmp_path / "a.pt", BOMBS[bomb])
    tracemalloc.start()
    begin = time.process_time()
    refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - begin < 20
    assert peak < 400 << 20


def module(body: bytes) -> bytes:
    """A stub of class models.yolo.Model whose `_modules` are made by `body`."""
    return b"cmodels.yolo\nModel\n)\x81}X\x08\x00\x00\x00_modules" + body + b"sb"


def test_modules_that_hold_themselves_or_double_are_refused(tmp_path):
    itself = b"cmodels.yolo\nModel\n)\x81q\x05}X\x08\x00\x00\x00_modules}X\x05\x00\x00\x00modelh\x05ssb"
    assert "nested deeper" in refusal(archive(tmp_path / "a.pt", b"\x80\x02" + itself + b"."))
    doubled = module(b"}")
    for _ in range(25):
        doubled += b"q\x01" + module(b"}(X\x01\x00\x00\x00ah\x01X\x05\x00\x00\x00modelh\x01u")
    assert "more than" in refusal(archive(tmp_path / "b.pt", b"\x80\x02" + doubled + b"."))


def test_an_anchor_free_network_of_another_package_is_named(tmp_path):
    other = b"cultralytics.nn.tasks\nDetectionModel\n)\x81"
    assert "ultralytics package" in refusal(archive(tmp_path / "a.pt", b"\x80\x02" + other + b"."))


def _member(name: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, content)
    return buffer.getvalue()


def test_compressed_archives_are_refused_before_they_are_inflated(tmp_path):
    path = tmp_path / "a.pt"
    path.write_bytes(_member("archive/data.pkl", bytes(200 << 20), zipfile.ZIP_DEFLATED))
    tracemalloc.start()
    assert "compressed members" in refusal(path)
    assert tracemalloc.get_traced_memory()[1] < 10 << 20
    tracemalloc.stop()


def test_members_that_overlap_are_refused(tmp_path):
    whole = bytearray(_member("archive/data.pkl", b"\x80\x02N."))
    directory = whole.index(b"PK\x01\x02")
    whole[directory + 20 : directory + 28] = struct.pack("<II", 1 << 30, 1 << 30)
    (tmp_path / "a.pt").write_bytes(whole)
    assert "members larger than the file" in refusal(tmp_path / "a.pt")


@pytest.mark.filterwarnings("ignore")
def test_two_pickles_in_one_archive_are_refused(tmp_path):
    for second in ("archive/data.pkl", "other/data.pkl"):
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
            file.writestr("archive/data.pkl", b"\x80\x02N.")
            file.writestr(second, b"\x80\x02N.")
        assert "torch.save did not write it" in refusal(tmp_path / "a.pt")


NOT_CHECKPOINTS = {
    "is empty": b"",
    "web page": b"\n<!DOCTYPE html><html><head><title>404</title></head></html>",
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:4f18\nsize 4062133\n",
    "is an ONNX graph": b"\x08\x08\x12\x07pytorch\x1a\x052.1.0",
    "begins with de ad be ef": b"\xde\xad\xbe\xef" * 100,
    "truncated": b"PK\x03\x04" + bytes(1000),
    "is damaged": struct.pack("<Q", 50) + b'{"a": 1}' + bytes(100),
    "it ends in the middle": b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19\x2e",
}


@pytest.mark.parametrize("reason", NOT_CHECKPOINTS)
def test_a_file_of_another_kind_is_named(tmp_path, reason):
    (tmp_path / "yolov5n.pt").write_bytes(NOT_CHECKPOINTS[reason])
    assert reason in refusal(tmp_path / "yolov5n.pt")


def test_a_missing_file_and_a_folder_are_one_line(tmp_path):
    assert "No such file" in refusal(tmp_path / "none.pt")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize("kept", [20, 5_000, 915_353, -1, -300])
def test_a_truncated_checkpoint_is_refused(tmp_path, weights, kept):
    (tmp_path / "cut.pt").write_bytes(weights.read_bytes()[:kept])
    refusal(tmp_path / "cut.pt")


def test_a_legacy_file_cut_in_its_storages_is_refused(tmp_path):
    keys = b"\x80\x02]X\x01\x00\x00\x000a."
    pickled = tensor(b"K\x00", b"K\x04\x85", b"K\x01\x85")
    assert "truncated" in refusal(legacy(tmp_path / "a.pt", pickled, keys, struct.pack("<q", 4) + bytes(15)))
    assert "truncated" in refusal(legacy(tmp_path / "a.pt", pickled, keys, struct.pack("<q", 1 << 60) + bytes(16)))
    assert "does not suit" in refusal(legacy(tmp_path / "a.pt", pickled, keys, b"\x04"))
    assert "holds no" in refusal(legacy(tmp_path / "a.pt", pickled, keys, struct.pack("<q", 4) + bytes(16)))


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_data_or_a_refusal(data):
    for content in (data, b"\x80\x02" + data + b"."):
        with one_line(PickleError):
            read_pickle(content)


@pytest.fixture(scope="module")
def official(weights) -> bytes:
    with zipfile.ZipFile(weights) as file:
        return file.read("archive/data.pkl")


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_an_official_pickle_with_damage_is_loaded_or_refused(tmp_path_factory, weights, official, data):
    changed = bytearray(official)
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "a.pt"
    with zipfile.ZipFile(weights) as source, zipfile.ZipFile(path, "w") as goal:
        for info in source.infolist():
            goal.writestr(info.filename, bytes(changed) if info.filename.endswith("data.pkl") else source.read(info))
    with one_line(InputError):
        load(path)
    path.unlink()
