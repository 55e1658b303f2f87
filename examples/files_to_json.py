"""Detect on image files and write one JSON with the boxes of each, and with the files that cannot be read.

python examples/files_to_json.py --model runs/recipe/bundle images/val --out detections.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from runtime import Detector, EdgestillError, InputError
from runtime.files import write_json
from runtime.image import read_image
from runtime.sources import expand


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="image files, folders or patterns")
    parser.add_argument("--model", required=True, help="bundle folder, .onnx file or engine")
    parser.add_argument("--out", default="detections.json", help="(default: detections.json)")
    parser.add_argument("--conf", type=float, help="least score (default: the model's own)")
    options = parser.parse_args(arguments)
    found: dict[str, list[dict[str, Any]]] = {}
    unreadable: dict[str, str] = {}
    try:
        with Detector.load(options.model, conf=options.conf) as detector:
            for path in (path for source in options.sources for path in expand(source)):
                try:
                    found[str(path)] = detector(read_image(path)).to_list(detector.card.names)
                except InputError as error:
                    unreadable[str(path)] = str(error)
            write_json(options.out, {"model": detector.card.name, "images": found, "unreadable": unreadable})
    except EdgestillError as error:
        sys.exit(f"error: {error}")
    boxes = sum(map(len, found.values()))
    print(f"{options.out}: {boxes} boxes in {len(found)} images, {len(unreadable)} files cannot be read")
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    main()
