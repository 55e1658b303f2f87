"""Time files of a CPU against an FP32 file, in turns: `taskset -c 0 python time_files.py IMAGES FP32 FILE ...`.

Each file runs in the library that it is made for, on one thread, from decoded frame to final boxes. Prints for each the
ratio of the medians of 20 rounds with its interval, and the least milliseconds of both.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.bench import Plan, compare_files, numbered_images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    options = parser.parse_args()
    plan = Plan(numbered_images(options.images, most=8), samples=400, threads=1)
    for file in options.files:
        found = compare_files(options.reference, file, plan)
        print(f"{file}: {found.ratio}; {found.other.min:.1f} of {found.reference.min:.1f} ms at least")


if __name__ == "__main__":
    main()
