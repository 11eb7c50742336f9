"""Adam, and the learning rates of its groups."""

from __future__ import annotations

import torch

from lzn_dist.config import Config
from lzn_dist.engines.base import Engine, Group
from lzn_dist.networks import Networks


def make_optimizer(networks: Networks, config: Config) -> torch.optim.Optimizer:
    """Adam with one group a network (paper, appendix: settings of the case studies)."""
    settings = config.optimizer
    groups: list[Group] = []
    for name, network in networks.named().items():
        parameters = [p for p in network.parameters() if p.requires_grad]
        groups.append({"name": name, "params": parameters, "lr": config.network(*name.split(".")).lr})
    return torch.optim.Adam(groups, betas=settings.betas, eps=settings.eps)


def schedule(engine: Engine, step: int, config: Config) -> None:
    """Learning rates of the step after `step` completed ones: linear from lr/warmup_steps, constant, or 0."""
    factor = min(1.0, (step + 1) / max(1, config.optimizer.warmup_steps))
    for group in engine.groups:
        network = config.network(*group["name"].split("."))
        if network.stop is not None and step >= network.stop:
            engine.freeze(group)
        else:
            group["lr"] = network.lr * factor
