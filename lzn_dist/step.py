"""The state of a training run, and one optimisation step of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.distributed.engine import Engine, Group
from lzn_dist.distributed.grad_cache import cached_backward
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks
from lzn_dist.objectives import Objective, Samples


@dataclass
class Counters:
    """step: optimiser steps taken. batch: global batches consumed, the cursor of the data and of all random numbers;
    larger than step by the steps that were skipped. nonfinite: skipped ones in a row."""

    step: int = 0
    batch: int = 0
    nonfinite: int = 0


@dataclass
class TrainState:
    """Everything that a step changes."""

    config: Config
    engine: Engine
    objective: Objective
    ema: EMA
    counters: Counters = field(default_factory=Counters)


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


@dataclass
class StepResult:
    """scalars: on the device and not reduced over ranks. applied: False where the step was skipped. stop: asked for."""

    scalars: dict[str, Tensor]
    applied: bool
    stop: bool


def train_step(state: TrainState, samples: Samples, stop: bool = False) -> StepResult:
    """One optimisation step on a global batch; stop: this rank was told to end (all ranks hear of it)."""
    engine, config, counters = state.engine, state.config, state.counters
    schedule(engine, counters.step, config)
    if config.micro_batch:
        loss, parts = cached_backward(engine, state.objective, samples, config.micro_batch)
    else:
        loss, parts = engine.backward(lambda networks: state.objective(networks, samples))
    with engine.watch("optimise"):
        outcome = engine.step(config.optimizer.clip_norm, stop)
        counters.batch += 1
        if outcome.applied:
            counters.step += 1
            counters.nonfinite = 0
            frozen = engine.frozen_names()
            state.ema.update({name: p.data for name, p in engine.weights().items()}, frozen)
        else:
            counters.nonfinite += 1
    return StepResult({"loss": loss, **parts, "grad_norm": outcome.norm}, outcome.applied, outcome.stop)
