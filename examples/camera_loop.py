"""Detect on a camera, print the rate, and connect again when the camera drops out.

python examples/camera_loop.py --model runs/recipe/bundle 0
python examples/camera_loop.py --model runs/recipe/bundle rtsp://camera.local/stream --reconnect 100
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from runtime import Detector, EdgestillError
from runtime.frames import FrameReader
from runtime.numbers import whole
from runtime.sources import find_sources


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="camera number, address of a stream, or video file")
    parser.add_argument("--model", required=True, help="bundle folder, .onnx file or engine")
    parser.add_argument("--latest", action="store_true", help="skip the frames that came while the detector was busy")
    parser.add_argument("--reconnect", type=int, default=0, metavar="N", help="attempts to reach a lost camera")
    parser.add_argument("--every", type=whole(1), default=30, metavar="N", help="print each Nth frame (default: 30)")
    options = parser.parse_args(arguments)
    try:
        sources = find_sources([options.source])
        reader = FrameReader(sources, latest=options.latest, reconnect=options.reconnect, log=log)
        with Detector.load(options.model) as detector:
            start = time.perf_counter()
            for count, frame in enumerate(reader, start=1):
                detections = detector(frame.image)
                if count % options.every == 0:
                    now = time.perf_counter()
                    print(f"frame {frame.number}: {len(detections)} objects, {options.every / (now - start):.1f} FPS")
                    start = now
    except EdgestillError as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if reader.failures else 0)


def log(line: str) -> None:
    """Keep standard output for the detections."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
