"""Write the cats of AFHQ as WebDataset shards, from afhq.zip or afhq_v2.zip:

python data_prep/afhq_cat.py --archive afhq.zip --output data/afhq_cat --resize 256 --crop
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.sources import AFHQCat
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--archive", type=path_argument, required=True, metavar="ZIP", help="afhq.zip or afhq_v2.zip")
    sys.exit(run(lambda given: AFHQCat(given.archive), options.parse_args()))
