"""An engine: how networks, gradients and optimiser state are spread over ranks, behind one small interface.

All trainable networks are one module with one forward, which takes a function of them: that is where DDP, DeepSpeed
and FSDP2 hook in. An engine averages the gradients over ranks (see `gather_anchors` for what that asks of a loss),
clips them by their global norm, and skips the step on all ranks alike where that norm is not finite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lzn_dist.distributed.pieces import Piece, share
from lzn_dist.distributed.topology import Topology
from lzn_dist.networks import Networks

T = TypeVar("T")
Group = dict[str, Any]
MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's state of each parameter, besides the step


class EngineModule(nn.Module):
    """All networks behind one forward: model(function) is function(networks)."""

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, function: Callable[[Networks], T]) -> T:
        return function(self.networks)


@dataclass
class Outcome:
    """norm: of the gradient before clipping. applied: False where the step was skipped, on all ranks alike."""

    norm: Tensor
    applied: bool


class Engine(ABC):
    """Networks and optimiser as the launch configuration spreads them; made by `build_engine`.

    module: the networks as the engine has wrapped them. parameters: those that train, by name, in the optimiser's
    order. buffers: everything else of the networks' state.
    """

    # whether a step of several backwards must begin, or end, with one that reaches every parameter
    touches_first: bool = False
    touches_last: bool = False
    # whether a network may be used once alone in a backward
    uses_once: bool = False
    module: Callable[[Callable[[Networks], Any]], Any]

    def __init__(self, networks: Networks, topology: Topology) -> None:
        self.networks, self.topology = networks, topology
        self.device = next(networks.parameters()).device
        self.parameters = trained(networks)
        # copied before an engine cuts them up: they never change
        self.buffers = {
            name: value.detach().cpu().clone()
            for name, value in networks.state_dict().items()
            if name not in self.parameters
        }
        self.frozen: set[str] = set()

    @abstractmethod
    def running(self) -> str:
        """The engine that runs, read off the wrapped objects and not off what was asked for."""

    def forward(self, function: Callable[[Networks], T]) -> T:
        """function(networks), without a graph."""
        with torch.no_grad():
            result: T = self.module(function)
        return result

    def backward(self, function: Callable[[Networks], tuple[Tensor, T]], *, last: bool = True) -> tuple[Tensor, T]:
        """function(networks) → (loss, more), and the loss's backward. last: whether the step's gradients are complete.

        Returns the loss detached. A loss that is not finite makes the gradients NaN, so that every rank hears of it.
        """
        with self.accumulating(last):
            loss, more = self.module(function)
            self.propagate(loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype))
        return loss.detach(), more

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around each forward and backward of a step; last: its gradients are complete then."""
        return nullcontext()

    def propagate(self, loss: Tensor) -> None:
        """The backward by itself."""
        loss.backward()

    @abstractmethod
    def step(self, clip_norm: float) -> Outcome:
        """One optimiser step; gradients are gone afterwards."""

    @abstractmethod
    def gradients(self) -> dict[str, Tensor]:
        """Whole gradients by name, after the last backward and before the step. Collective; for verification."""

    @abstractmethod
    def weights(self) -> dict[str, Piece]:
        """This rank's pieces of the trained parameters: views where possible, valid until the next step."""

    @abstractmethod
    def whole_weights(self, network: str) -> dict[str, Tensor]:
        """Whole trained weights of a network, by name within it, on every rank; not to be written to. Collective."""

    @abstractmethod
    def moments(self, *, restore: bool = False) -> dict[str, dict[str, Piece]]:
        """By moment and parameter, this rank's pieces; restore: all that it needs to go on from, not its share."""

    @abstractmethod
    def set_moments(self, moments: dict[str, dict[str, Piece]], steps: int) -> None:
        """Take over what `moments(restore=True)` described, and the number of steps that were taken."""

    @property
    @abstractmethod
    def groups(self) -> list[Group]:
        """The optimiser's parameter groups, with name and lr."""

    def freeze(self, group: Group) -> None:
        """From now on the group's parameters stay as they are: lr 0, and no part in the gradient's norm."""
        if group["name"] not in self.frozen:
            self.frozen.add(group["name"])
            self._frozen(group["name"])
        group["lr"] = 0.0

    def frozen_names(self) -> set[str]:
        """Names of the parameters that no longer move."""
        return {name for name in self.parameters if name.startswith(tuple(f"{group}." for group in self.frozen))}

    def _frozen(self, network: str) -> None:  # noqa: B027
        """What an engine must do besides, once; nothing for most."""

    def buffer_pieces(self) -> dict[str, Piece]:
        """This rank's share of the buffers."""
        return {name: share(value, self.topology) for name, value in self.buffers.items()}

    def _of(self, network: str) -> dict[str, nn.Parameter]:
        """A network's trained parameters, by name within it."""
        start = f"{network}."
        return {name.removeprefix(start): p for name, p in self.parameters.items() if name.startswith(start)}


def trained(networks: Networks) -> dict[str, nn.Parameter]:
    """The parameters that an optimiser moves, by name."""
    return {name: p for name, p in networks.named_parameters() if p.requires_grad}
