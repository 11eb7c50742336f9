"""The field of anchors that stay where they were made: blocks travel round the ranks instead of being gathered.

Each rank holds its share [b_r, d] of the global batch's anchors and flows its own samples. At every step of the flow
that some rank cannot skip, the shares go once round the ring (in the backward twice, see `AnchorField.vjp`, the second
time with the gradients that all ranks add to them), one arriving while the one before it is worked on. A rank holds two
foreign blocks at a time, nothing of the size of the global batch. The mathematics is `AnchorField`'s.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from lzn_dist.zones.block import AnchorGradient, Block
from lzn_dist.zones.field import AnchorField, FieldFactory

Group = dist.ProcessGroup | None


def ring_field(group: Group = None) -> FieldFactory:
    """A `field` for `compute_latents` and `align` whose anchors stay on the ranks of a group (default: all).

    The anchors given are this rank's rows of the global batch (their number may differ between ranks, 0 included);
    they are numbered through in the order of the ranks, and indices and targets are such numbers. Each rank's anchors
    get their gradient *summed over all ranks*, as with `gather_anchors`.

    Making the field, the flow and its backward are collective: every rank makes the same calls in the same order, a
    rank without samples too. In the backward too: its loss must depend on the results, be it on their empty sum.
    Without a process group, or with one rank, it is the field of one process.
    log_weights and groups are those of the anchors given, on every rank or on none.
    The factory raises ValueError for anchors whose width or dtype differ between ranks, for log_weights or groups on
    some ranks alone, and where no rank holds any anchor.
    """

    def make(anchors: Tensor, log_weights: Tensor | None, groups: Tensor | None, backend: str, /) -> AnchorField:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
            return AnchorField(anchors, log_weights, groups, backend)
        return RingField(anchors, log_weights, groups, backend, group)

    return make


class RingField(AnchorField):
    """The field of all ranks' anchors, of which this one holds [b_r, d]; see `ring_field`."""

    def __init__(
        self, anchors: Tensor, log_weights: Tensor | None = None, groups: Tensor | None = None,
        backend: str = "auto", group: Group = None,
    ) -> None:  # fmt: skip
        self.group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        self.lengths = self._lengths(anchors, log_weights is not None, groups is not None)
        self.starts = [sum(self.lengths[:rank]) for rank in range(self.world_size)]
        count = sum(self.lengths)
        total = anchors.double().sum(0)
        dist.all_reduce(total, group=group)
        super().__init__(
            anchors.contiguous(), log_weights, groups, backend,
            centre=(total / count).to(anchors.dtype), start=self.starts[self.rank], count=count,
        )  # fmt: skip

    def _lengths(self, anchors: Tensor, weighted: bool, grouped: bool) -> list[int]:
        """How many anchors each rank holds."""
        here = torch.tensor([*anchors.shape, anchors.element_size(), weighted, grouped], device=anchors.device)
        everywhere = [torch.empty_like(here) for _ in range(self.world_size)]
        dist.all_gather(everywhere, here, group=self.group)
        lengths, *kinds = zip(*(shape.tolist() for shape in everywhere), strict=True)
        if any(len(set(kind)) > 1 for kind in kinds):
            raise ValueError(
                "anchors must have one width and dtype on all ranks, and log_weights and groups on all or none: got "
                f"{kinds[0]}, bytes {kinds[1]}, log_weights {kinds[2]}, groups {kinds[3]}"
            )
        if not any(lengths):
            raise ValueError("anchors: no rank holds any")
        return list(lengths)

    def wanted(self, here: list[bool]) -> list[bool]:
        flags = torch.tensor(here, dtype=torch.int32, device=self.centre.device)
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in flags.tolist()]

    def blocks(self) -> Iterator[Block]:
        return (block for block, _ in self._round(None))

    def gradient_blocks(self, into: AnchorGradient) -> Iterator[tuple[Block, AnchorGradient]]:
        for block, gradient in self._round(into):
            assert gradient is not None
            yield block, gradient

    def _round(self, into: AnchorGradient | None) -> Iterator[tuple[Block, AnchorGradient | None]]:
        """All blocks, the own one first, then as they come from the rank before: each goes on to the rank behind.

        into: also a place for each block's gradient. A block's sum follows it one stage behind: this rank's part is
        computed while those before arrive, and goes on with them. The last rank to add is the one behind the home.
        """
        block, finished = self.block, None
        for stage in range(self.world_size):
            sent, received = [], []
            following, arriving, gradient = None, None, None
            if stage + 1 < self.world_size:
                owner = (self.rank - stage - 1) % self.world_size
                following = _empty(block, self.lengths[owner], self.starts[owner])
                sent, received = _contents(block), _contents(following)
            if into is not None:
                gradient = AnchorGradient(block.raw)
                if finished is not None:
                    arriving = AnchorGradient(block.raw)
                    sent, received = sent + _parts(finished), received + _parts(arriving)
            under_way = self._exchange(sent, received)
            yield block, gradient
            for work in under_way:
                work.wait()
            if gradient is not None and arriving is not None:
                _add(gradient, arriving)
            finished = gradient
            if following is not None:
                block = following
        if into is not None and finished is not None:
            arriving = AnchorGradient(into.anchors)
            for work in self._exchange(_parts(finished), _parts(arriving)):
                work.wait()
            _add(into, arriving)

    def _exchange(self, sent: list[Tensor], received: list[Tensor]) -> list[dist.Work]:
        """Start sending to the rank behind and receiving from the one before; empty tensors stay."""
        behind, before = (self.rank + 1) % self.world_size, (self.rank - 1) % self.world_size
        messages = [
            dist.P2POp(direction, tensor, group=self.group, tag=tag, group_peer=peer)
            for direction, tensors, peer in ((dist.isend, sent, behind), (dist.irecv, received, before))
            for tag, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(messages) if messages else []


def _empty(like: Block, length: int, start: int) -> Block:
    """A block of another length, to be received."""
    weights, groups = (None if one is None else one.new_empty(length) for one in (like.log_weights, like.groups))
    return type(like)(like.raw.new_empty(length, like.raw.shape[1]), like.centre, start, weights, groups, whole=False)


def _contents(block: Block) -> list[Tensor]:
    return [one for one in (block.raw, block.log_weights, block.groups) if one is not None]


def _parts(gradient: AnchorGradient) -> list[Tensor]:
    return [gradient.anchors, gradient.radial]


def _add(gradient: AnchorGradient, more: AnchorGradient) -> None:
    gradient.anchors += more.anchors
    gradient.radial += more.radial
