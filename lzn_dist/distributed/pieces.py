"""Tensors in pieces: each rank holds one range of every flattened tensor, whatever engine cut it.

DDP's weights are whole on every rank, ZeRO-1 and 2 cut the optimiser's moments of all parameters as one long vector,
ZeRO-3 cuts each flattened parameter, FSDP2 cuts along the first dimension. All of these are ranges of the flattened
tensor, so that one representation serves checkpoints, averaged weights and evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from lzn_dist.distributed.topology import Topology

GATHER_ELEMENTS = 1 << 24  # elements that travel in one collective


@dataclass
class Piece:
    """Elements start … start + len(data) of a flattened tensor of the given shape; data is [count].

    Torch's distributed checkpoint stores it as a one-dimensional tensor in parts, through the two methods that it
    asks objects for (torch.distributed._checkpointable) and the planners below, which find its elements; any other
    cut of the tensor can be read back.
    """

    data: Tensor
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def cpu(self) -> Piece:
        """A copy in the host's memory."""
        return Piece(self.data.detach().to("cpu", copy=True), self.start, self.shape)

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        if not self._chunks():
            return []
        data = TensorWriteData(
            chunk=self._chunks()[0],
            properties=TensorProperties.create_from_tensor(self.data),
            size=torch.Size([self.numel]),
        )
        return [WriteItem(MetadataIndex(name, torch.Size([self.start])), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return self._chunks()

    def _chunks(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([self.start]), self.data.shape)] if len(self.data) else []


class PieceSaver(DefaultSavePlanner):
    """Writes a state of pieces."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        data: Tensor = self.state_dict[index.fqn].data
        return data


class PieceLoader(DefaultLoadPlanner):
    """Reads into a state of pieces."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # torch's own would make None of everything that is not a tensor
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        data: Tensor = self.state_dict[index.fqn].data
        return data


def whole(tensor: Tensor) -> Piece:
    """All of a contiguous tensor, as a view."""
    return Piece(tensor.detach().view(-1), 0, tuple(tensor.shape))


def share(tensor: Tensor, topology: Topology) -> Piece:
    """A rank's even share of a contiguous tensor that all ranks hold, as a view."""
    flat = tensor.detach().view(-1)
    size = -(-len(flat) // topology.world_size)
    start = min(topology.rank * size, len(flat))
    return Piece(flat[start : start + size], start, tuple(tensor.shape))


def gather_pieces(pieces: Mapping[str, Piece], everywhere: bool = False) -> dict[str, Tensor] | None:
    """The whole tensors on the CPU of the main process (or of every one); None on the others. Collective; the same
    names everywhere."""
    world_size, main = Topology.current().world_size, Topology.current().is_main or everywhere
    found: dict[str, Tensor] = {}
    names = list(pieces)
    while names:
        first = pieces[names[0]].data
        taken = [names.pop(0)]
        count = pieces[taken[0]].numel
        while names and pieces[names[0]].data.dtype == first.dtype and count < GATHER_ELEMENTS:
            taken.append(names.pop(0))
            count += pieces[taken[-1]].numel
        # ranges do not overlap, so that a sum over ranks of zero-filled tensors joins them exactly
        joined, offset = torch.zeros(count, dtype=first.dtype, device=first.device), 0
        for name in taken:
            piece = pieces[name]
            joined[offset + piece.start : offset + piece.start + len(piece.data)] = piece.data
            offset += piece.numel
        if everywhere and world_size > 1:
            dist.all_reduce(joined)
        elif world_size > 1:
            dist.reduce(joined, 0)
        if main:
            parts = joined.cpu().split([pieces[name].numel for name in taken])
            found |= {name: part.view(pieces[name].shape) for name, part in zip(taken, parts, strict=True)}
    return found if main else None
