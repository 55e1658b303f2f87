"""Detect on image files and write one JSON with the boxes of each, and with the files that cannot be read.

python examples/files_to_json.py --model runs/recipe/bundle images/val --out detections.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from runtime import Detector, EdgestillError
from runtime.files import write_json
from runtime.frames import FrameReader
from runtime.sources import find_sources


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="image files, folders or patterns")
    parser.add_argument("--model", required=True, help="bundle folder, .onnx file or engine")
    parser.add_argument("--out", default="detections.json", help="(default: detections.json)")
    parser.add_argument("--conf", type=float, help="least score (default: that of the model)")
    options = parser.parse_args(arguments)
    try:
        reader = FrameReader(find_sources(options.sources))
        with Detector.load(options.model, conf=options.conf) as detector:
            names = detector.card.names
            images = {frame.source: detector(frame.image).to_list(names) for frame in reader}
            write_json(options.out, {"model": detector.card.name, "images": images, "skipped": reader.failures})
    except EdgestillError as error:
        sys.exit(f"error: {error}")
    print(f"{options.out}: {sum(map(len, images.values()))} boxes in {len(images)} images")
    sys.exit(1 if reader.failures else 0)


if __name__ == "__main__":
    main()
