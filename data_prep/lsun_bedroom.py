"""Write LSUN Bedroom as WebDataset shards without labels, from a folder of its images:

python data_prep/lsun_bedroom.py --folder lsun_bedroom_images --output data/lsun_bedroom --resize 256 --crop
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument(
        "--folder", type=path_argument, required=True, metavar="DIR", help="images, also in folders below it"
    )
    given = options.parse_args()
    sys.exit(run(lambda given: ImageFolder(given.folder, False, name="LSUN Bedroom", exclude=given.output), given))
