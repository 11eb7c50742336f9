"""The state of a training run, and one optimisation step of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.engines.base import Engine, Group, Outcome
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks
from lzn_dist.objectives import Objective, Samples
from lzn_dist.training.grad_cache import cached_backward


@dataclass
class Counters:
    """step: optimiser steps taken. batch: global batches consumed, the cursor of the data and of all random numbers;
    larger than step by the steps that were skipped. nonfinite: skipped ones in a row. without_moments: steps at the
    start that Adam's moments know nothing of, where the run began from weights alone."""

    step: int = 0
    batch: int = 0
    nonfinite: int = 0
    without_moments: int = 0


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
    """scalars: on the device and not reduced over ranks. applied: False where the step was skipped. votes: summed."""

    scalars: dict[str, Tensor]
    applied: bool
    votes: list[float]


def train_step(state: TrainState, samples: Samples, votes: Sequence[float] = ()) -> StepResult:
    """One optimisation step on a global batch; votes: numbers of this rank of which all ranks get the sums."""
    loss, parts = compute_gradients(state, samples)
    with state.engine.watch("optimise"):
        outcome = apply_gradients(state, votes)
    return StepResult({"loss": loss, **parts, "grad_norm": outcome.norm}, outcome.applied, outcome.votes)


def compute_gradients(state: TrainState, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts on this rank's samples; the global batch's gradients are in the engine."""
    schedule(state.engine, state.counters.step, state.config)
    if state.config.micro_batch:
        return cached_backward(state.engine, state.objective, samples, state.config.micro_batch)
    return state.engine.backward(lambda networks: state.objective(networks, samples))


def apply_gradients(state: TrainState, votes: Sequence[float] = ()) -> Outcome:
    """The optimiser's step and that of the averages, unless a gradient is not finite: then all stay as they are."""
    engine, counters = state.engine, state.counters
    outcome = engine.step(state.config.optimizer.clip_norm, votes)
    counters.batch += 1
    if outcome.applied:
        counters.step += 1
        counters.nonfinite = 0
        state.ema.update({name: piece.data for name, piece in engine.weights().items()}, engine.frozen_names())
        state.objective.after_step(engine.whole_weights)
    else:
        counters.nonfinite += 1
    return outcome
