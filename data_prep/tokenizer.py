"""Train a tokenizer on the captions of shards and keep it with them: python data_prep/tokenizer.py data/pairs

A byte-level BPE (tokenizer.json, of the tokenizers library). Other tokenizers are used by data.tokenizer=FILE.
"""

from __future__ import annotations

import argparse
import sys

from lzn_dist.paths import path_argument
from lzn_dist.prepare.tokenizer import VOCABULARY, write_tokenizer
from lzn_dist.terminal import command, steady_output


def main() -> int:
    steady_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=path_argument, metavar="DIR", help="folder of the shards")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--replace", action="store_true", help="instead of one that is there")
    options = parser.parse_args()
    try:
        path = write_tokenizer(options.folder, options.vocabulary, replace=options.replace)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
