"""The README and the pages of docs/: every command block runs, and what they name is there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml

from compress.cli import cli
from compress.config import STRATEGIES, LossChoice, Recipe, Settings
from compress.flavours import FLAVOURS
from compress.losses.distill import LOSSES, check_losses
from runtime.__main__ import parser

REPOSITORY = Path(__file__).resolve().parent.parent
TEXTS = {
    path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8")
    for pattern in ("*.md", "docs/*.md", "examples/*.md", "benchmarks/**/*.md", "compress/**/*.md")
    for path in sorted(REPOSITORY.glob(pattern))
}
README = TEXTS["README.md"]
PAGES = ("README.md", *dict.fromkeys(re.findall(r"\]\((docs/[\w-]+\.md)[#)]", README)))
"""In the order in which a reader meets them: later pages go on with what the blocks of earlier ones have made."""
USERS_TEXTS = (*PAGES, "CHANGELOG.md")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
KEY = re.compile(r"\b(" + "|".join(Recipe.model_fields) + r")\.([a-z_]\w*)(?!\.?\w)")
SUFFIXES = ("html", "json", "md", "onnx", "png", "safetensors", "yaml")
"""Follow the name of a group where a file is meant: report.json."""
SHORT = (
    "--set teacher.epochs=1 --set distill.epochs=1 --set bench.latency_samples=11 --set quantize.calibration_images=4"
    " --set export.max_box_error=1 --set quantize.draws=1 --set quantize.float_layers=0"
)
SMALLER = {
    r"--imgsz 320": "--imgsz 64",
    r"--imgsz 384 640": "--imgsz 64 96",
    r"map50_95<0\.30": "map50_95<0",
    r"--epochs \d+": "--epochs 1",
    r"(edgestill run \S+)": rf"\1 {SHORT} --set quantize.max_map_drop=1",
    r"--seeds 5 --jobs 2": "--seeds 1 --arms scratch,soft --set distill.epochs=1",
    r"(edgestill export )": r"\1--set max_box_error=1 ",
    r"(edgestill bench )": r"\1--set latency_samples=11 ",
    r"(--quantize \S+)": r"\1 --epochs 1 --set quantize.calibration_images=4 --set quantize.float_layers=0"
    " --set quantize.draws=1 --set quantize.max_map_drop=1 --set export.max_box_error=1 --set bench.latency_samples=11",
    r"(edgestill quantize )": r"\1--set calibration_images=4 --set max_map_drop=1 --set draws=1 --set float_layers=0 ",
}
"""How a command that takes minutes becomes one that takes seconds; what it does stays.

One epoch on ten images may end in boxes of thousands of pixels, whose last bits are more than 0.05 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader: a data.yaml with images, and a checkpoint."""
    from compress.data.demo.generate import generate

    made = tmp_path_factory.mktemp("docs") / "job"
    generate(made, images=10, size=(96, 96), seed=1)
    shutil.copyfile(min((made / "images/val").iterdir()), made / "images/val/0.jpg")
    return made


def runnable(line: str, *, has_weights: bool) -> str:
    for pattern, smaller in SMALLER.items():
        line = re.sub(pattern, smaller, line)
    return (
        line
        if has_weights
        else line.replace("--weights yolov5n.pt", "").replace("train --data", "train --scale n --data")
    )


def run(command: list[str], cwd: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=500,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


def test_the_readme_leads_to_every_page() -> None:
    assert sorted(PAGES) == ["README.md", *(name for name in sorted(TEXTS) if name.startswith("docs/"))]


@pytest.mark.slow
def test_every_other_block_runs(folder: Path) -> None:
    weights = Path(os.environ.get("EDGESTILL_SHARED", REPOSITORY.parent / "shared")) / "yolov5/weights/yolov5n.pt"
    if weights.is_file():
        shutil.copyfile(weights, folder / "yolov5n.pt")
    for language, block in (found for page in PAGES for found in BLOCK.findall(TEXTS[page])):
        if language == "python":
            run([sys.executable, "-c", block], folder)
        for line in filter(None, block.splitlines()) if language == "bash" else ():
            if not line.startswith("make "):
                run(["bash", "-c", runnable(line, has_weights=weights.is_file())], folder)


def test_every_block_of_yaml_is_part_of_a_recipe() -> None:
    blocks = [block for page in PAGES for language, block in BLOCK.findall(TEXTS[page]) if language == "yaml"]
    assert blocks
    for block in blocks:
        recipe = Recipe.model_validate({"data": "data.yaml", **yaml.safe_load(block)})
        check_losses(recipe.distill)


# ---- names ----------------------------------------------------------------------------------------------------------


def options_of(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner
            yield from options_of(inner)


def options_of_the_device(capsys: pytest.CaptureFixture[str]) -> set[str]:
    for command in ("detect", "build", "info", "verify"):
        with pytest.raises(SystemExit):
            parser().parse_args([command, "--help"])
    return set(OPTION.findall(capsys.readouterr().out))


def test_every_option_that_is_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = {"--help", *options_of(cli), *options_of_the_device(capsys)}
    unknown = {(name, option) for name in USERS_TEXTS for option in OPTION.findall(TEXTS[name]) if option not in known}
    assert not unknown


def fields(settings: type[Settings]) -> Iterator[str]:
    for name, field in settings.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from fields(field.annotation)


def keys_of(group: str) -> Iterator[str]:
    kind = Recipe.model_fields[group].annotation
    return fields(kind) if isinstance(kind, type) and issubclass(kind, Settings) else iter(())


def test_every_setting_that_is_named_exists() -> None:
    named = {(name, *key) for name in USERS_TEXTS for code in CODE.findall(TEXTS[name]) for key in KEY.findall(code)}
    unknown = {(name, group, key) for name, group, key in named if key not in (*keys_of(group), *SUFFIXES)}
    assert named
    assert not unknown


def test_every_setting_that_is_shown_with_a_value_exists() -> None:
    own = (name for loss in LOSSES.values() for name in loss.Settings.model_fields)
    known = {*fields(Recipe), *LossChoice.model_fields, *LOSSES, *own}
    shown = {(name, key) for name in USERS_TEXTS for key in re.findall(r"`([a-z_]+): [^`]+`", TEXTS[name])}
    assert shown
    assert not {(name, key) for name, key in shown if key not in known}


def test_the_pages_name_every_loss_strategy_and_flavour() -> None:
    tables = {"docs/distillation.md": (*LOSSES, *STRATEGIES), "docs/int8.md": tuple(FLAVOURS)}
    assert not [(page, name) for page, names in tables.items() for name in names if f"`{name}`" not in TEXTS[page]]


# ---- links ----------------------------------------------------------------------------------------------------------


def anchors(text: str) -> set[str]:
    """The fragments by which the headings of a page are reached."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_leads_to_a_file_and_a_heading_of_it(name: str) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if "://" in link:
            continue
        path, _, fragment = link.partition("#")
        target = (REPOSITORY / name).parent / path if path else REPOSITORY / name
        assert target.exists(), link
        assert not fragment or fragment in anchors(target.read_text(encoding="utf-8")), link


def test_pictures_are_small() -> None:
    pictures = [(page, link) for page in PAGES for link in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", TEXTS[page])]
    assert pictures
    for page, link in pictures:
        assert ((REPOSITORY / page).parent / link).stat().st_size < 512 << 10
