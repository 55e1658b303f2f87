"""A file of another kind, or none, is refused by every command alike: exit code 1 and one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli import main
from compress.data import Dataset

COMMANDS = (
    "run FILE",
    "study FILE",
    "train --data FILE --scale p",
    "train --data DATA --weights FILE --device cpu --imgsz 64",
    "train --resume FILE",
    "distill --data DATA --teacher FILE --scale p --device cpu --imgsz 64",
    "val --data DATA --weights FILE",
    "export --weights FILE",
    "quantize --data DATA --model FILE",
    "build --model FILE",
    "bench --data DATA --model FILE",
    "report FILE",
    "detect IMAGE --model FILE",
    "detect FILE --model MODEL",
    "inspect FILE",
    "data check FILE",
    "data convert --coco FILE --images . --out converted",
)
KINDS = {
    "text.txt": b"nothing of use\n",
    "no suffix": b"\x00\x01\x02",
    "cut.safetensors": b"\x08\x00\x00\x00\x00\x00\x00\x00{",
    "page.onnx": b"<!DOCTYPE html><html></html>",
    "none.pt": None,
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_of_another_kind_is_refused_with_exit_code_1(
    command: str, kind: str, tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    if (content := KINDS[kind]) is not None:
        (tmp_path / kind).write_bytes(content)
    places = {"FILE": kind, "DATA": str(tiny_data.path), "IMAGE": "image.png", "MODEL": "model.onnx"}
    with pytest.raises(SystemExit) as caught:
        main([places.get(word, word) for word in command.split()])
    lines = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code == 1, lines
    assert lines[-1].startswith("edgestill: ")
    assert len(lines[-1]) < 400
    assert "Traceback" not in "".join(lines)
