"""What runs are doing: python slurm/status.py [RUN ...] [--watch]

State, nodes, step, loss, images per second, requeues, hours, and the last error of the lowest rank that had one.
Without RUN: all runs under runs/.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from lzn_dist.cluster.watch import look_at, table
from lzn_dist.paths import path_argument
from lzn_dist.terminal import command


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="*", type=path_argument, metavar="RUN", help="folders of runs (default: all in runs/)"
    )
    parser.add_argument("--watch", action="store_true", help="again every few seconds, until Ctrl-C")
    parser.add_argument("--seconds", type=float, default=5.0, metavar="S", help="between looks (default: 5)")
    given = parser.parse_args()
    runs = given.runs or sorted(path.parent for path in Path("runs").glob("*/status.json"))
    if not runs:
        print("no runs under runs/: name their folders", file=sys.stderr)
        return 2
    try:
        while True:
            text = table([look_at(run) for run in runs])
            print(f"\033[H\033[J{time.strftime('%H:%M:%S')}\n{text}" if given.watch else text, flush=True)
            if not given.watch:
                return 0
            time.sleep(given.seconds)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0


if __name__ == "__main__":
    sys.exit(command(main))
