"""python -m lzn_dist COMMAND …: see `lzn_dist.cli`."""

import sys

from lzn_dist.cli import console

if __name__ == "__main__":
    sys.exit(console())
