"""Write scikit-learn's handwritten digits as WebDataset shards: python data_prep/digits.py --output data/digits"""

from __future__ import annotations

import sys

from lzn_dist.prepare.digits import SAMPLES_PER_SHARD, Digits
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__, default_output="data/digits")
    options.set_defaults(samples_per_shard=SAMPLES_PER_SHARD, processes=1)
    sys.exit(run(lambda given: Digits(), options.parse_args()))
