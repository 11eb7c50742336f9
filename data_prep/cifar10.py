"""Write CIFAR10 as WebDataset shards of PNGs, from the python or the binary archive:

python data_prep/cifar10.py --archive cifar-10-python.tar.gz --output data/cifar10
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.sources import CIFAR10
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "--archive",
        type=path_argument,
        required=True,
        metavar="TGZ",
        help="cifar-10-python.tar.gz or cifar-10-binary.tar.gz",
    )
    sys.exit(run(lambda given: CIFAR10(given.archive), options.parse_args()))
