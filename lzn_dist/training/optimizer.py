"""Adam, and the learning rates of its groups."""

from __future__ import annotations

import torch

from lzn_dist.config import Config
from lzn_dist.engines.base import Engine, Group
from lzn_dist.networks import Networks


def make_optimizer(networks: Networks, config: Config) -> torch.optim.Optimizer:
    """Adam with one group a network (paper, appendix: settings of the case studies)."""
    settings = config.optimizer
    rates = {"encoder": settings.encoder_lr, "decoder": settings.decoder_lr, "label_anchors": settings.label_lr}
    groups: list[Group] = []
    for name, rate in rates.items():
        module = getattr(networks, name)
        if module is not None:
            parameters = [p for p in module.parameters() if p.requires_grad]
            groups.append({"name": name, "params": parameters, "lr": rate})
    return torch.optim.Adam(groups, betas=settings.betas, eps=settings.eps)


def schedule(engine: Engine, step: int, config: Config) -> None:
    """Learning rates of the step after `step` completed ones: linear from lr/warmup_steps, constant, or 0."""
    settings = config.optimizer
    factor = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    peak = {"encoder": settings.encoder_lr, "decoder": settings.decoder_lr, "label_anchors": settings.label_lr}
    stop = {"encoder": settings.encoder_stop, "decoder": settings.decoder_stop, "label_anchors": settings.label_stop}
    for group in engine.groups:
        last = stop[group["name"]]
        if last is not None and step >= last:
            engine.freeze(group)
        else:
            group["lr"] = peak[group["name"]] * factor
