"""Write scikit-learn's handwritten digits as WebDataset shards: python data_prep/digits.py --output data/digits"""

from __future__ import annotations

import argparse
from pathlib import Path

from lzn_dist.data import ShardIndex, write_digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("data/digits"), help="folder of the shards")
    parser.add_argument("--samples-per-shard", type=int, default=300, help="samples a shard")
    arguments = parser.parse_args()
    index = ShardIndex.load(write_digits(arguments.output, arguments.samples_per_shard))
    counts = ", ".join(f"{split} {index.samples(split)} samples" for split in index.splits)
    print(f"{index.folder}: {counts}")


if __name__ == "__main__":
    main()
