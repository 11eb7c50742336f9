"""One rank, started by the tests: rank 1 takes long over its data while the others wait for it in a collective."""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist

from lzn_dist.terminal import command
from lzn_dist.training.stopwatch import Stopwatch
from lzn_dist.training.watchdog import Watchdog


def main() -> int:
    dist.init_process_group("gloo")
    watch = Stopwatch()
    watchdog = Watchdog(watch, 1.0)
    dist.barrier()
    watchdog.begin(0)
    with watch("data"):
        time.sleep(3.0 if dist.get_rank() == 1 else 0.0)
    with watch("flow"):
        dist.all_reduce(torch.zeros(1))
    watchdog.idle()
    watchdog.close()
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
