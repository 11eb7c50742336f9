"""Write ImageNet as WebDataset shards, straight from the published archives (nothing is unpacked):

python data_prep/imagenet.py --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
    --devkit ILSVRC2012_devkit_t12.tar.gz --output data/imagenet

Splits train and val; classes 0 to 999 in the order of their sorted WNIDs. The published JPEGs are kept as they are.
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.sources import ImageNet
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--train", type=path_argument, required=True, metavar="TAR", help="ILSVRC2012_img_train.tar")
    options.add_argument("--val", type=path_argument, required=True, metavar="TAR", help="ILSVRC2012_img_val.tar")
    options.add_argument(
        "--devkit", type=path_argument, required=True, metavar="TGZ", help="ILSVRC2012_devkit_t12.tar.gz"
    )
    sys.exit(run(lambda given: ImageNet(given.train, given.val, given.devkit), options.parse_args()))
