"""One rank, started by the tests: verifies one launch on several configurations, writes the rows as JSON.

    verify_worker.py OUTPUT SHARDS CELLS

CELLS is JSON: [{"config": NAME, "overrides": [...], "fault": null | NAME}, ...]

Also on the way: the weights of which averages are made, at every step, are this rank's own and need no collective.

A fault breaks the code on purpose: `gather` scales the backward of the anchors' gather by 1/world, `stale` leaves the
previous step's gradients in ZeRO-3's buffers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode

from lzn_dist.config import load_config
from lzn_dist.distributed import Topology
from lzn_dist.distributed.gather import _GatherAnchors
from lzn_dist.distributed.pieces import Piece
from lzn_dist.engines.base import Engine
from lzn_dist.engines.launch import Launch, build_accelerator
from lzn_dist.engines.single import SingleEngine
from lzn_dist.engines.zero import ZeROEngine
from lzn_dist.networks import trust
from lzn_dist.terminal import command
from lzn_dist.training.resolve import resolve
from lzn_dist.verify import verify
from tests.helpers.launching import ROOT, SMALL


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    if name == "gather":
        right = _GatherAnchors.backward

        def wrong(ctx: Any, *grads: Tensor) -> Tensor:
            return right(ctx, *grads) / Topology.current().world_size

        with patch.object(_GatherAnchors, "backward", staticmethod(wrong)):
            yield
    elif name == "stale":
        complete = ZeROEngine.__init__

        def incomplete(self: ZeROEngine, *arguments: Any) -> None:
            complete(self, *arguments)
            self.touches_first = False

        with patch.object(ZeROEngine, "__init__", incomplete):
            yield
    else:
        assert name is None
        yield


@contextmanager
def silent_weights(kind: type[Engine]) -> Iterator[None]:
    """An engine's `weights` that fails where it asks the other ranks for anything."""
    weights = kind.weights

    def watched(self: Engine) -> dict[str, Piece]:
        with CommDebugMode() as mode:
            found = weights(self)
        assert not mode.get_total_counts(), mode.get_comm_counts()
        return found

    with patch.object(kind, "weights", watched):
        yield


def main() -> int:
    output, shards, cells = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    launch, accelerator, results = Launch.asked(), None, []
    trust(["tests"])
    for cell in cells:
        overrides = [*SMALL, f"data.shards={shards}", "output_dir=unused", *cell["overrides"]]
        config = resolve(load_config(ROOT / "configs" / f"digits_{cell['config']}.yaml", overrides))
        accelerator = accelerator or build_accelerator(config, launch)
        torch.set_num_threads(1)
        with fault(cell["fault"]), silent_weights(SingleEngine), silent_weights(ZeROEngine):
            rows = verify(config, launch, accelerator)
        results.append([{"what": r.what, "difference": r.difference, "passed": r.passed} for r in rows])
        if Topology.current().is_main:
            output.write_text(json.dumps(results))
        accelerator.wait_for_everyone()
    assert accelerator is not None
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
