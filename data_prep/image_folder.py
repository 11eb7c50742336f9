"""Write your own images as WebDataset shards:

python data_prep/image_folder.py --folder photos --output data/photos --resize 64 --crop

Folders are classes: FOLDER/CLASS/x.jpg, or FOLDER/SPLIT/CLASS/x.jpg with splits as people call them (train, training,
val, valid, validation, dev, test, testing, …). Or --csv FILE, with a header and the columns path (from FOLDER on),
label and, if wanted, split. Or --unlabelled: images without classes. What is an image is decided by its content. At the
end stands how many files were seen, taken, and left out for which reason; the manifest keeps it.
"""

from __future__ import annotations

import argparse
import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import parser, run


def source(given: argparse.Namespace) -> ImageFolder:
    return ImageFolder(
        given.folder, not given.unlabelled, given.csv, split_folders=given.splits, exclude=given.output,
        allow_empty=given.allow_empty_classes, max_left_out=given.max_left_out,
    )  # fmt: skip


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--folder", type=path_argument, required=True, metavar="DIR", help="folder of the images")
    how = options.add_mutually_exclusive_group()
    how.add_argument("--csv", type=path_argument, metavar="FILE", help="columns path, label and perhaps split")
    how.add_argument("--unlabelled", action="store_true", help="images without classes")
    options.add_argument(
        "--splits",
        default="",
        metavar="NAMES",
        help="folders at the top that are splits, by comma; or none",
    )
    options.add_argument("--allow-empty-classes", action="store_true", help="classes without images keep their number")
    options.add_argument(
        "--max-left-out",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="of images that may be left out (0.01)",
    )
    sys.exit(run(source, options.parse_args()))
