"""One process, and what all engines share whose optimiser is torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lzn_dist.distributed.pieces import Piece, share, whole
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.base import MOMENTS, Engine, EngineModule, Group, Outcome, trained
from lzn_dist.networks import Networks


class SingleEngine(Engine):
    """Everything on this process; a subclass says how it is spread and how a tensor becomes whole."""

    def __init__(
        self, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer], topology: Topology | None = None
    ) -> None:
        super().__init__(networks, topology or Topology())
        self.module = self._spread(EngineModule(networks))
        self.parameters = trained(networks)  # spreading may have made others
        self.optimizer = optimizer()

    def _spread(self, module: EngineModule) -> Any:
        return module

    def running(self) -> str:
        return "single" if self.topology.world_size == 1 else "none"

    @property
    def groups(self) -> list[Group]:
        return self.optimizer.param_groups

    def step(self, clip_norm: float) -> Outcome:
        for name in self.frozen_names():
            self.parameters[name].grad = None
        parameters = [p for p in self.parameters.values() if p.grad is not None]
        # of gradients that are the same on all ranks, or of all ranks' parts: so is the decision
        norm = self._whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        applied = bool(norm.isfinite())
        if applied:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, applied)

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(self._whole(p.detach())) if p.grad is None else self._whole(p.grad).clone()
            for name, p in self.parameters.items()
        }

    def weights(self) -> dict[str, Piece]:
        return {name: self._piece(p.detach()) for name, p in self.parameters.items()}

    def whole_weights(self, network: str) -> dict[str, Tensor]:
        return {name: self._whole(p.detach()) for name, p in self._of(network).items()}

    def _whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may be spread, on every rank. Collective."""
        return tensor

    def _piece(self, tensor: Tensor, *, everything: bool = False) -> Piece:
        """The rank's share (or everything) of what all ranks hold; what it holds, of what is spread."""
        return whole(tensor) if everything else share(tensor, self.topology)

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS}
        return state

    def moments(self, *, restore: bool = False) -> dict[str, dict[str, Piece]]:
        return {
            key: {name: self._piece(self._state(p)[key], everything=restore) for name, p in self.parameters.items()}
            for key in MOMENTS
        }

    def set_moments(self, moments: dict[str, dict[str, Piece]], steps: int) -> None:
        for key, pieces in self.moments(restore=True).items():
            for name, piece in pieces.items():
                piece.data.copy_(moments[key][name].data)
        for p in self.parameters.values():
            self._state(p)["step"].fill_(float(steps))
