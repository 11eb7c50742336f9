"""The state of a training run, and one optimisation step of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lzn_dist.config import Config
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks
from lzn_dist.objectives import Losses, Objective, Samples


class LossModule(nn.Module):
    """Networks with their objective: what the engine wraps, one forward a step, whatever the task."""

    def __init__(self, networks: Networks, objective: Objective) -> None:
        super().__init__()
        self.networks = networks
        self.objective = objective

    def forward(self, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
        losses: Losses = self.objective(self.networks, samples)
        return losses.total, {name: value.detach() for name, value in losses.parts.items()}


@dataclass
class TrainState:
    """step: completed optimiser steps. model: the engine's wrapping of LossModule(networks, objective)."""

    config: Config
    networks: Networks
    objective: Objective
    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: EMA
    step: int = 0


def parameter_groups(networks: Networks, config: Config) -> list[dict[str, object]]:
    """One group a network with its peak learning rate (paper, appendix: settings of the case studies)."""
    rates = {
        "encoder": config.optimizer.encoder_lr,
        "decoder": config.optimizer.decoder_lr,
        "label_anchors": config.optimizer.label_lr,
    }
    groups: list[dict[str, object]] = []
    for name, rate in rates.items():
        module = getattr(networks, name)
        if module is not None:
            parameters = [p for p in module.parameters() if p.requires_grad]
            groups.append({"name": name, "params": parameters, "lr": rate, "peak_lr": rate})
    return groups


def warm_up(step: int, config: Config) -> float:
    """Factor of the learning rates in the step after `step` completed ones: linear from 1/warmup_steps to 1."""
    return min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))


def trainable(networks: nn.Module) -> Iterator[nn.Parameter]:
    return (p for p in networks.parameters() if p.requires_grad)


def train_step(state: TrainState, accelerator: Accelerator, samples: Samples) -> dict[str, Tensor]:
    """One optimisation step on a global batch; returns its scalars, on the device and not yet reduced over ranks."""
    watch = state.objective.watch
    factor = warm_up(state.step, state.config)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    loss, parts = state.model(samples)
    with watch("backward"):
        state.optimizer.zero_grad(set_to_none=True)
        accelerator.backward(loss)
    with watch("optimise"):
        norm = accelerator.clip_grad_norm_(trainable(state.networks), state.config.optimizer.clip_norm)
        state.optimizer.step()
        state.step += 1
        state.ema.update(state.networks)
    return {"loss": loss.detach(), **parts, "grad_norm": torch.as_tensor(norm)}
