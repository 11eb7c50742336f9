"""Write your own images as WebDataset shards:

python data_prep/image_folder.py --folder photos --output data/photos --resize 256 --crop

Folders are classes: FOLDER/CLASS/x.jpg or FOLDER/SPLIT/CLASS/x.jpg with splits train, val and test. Or --csv FILE, with
a header and the columns path (from FOLDER on), label and, if wanted, split. Or --unlabelled: all images are one split.
"""

from __future__ import annotations

import sys

from lzn_dist.data.prepare import parser, run
from lzn_dist.data.sources import ImageFolder
from lzn_dist.paths import path_argument

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--folder", type=path_argument, required=True, metavar="DIR", help="folder of the images")
    how = options.add_mutually_exclusive_group()
    how.add_argument("--csv", type=path_argument, metavar="FILE", help="columns path, label and perhaps split")
    how.add_argument("--unlabelled", action="store_true", help="images without classes")
    sys.exit(run(lambda given: ImageFolder(given.folder, not given.unlabelled, given.csv), options.parse_args()))
