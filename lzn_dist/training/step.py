"""The state of a training run, and one optimisation step of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lzn_dist.config import Config
from lzn_dist.engines.base import Engine, Outcome
from lzn_dist.models.ema import EMA
from lzn_dist.objectives import Objective, Samples
from lzn_dist.training.grad_cache import cached_backward
from lzn_dist.training.optimizer import schedule
from lzn_dist.training.stopwatch import Stopwatch


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
    watch: Stopwatch = field(default_factory=Stopwatch)


@dataclass
class StepResult:
    """scalars: on the device and not reduced over ranks. applied: False where the step was skipped."""

    scalars: dict[str, Tensor]
    applied: bool


def train_step(state: TrainState, samples: Samples) -> StepResult:
    """One optimisation step on a global batch."""
    loss, parts = compute_gradients(state, samples)
    with state.watch("optimise"):
        outcome = apply_gradients(state)
    return StepResult({"loss": loss, **parts, "grad_norm": outcome.norm}, outcome.applied)


def goes_back_apart(state: TrainState) -> bool:
    """Whether each use of a network has a backward of its own, as gradient caching has them, though nobody asked for
    micro-batches: the engine knows no other way."""
    return state.engine.uses_once and state.objective.needs.twice and not state.config.micro_batch


def compute_gradients(state: TrainState, samples: Samples) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its parts on this rank's samples; the global batch's gradients are in the engine."""
    schedule(state.engine, state.counters.step, state.config)
    micro_batch = state.config.micro_batch or (len(samples) if goes_back_apart(state) else 0)
    if micro_batch:
        return cached_backward(state.engine, state.objective, samples, micro_batch, state.watch)
    return state.engine.backward(lambda networks: state.objective(networks, samples))


def apply_gradients(state: TrainState) -> Outcome:
    """The optimiser's step and that of the averages, unless a gradient is not finite: then all stay as they are."""
    engine, counters = state.engine, state.counters
    outcome = engine.step(state.config.optimizer.clip_norm)
    counters.batch += 1
    if outcome.applied:
        counters.step += 1
        counters.nonfinite = 0
        state.ema.update({name: piece.data for name, piece in engine.weights().items()}, engine.frozen_names())
        state.objective.after_step(engine.whole_weights)
    else:
        counters.nonfinite += 1
    return outcome
