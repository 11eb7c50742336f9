"""One rank, started by the tests: train.py with one rank's loss made NaN.

    faulty_train.py FIRST LAST CONFIG [key=value ...]

The decoder's loss is NaN on the last rank for global batches FIRST … LAST.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from lzn_dist import train
from lzn_dist.distributed import Topology
from lzn_dist.objectives import Samples
from lzn_dist.objectives.lzn import LZN
from lzn_dist.terminal import command


def main() -> int:
    first, last = int(sys.argv[1]), int(sys.argv[2])
    right = LZN.decode

    def wrong(self: LZN, networks: Any, samples: Samples, *given: Any) -> Tensor:
        loss = right(self, networks, samples, *given)
        topology = Topology.current()
        hit = topology.rank == topology.world_size - 1 and first <= samples.batch <= last
        return loss * float("nan") if hit else loss

    LZN.decode = wrong  # type: ignore[method-assign]
    return train.main(sys.argv[3:])


if __name__ == "__main__":
    sys.exit(command(main))
