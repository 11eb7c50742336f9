"""Write emoji with their names as WebDataset shards of 64x64 PNGs, from npm's package emoji-datasource-google:

npm pack emoji-datasource-google
python data_prep/emoji.py --archive emoji-datasource-google-*.tgz --output data/emoji

3,786 images in 10 categories (the classes); each has KEY.json beside it with name, short names, category, subcategory
and skin tones. 15 % of each category's emoji are the split test, 10 % val; all skin tones of one are in the same split.
"""

from __future__ import annotations

import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.emoji import Emoji
from lzn_dist.prepare.writer import parser, run

if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--archive", type=path_argument, required=True, metavar="TGZ", help="the package from npm")
    options.set_defaults(samples_per_shard=500)
    sys.exit(run(lambda given: Emoji(given.archive), options.parse_args()))
