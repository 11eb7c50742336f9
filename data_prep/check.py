"""Compare shards with their manifest, byte for byte: python data_prep/check.py data/imagenet [--decode]"""

from __future__ import annotations

import argparse
import os
import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.writer import check
from lzn_dist.terminal import command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="folder of the shards")
    parser.add_argument("--decode", action="store_true", help="decode every image too")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    options = parser.parse_args()
    try:
        problems = check(options.folder, decode=options.decode, processes=options.processes)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(problem)
    print(f"{options.folder}: {len(problems) or 'no'} problem{'s' if len(problems) != 1 else ''}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(command(main))
