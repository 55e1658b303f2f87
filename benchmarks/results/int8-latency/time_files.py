"""Time files of a CPU against an FP32 file, in turns: `taskset -c 0 python time_files.py IMAGES FP32 FILE ...`.

Each file runs in the library that it is made for, on one thread, from decoded frame to final boxes. Prints for each the
ratio to FP32, the median of 20 rounds with its interval, and the least milliseconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bench import Entry, Plan, measure_files, numbered_images
from benchmarks.rows import time_text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("fp32", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    plan = Plan(numbered_images(options.images, most=8), samples=400, threads=1)
    for row in measure_files([Entry(file, plan) for file in (options.fp32, *options.files)]):
        print(f"{row['file']}: {time_text(row)}, {row['latency']['end_to_end']['min']:.1f} ms at least")


if __name__ == "__main__":
    main()
