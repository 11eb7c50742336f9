"""Write images with captions as WebDataset shards:

python data_prep/image_text.py --folder photos --output data/photos --held-out 0.05

Captions lie beside the images (x.txt, one a line, beside x.jpg), or in a table: --table FILE, a CSV, TSV, JSON lines or
parquet file with a column for the image (a path from the folder on) and one for the caption, perhaps split; an image in
several lines has several captions. A tokenizer is trained on the training captions and kept with the shards. At the end
stands how many files were seen, taken, and left out for which reason.

python data_prep/image_text.py --shards cc3m --held-out-shards 2

makes a manifest (and a tokenizer) beside shards that img2dataset wrote; these stay as they are.
"""

from __future__ import annotations

import argparse
import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.image_text import ImageText, adopt_shards
from lzn_dist.prepare.writer import PrepareError, parser, run
from lzn_dist.terminal import command


def source(given: argparse.Namespace) -> ImageText:
    return ImageText(
        given.folder, given.table, given.image_column, given.caption_column, given.held_out, given.keep_all,
        exclude=given.output,
    )  # fmt: skip


def main() -> int:
    options = parser(__doc__, default_output="data/pairs")
    where = options.add_mutually_exclusive_group(required=True)
    where.add_argument("--folder", type=path_argument, metavar="DIR", help="folder of the images")
    where.add_argument("--shards", type=path_argument, metavar="DIR", help="shards of img2dataset")
    options.add_argument("--table", type=path_argument, metavar="FILE", help="which caption belongs to which image")
    options.add_argument("--image-column", default="", metavar="NAME", help="of the table (default: image, path, …)")
    options.add_argument("--caption-column", default="", metavar="NAME", help="(default: caption, text, …)")
    options.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of images that become test")
    options.add_argument("--keep-all", action="store_true", help="images without a caption too (data.partial=true)")
    options.add_argument("--held-out-shards", type=int, default=0, metavar="N", help="last shards that become test")
    given = options.parse_args()
    if given.shards is None:
        return run(source, given)
    try:
        print("\n".join(adopt_shards(given.shards, given.held_out_shards)))
    except (OSError, PrepareError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
