"""ZeRO stages 1, 2 and 3 through Accelerate's DeepSpeed: optimiser state, gradients and weights cut over the ranks.

Weights are float32 in DeepSpeed's eyes (its own bf16 mode would cast the label anchors too); the networks run in
bfloat16 by autocast, as under every other engine. Clipping and the skipping of steps that are not finite are
DeepSpeed's own; both use the global norm, as the others does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lzn_dist.distributed.collectives import sum_over_ranks
from lzn_dist.distributed.pieces import Piece, share
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.base import MOMENTS, Engine, EngineModule, Group, Outcome
from lzn_dist.networks import Networks


def _require_gradients(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Let every number that enters a module gathered as a whole have a gradient.

    ZeRO-3 releases the module's parameters when the gradients of its inputs are there; where the images have none,
    those of the latents would be there before the layers that see the images alone have gone backward.
    """
    if not torch.is_grad_enabled():
        return inputs
    return tuple(
        x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() and not x.requires_grad else x
        for x in inputs
    )


class ZeROEngine(Engine):
    """deepspeed: the DeepSpeedEngine; zero: its ZeRO optimiser; inner: torch's, which holds the moments."""

    def __init__(
        self, networks: Networks, optimizer: torch.optim.Optimizer, accelerator: Accelerator,
        checkpointed: list[nn.Module],
    ) -> None:  # fmt: skip
        super().__init__(networks, Topology.current())
        # ZeRO-3 gathers a checkpointed module as a whole: inside, its hooks would release parameters that were
        # gathered for the second forward before the backward has used them
        for module in checkpointed:
            module._z3_leaf = True  # type: ignore[assignment]
            module.register_forward_pre_hook(_require_gradients)
        module, _ = accelerator.prepare(EngineModule(networks), optimizer)
        self.module = self.deepspeed = module
        self.zero: Any = module.optimizer
        self.inner: torch.optim.Optimizer = self.zero.optimizer
        self.stage = int(module.zero_optimization_stage())
        # what is gathered as a whole hands its gradients over as often as it was used, and DeepSpeed takes them once
        self.uses_once = self.stage == 3 and bool(checkpointed)
        self.offload = bool(module.zero_use_cpu_optimizer()) and self.stage == 3
        # Under ZeRO-3 a gradient buffer is overwritten in a step's first backward and added to in later ones, also
        # where that first backward did not reach the parameter and the buffer holds the previous step's gradient.
        self.touches_first = self.stage == 3
        # With offloading, a gradient goes to the host in the step's last backward, if that reaches its parameter.
        self.touches_last = self.offload
        self._hooks: list[Any] = []
        # before the first step: DeepSpeed 0.19 finds the moments of the first parameter group alone after it
        self._materialise()

    def running(self) -> str:
        return f"zero{self.stage}" + ("_offload" if self.offload else "")

    @property
    def groups(self) -> list[Group]:
        groups: list[Group] = self.zero.param_groups
        return groups

    def _frozen(self, network: str) -> None:
        # DeepSpeed takes the norm over all gradients, so those of a frozen network must be 0
        for name in self.frozen_names():
            if name.startswith(f"{network}."):
                self._hooks.append(self.parameters[name].register_hook(torch.zeros_like))

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.deepspeed.set_gradient_accumulation_boundary(last)
        yield

    def propagate(self, loss: Tensor) -> None:
        self.deepspeed.backward(loss)

    def step(self, clip_norm: float) -> Outcome:
        # clip_norm stands in DeepSpeed's configuration
        self.deepspeed.step()
        norm = torch.as_tensor(self.deepspeed.get_global_grad_norm(), device=self.device)
        applied = bool(self.deepspeed.was_step_applied())
        if sum_over_ranks([applied], self.device)[0] not in (0, self.topology.world_size):
            raise RuntimeError("ranks disagree on whether the step was taken: the weights differ between them now")
        return Outcome(norm, applied)

    def gradients(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_grad

        found = {}
        for name, p in self.parameters.items():
            gradient = safe_get_full_grad(p)
            shape = tuple(getattr(p, "ds_shape", p.shape))
            found[name] = torch.zeros(shape) if gradient is None else gradient.detach().clone().view(shape)
        return found

    def weights(self) -> dict[str, Piece]:
        if self.stage < 3:
            return {name: share(p.detach(), self.topology) for name, p in self.parameters.items()}
        from deepspeed.utils import safe_get_local_fp32_param

        return {name: self._local(p, safe_get_local_fp32_param(p)) for name, p in self.parameters.items()}

    def whole_weights(self, network: str) -> dict[str, Tensor]:
        chosen = self._of(network)
        if self.stage < 3:
            return {name: p.detach() for name, p in chosen.items()}
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters(list(chosen.values())):
            return {name: p.detach().clone() for name, p in chosen.items()}

    def _local(self, p: Any, data: Tensor) -> Piece:
        """ZeRO-3's partition of a parameter without the padding at its end."""
        size = p.partition_numel()
        start = min(self.topology.rank * size, p.ds_numel)
        return Piece(data[: min(size, p.ds_numel - start)].detach(), start, tuple(p.ds_shape))

    def _flat_parameters(self) -> list[Tensor]:
        """The long vectors that the inner optimiser steps."""
        flat: list[Tensor] = (
            self.zero.fp32_partitioned_groups_flat if self.stage == 3 else self.zero.single_partition_of_fp32_groups
        )
        return flat

    def _materialise(self) -> None:
        """Make Adam's state, as its first step would, where it is not there yet."""
        for flat in self._flat_parameters():
            state = self.inner.state[flat]
            if not state:
                state["step"] = torch.tensor(0.0)
                state |= {key: torch.zeros_like(flat) for key in MOMENTS}
        if self.stage < 3:
            self.zero._lazy_init_hp_params_optimizer_state()

    def moments(self, *, restore: bool = False) -> dict[str, dict[str, Piece]]:
        return {key: {name: self._moment(p, key) for name, p in self.parameters.items()} for key in MOMENTS}

    def _moment(self, p: Any, key: str) -> Piece:
        if self.stage == 3:
            from deepspeed.utils import safe_get_local_optimizer_state

            return self._local(p, safe_get_local_optimizer_state(p, key))
        fragment = p._hp_mapping
        if fragment is None:  # wholly on other ranks
            return Piece(torch.zeros(0, device=self.device), 0, tuple(p.shape))
        return Piece(fragment.get_optim_state_fragment(key), fragment.lp_fragment_address.start, tuple(p.shape))

    def set_moments(self, moments: dict[str, dict[str, Piece]], steps: int) -> None:
        for key, pieces in moments.items():
            for name, piece in pieces.items():
                self._set_moment(self.parameters[name], key, piece.data)
        for flat in self._flat_parameters():
            self.inner.state[flat]["step"].fill_(float(steps))

    def _set_moment(self, p: Any, key: str, data: Tensor) -> None:
        if self.stage == 3:
            from deepspeed.utils import safe_set_local_optimizer_state

            padded = torch.zeros(p.partition_numel(), device=data.device)
            padded[: len(data)] = data
            safe_set_local_optimizer_state(p, padded, key)
        elif len(data):
            p._hp_mapping.get_optim_state_fragment(key).copy_(data)
