"""Detect on a camera or a video, print the rate, and open a camera again when it drops out.

python examples/camera_loop.py --model runs/recipe/bundle 0
python examples/camera_loop.py --model runs/recipe/bundle rtsp://camera.local/stream --retries 100
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence

from runtime import Detector, EdgestillError, InputError
from runtime.sources import Frame, frames


def reopened(source: str, retries: int, wait_s: float) -> Iterator[Frame]:
    """Frames of `source`. A camera or URL that stops is opened again, at most `retries` times without a frame between.

    Raises InputError when a file cannot be read, or a camera stays away.
    """
    live, left = source.isdecimal() or "://" in source, retries
    while True:
        try:
            for frame in frames([source]):
                left = retries
                yield frame
        except InputError:
            if not (live and left):
                raise
        if not (live and left):
            return
        print(f"{source}: no more frames, opened again in {wait_s} s, {left} attempts left", file=sys.stderr)
        left -= 1
        time.sleep(wait_s)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="camera number, URL or video file")
    parser.add_argument("--model", required=True, help="bundle folder, .onnx file or engine")
    parser.add_argument("--every", type=int, default=30, metavar="N", help="print each Nth frame (default: 30)")
    parser.add_argument("--retries", type=int, default=10, help="attempts to open a lost camera (default: 10)")
    parser.add_argument("--wait-s", type=float, default=1.0, help="seconds between attempts (default: 1)")
    options = parser.parse_args(arguments)
    try:
        with Detector.load(options.model) as detector:
            start = time.perf_counter()
            for count, frame in enumerate(reopened(options.source, options.retries, options.wait_s), start=1):
                detections = detector(frame.image)
                if count % options.every == 0:
                    now = time.perf_counter()
                    print(f"frame {count}: {len(detections)} objects, {options.every / (now - start):.1f} FPS")
                    start = now
    except EdgestillError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
