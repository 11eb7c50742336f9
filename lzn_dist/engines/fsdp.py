"""FSDP2 (`fully_shard`): weights, gradients and optimiser state cut along the first dimension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lzn_dist.distributed.pieces import Piece
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.base import EngineModule
from lzn_dist.engines.single import SingleEngine
from lzn_dist.networks import Networks


class FSDPEngine(SingleEngine):
    """Each block of the networks is gathered by itself, what is left with the root. The mesh is all ranks."""

    def __init__(self, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer]) -> None:
        super().__init__(networks, optimizer, Topology.current())

    def _spread(self, module: EngineModule) -> Any:
        mesh = init_device_mesh(self.device.type, (self.topology.world_size,))
        for block in self.networks.blocks():
            fully_shard(block, mesh=mesh)
        return fully_shard(module, mesh=mesh)

    def running(self) -> str:
        spread = any(isinstance(p, DTensor) for p in self.parameters.values())
        return "fsdp" if spread else super().running()

    def _whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _piece(self, tensor: Tensor, *, everything: bool = False) -> Piece:
        assert isinstance(tensor, DTensor)
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        local = tensor.to_local().detach().reshape(-1)
        row = tensor.shape[1:].numel()  # of the shape: to index the tensor would gather all of it
        return Piece(local, offset[0] * row if len(local) else 0, tuple(tensor.shape))
