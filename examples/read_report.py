"""Print a table of the files that a run measured: size, accuracy, latency, and the speed-up over the teacher.

python examples/read_report.py runs/recipe/report/report.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = ("file", "role", "precision", "MB", "mAP50-95", "p50 ms", "speed-up")


def p50_ms(model: dict[str, Any]) -> float | None:
    """The median from decoded frame to boxes; None if the file was not timed."""
    return model["latency"] and model["latency"]["end_to_end"]["p50"]


def cells(model: dict[str, Any], teacher_ms: float | None) -> list[str]:
    accuracy, ms = model["accuracy"], p50_ms(model)
    return [
        model["file"],
        model["role"],
        model["precision"],
        f"{model['bytes'] / 1e6:.1f}",
        f"{accuracy['map50_95']:.4f}" if accuracy else "-",
        f"{ms:.2f}" if ms else "-",
        f"{teacher_ms / ms:.2f}x" if ms and teacher_ms else "-",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="report.json of a run")
    report = json.loads(parser.parse_args(arguments).report.read_text(encoding="utf-8"))
    teacher_ms = next((p50_ms(model) for model in report["models"] if model["role"] == "teacher"), None)
    rows = [list(COLUMNS), *(cells(model, teacher_ms) for model in report["models"])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    main()
