"""Write CelebA-HQ as WebDataset shards without labels, from a folder of its images:

python data_prep/celeba_hq.py --folder celeba_hq_images --output data/celeba_hq --resize 256 --crop
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
    sys.exit(run(lambda given: ImageFolder(given.folder, False, name="CelebA-HQ", exclude=given.output), given))
