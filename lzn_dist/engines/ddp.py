"""DistributedDataParallel, through Accelerate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.base import EngineModule
from lzn_dist.engines.single import SingleEngine
from lzn_dist.networks import Networks


class DDPEngine(SingleEngine):
    """Weights and optimiser state whole on every rank, gradients averaged in the last backward of a step."""

    def __init__(
        self, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer], accelerator: Accelerator
    ) -> None:
        self.accelerator = accelerator
        super().__init__(networks, optimizer, Topology.current())

    def _spread(self, module: EngineModule) -> Any:
        # Without looking for unused parameters DDP rebuilds its buckets after the first step, and a resumed run
        # would round differently; with gradient caching a backward reaches one network of several anyway.
        self.accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        return self.accelerator.prepare_model(module)

    def running(self) -> str:
        return "ddp" if isinstance(self.module, DistributedDataParallel) else super().running()

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.module.no_sync()  # type: ignore[attr-defined]
