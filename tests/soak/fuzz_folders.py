"""Many random folders and tars, prepared and read: samples written + left out by reason = files seen, no traceback.

python -m tests.soak.fuzz_folders [--count N] [--seed S]
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from tests.helpers.messy import check_folder, check_tar


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="folders, and tars (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first (default: 0)")
    options = parser.parse_args()
    ends: Counter[str] = Counter()
    for seed in tqdm(range(options.seed, options.seed + options.count), unit="folder"):
        with tempfile.TemporaryDirectory() as work:
            ends[check_folder(Path(work), seed)] += 1
            check_tar(Path(work), seed)
    for end, count in ends.most_common():
        print(f"{count:6,}  {end}")


if __name__ == "__main__":
    main()
