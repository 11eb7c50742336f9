"""The engines: how networks, gradients and optimiser state are spread over ranks, behind one small interface.

All trainable networks are one module with one forward, which takes a function of them: that is where DDP, DeepSpeed
and FSDP2 hook in. The engine averages the gradients over ranks (see `gather_anchors` for what that asks of a loss),
clips them by their global norm, and skips the step on all ranks alike where that norm is not finite.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lzn_dist.config import Config, ConfigError
from lzn_dist.distributed.pieces import Piece, share, whole
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.activation_checkpointing import blocks, checkpoint_activations
from lzn_dist.engines.launch import EngineName, Launch
from lzn_dist.networks import Networks
from lzn_dist.training.stopwatch import Stopwatch

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
    """norm: of the gradient before clipping. applied: False where the step was skipped. votes: summed over ranks."""

    norm: Tensor
    applied: bool
    votes: list[float]


class Engine(ABC):
    """Networks and optimiser as the launch configuration spreads them; made by `build_engine`.

    names: parameters that train, by name, in the optimiser's order. constants: everything else of the networks' state.
    """

    name: EngineName
    # whether a step of several backwards must begin, or end, with one that reaches every parameter
    touches_first = touches_last = False

    def __init__(self, networks: Networks, watch: Stopwatch, topology: Topology) -> None:
        self.networks, self.watch, self.topology = networks, watch, topology
        self.device = next(networks.parameters()).device
        self.names = {name: p for name, p in networks.named_parameters() if p.requires_grad}
        # copied before an engine cuts them up: they never change
        self.constants = {
            name: value.detach().cpu().clone()
            for name, value in networks.state_dict().items()
            if name not in self.names
        }
        self.frozen: set[str] = set()

    @abstractmethod
    def forward(self, function: Callable[[Networks], T]) -> T:
        """function(networks), without a graph."""

    @abstractmethod
    def backward(self, function: Callable[[Networks], tuple[Tensor, T]], *, last: bool = True) -> tuple[Tensor, T]:
        """function(networks) → (loss, more), and the loss's backward. last: whether the step's gradients are complete.

        Returns the loss detached. A loss that is not finite makes the gradients NaN, so that every rank hears of it.
        """

    @abstractmethod
    def step(self, clip_norm: float, votes: Sequence[float] = ()) -> Outcome:
        """One optimiser step; gradients are gone afterwards. votes: numbers of this rank that all ranks add up."""

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
        return {name for name in self.names if name.split(".")[0] in self.frozen}

    def _frozen(self, network: str) -> None:  # noqa: B027
        """What an engine must do besides, once; nothing for most."""

    def constant_pieces(self) -> dict[str, Piece]:
        """This rank's share of the constants."""
        return {name: share(value, self.topology) for name, value in self.constants.items()}


def poisoned(loss: Tensor) -> Tensor:
    """The loss with the same gradients where it is finite, with NaN for all of them where it is not."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan).to(loss.dtype)


def agree(
    flag: Tensor | bool, votes: Sequence[float], device: torch.device, topology: Topology
) -> tuple[bool, list[float]]:
    """Whether any rank raised the flag, and each vote's sum over ranks. One collective and one wait for the device:
    the only ones of a step."""
    joined = torch.stack([torch.as_tensor(value, device=device).float() for value in (flag, *votes)])
    if topology.world_size > 1:
        dist.all_reduce(joined)
    raised, *sums = joined.tolist()
    return raised > 0, sums


class TorchEngine(Engine):
    """One process, DistributedDataParallel (through Accelerate), or FSDP2 (`fully_shard`)."""

    def __init__(
        self, name: EngineName, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer],
        watch: Stopwatch, accelerator: Accelerator | None,
    ) -> None:  # fmt: skip
        super().__init__(networks, watch, Topology() if name == "single" else Topology.current())
        self.name, self.accelerator = name, accelerator
        self.module: nn.Module = EngineModule(networks)
        if name == "fsdp":
            _shard(networks, self.module)
            self.names = {name: p for name, p in networks.named_parameters() if p.requires_grad}
        self.optimizer = optimizer()
        if name == "ddp":
            assert accelerator is not None
            # Without looking for unused parameters DDP rebuilds its buckets after the first step, and a resumed run
            # would round differently; with gradient caching a backward reaches one network of several anyway.
            from accelerate import DistributedDataParallelKwargs

            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
            self.module = accelerator.prepare_model(self.module)

    @property
    def groups(self) -> list[Group]:
        return self.optimizer.param_groups

    def forward(self, function: Callable[[Networks], T]) -> T:
        with torch.no_grad():
            result: T = self.module(function)
        return result

    def backward(self, function: Callable[[Networks], tuple[Tensor, T]], *, last: bool = True) -> tuple[Tensor, T]:
        held = nullcontext() if last or self.name != "ddp" else self.module.no_sync()  # type: ignore[operator]
        with held:
            loss, more = self.module(function)
            with self.watch("backward"):
                poisoned(loss).backward()
        return loss.detach(), more

    def step(self, clip_norm: float, votes: Sequence[float] = ()) -> Outcome:
        frozen = self.frozen_names()
        for name in frozen:
            self.names[name].grad = None
        parameters = [p for p in self.names.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        skip, sums = agree(~norm.isfinite(), votes, self.device, self.topology)
        if not skip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(norm, not skip, sums)

    def gradients(self) -> dict[str, Tensor]:
        return {
            name: torch.zeros_like(_full(p.detach())) if p.grad is None else _full(p.grad).clone()
            for name, p in self.names.items()
        }

    def weights(self) -> dict[str, Piece]:
        return {name: _piece(p.detach(), self.topology) for name, p in self.names.items()}

    def whole_weights(self, network: str) -> dict[str, Tensor]:
        start = f"{network}."
        return {n.removeprefix(start): _full(p.detach()) for n, p in self.names.items() if n.startswith(start)}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state |= {key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS}
        return state

    def moments(self, *, restore: bool = False) -> dict[str, dict[str, Piece]]:
        return {
            key: {
                name: _piece(self._state(p)[key], self.topology, everything=restore) for name, p in self.names.items()
            }
            for key in MOMENTS
        }

    def set_moments(self, moments: dict[str, dict[str, Piece]], steps: int) -> None:
        for key, pieces in self.moments(restore=True).items():
            for name, piece in pieces.items():
                piece.data.copy_(moments[key][name].data)
        for p in self.names.values():
            self._state(p)["step"].fill_(float(steps))


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _piece(tensor: Tensor, topology: Topology, *, everything: bool = False) -> Piece:
    """The rank's piece: its local rows under FSDP2, else its share (or everything) of what all ranks hold."""
    if not isinstance(tensor, DTensor):
        return whole(tensor) if everything else share(tensor, topology)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local().detach().reshape(-1)
    row = tensor[0].numel() if tensor.ndim and tensor.shape[0] else 1
    return Piece(local, offset[0] * row if len(local) else 0, tuple(tensor.shape))


def _shard(networks: Networks, module: nn.Module) -> None:
    """FSDP2: each block by itself, what is left with the root. The mesh is all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(networks.parameters()).device.type, (Topology.current().world_size,))
    for block in blocks(networks):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def build_engine(
    config: Config, launch: Launch, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer],
    accelerator: Accelerator | None, watch: Stopwatch,
) -> Engine:  # fmt: skip
    """The engine that the launcher asked for, or ConfigError where another one would run.

    networks: whole, with their initial or resumed weights. optimizer: makes the optimiser of the networks' parameters,
    as they are after sharding.
    """
    checkpointed = checkpoint_activations(networks, config.activation_checkpointing)
    if config.compile:
        for block in networks.children():
            block.compile()
    if launch.deepspeed is not None:
        from lzn_dist.engines.zero import ZeroEngine

        assert accelerator is not None
        engine: Engine = ZeroEngine(networks, optimizer(), watch, accelerator, checkpointed)
    else:
        engine = TorchEngine(launch.engine, networks, optimizer, watch, accelerator)
    runs = running_engine(engine)
    if runs != launch.engine:
        raise ConfigError(f"the launch configuration asks for engine {launch.engine}, but {runs} is what would run")
    return engine


def running_engine(engine: Engine) -> str:
    """What really runs, read off the wrapped objects and not off what was asked for."""
    if isinstance(engine, TorchEngine):
        if isinstance(engine.module, nn.parallel.DistributedDataParallel):
            return "ddp"
        if any(isinstance(p, DTensor) for p in engine.names.values()):
            return "fsdp"
        return "single" if engine.topology.world_size == 1 else "none"
    from lzn_dist.engines.zero import ZeroEngine

    assert isinstance(engine, ZeroEngine)
    return engine.running()
