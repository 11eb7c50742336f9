"""From a configuration to a stream of samples and a state to train: what the entry points share."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import Accelerator

from lzn_dist.config import Config
from lzn_dist.data.captions import TOKENIZER
from lzn_dist.distributed import Topology, gather_anchors, ring_field
from lzn_dist.distributed.collectives import broadcast_object
from lzn_dist.engines.base import Engine
from lzn_dist.engines.build import build_engine
from lzn_dist.engines.launch import Launch
from lzn_dist.engines.single import SingleEngine
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks
from lzn_dist.objectives import Objective, build_networks, build_objective
from lzn_dist.training.checkpoint import (
    CheckpointError,
    RunRecord,
    config_of,
    held_checkpoint,
    load_weights,
    resume_state,
)
from lzn_dist.training.grad_cache import check_batch_independent
from lzn_dist.training.init_from import start_from
from lzn_dist.training.optimizer import make_optimizer
from lzn_dist.training.step import TrainState, goes_back_apart
from lzn_dist.zones import block_class


def fresh_networks(config: Config, device: torch.device) -> Networks:
    """The networks at the start of a run: the same on every rank, in training mode."""
    torch.manual_seed(config.seed)
    networks = build_networks(config).to(device)
    return (networks.double() if config.precision == "float64" else networks).train()


def make_objective(config: Config, networks: Networks) -> Objective:
    """The configured objective over all ranks."""
    return build_objective(config, networks, gather_anchors, ring_field() if config.anchors == "ring" else None)


def build_state(config: Config, launch: Launch, accelerator: Accelerator, checkpoint: Path | None) -> TrainState:
    """Fresh state, or that of a checkpoint. Raises ConfigError, CheckpointError, and ValueError for a backend of the
    zones that cannot be here."""
    if config.objective == "lzn":
        block_class(config.backend, torch.empty(0, config.latent.dim, device=accelerator.device))
    networks = fresh_networks(config, accelerator.device)
    if config.micro_batch:
        check_batch_independent(networks)
    if checkpoint is not None:
        _check_tokenizer(config, checkpoint)
        load_weights(networks, checkpoint)
    elif config.init_from:
        for line in start_from(networks, config):
            accelerator.print(line)
    objective = make_objective(config, networks)
    engine = build_engine(config, launch, networks, lambda: make_optimizer(networks, config), accelerator)
    state = _state(config, engine, objective)
    if checkpoint is not None:
        resume_state(state, checkpoint)
    return state


def _check_tokenizer(config: Config, checkpoint: Path) -> None:
    """Raises CheckpointError where the checkpoint's numbers stand for other texts."""
    ours, theirs = config.data.tokenizer_sha256, config_of(checkpoint).data.tokenizer_sha256
    if ours and theirs and ours != theirs:
        raise CheckpointError(
            f"{checkpoint} was trained with another tokenizer (SHA-256 {theirs[:12]}…) than data.tokenizer or the "
            f"shards have now ({ours[:12]}…): set data.tokenizer={checkpoint / TOKENIZER}"
        )


def single_state(config: Config, device: torch.device) -> TrainState:
    """Fresh state of one process, whatever the world around it: no collective, all anchors at hand."""
    networks = fresh_networks(config, device)
    objective = build_objective(config, networks, lambda anchors: anchors)
    engine = SingleEngine(networks, lambda: make_optimizer(networks, config))
    return _state(config, engine, objective)


def _state(config: Config, engine: Engine, objective: Objective) -> TrainState:
    """With its clocks around what they time."""
    averages = EMA({name: piece.data for name, piece in engine.weights().items()}, config.optimizer.ema_decay)
    state = TrainState(config, engine, objective, averages)
    state.watch.around(objective, encode="encode", relate="flow", decode="decode")
    state.watch.around(engine, propagate="backward")
    return state


def checkpoint_to_resume(config: Config, held: ExitStack | None) -> Path | None:
    """The checkpoint that `resume` names, the same on every rank; None for a fresh start. Raises CheckpointError.

    held: as for `shared_checkpoint`.
    """
    if config.resume == "none":
        return None
    named = config.output_dir if config.resume == "auto" else config.resume
    return shared_checkpoint(named, held, needed=config.resume != "auto")


def shared_checkpoint(named: str | Path, held: ExitStack | None, *, needed: bool = True) -> Path | None:
    """A checkpoint, or a run's newest, the same on every rank, while a run may be writing newer ones. Raises
    CheckpointError; not where there is none and it is not `needed`. Collective.

    held: on the main process, keeps it from being removed for as long as it is open; None on the others.
    """
    found = error = None
    if held is not None:
        try:
            found = str(held.enter_context(held_checkpoint(named)))
            RunRecord.checked(Path(found))
        except CheckpointError as problem:
            error = str(problem) if needed or found is not None else None
    found, error = broadcast_object(found), broadcast_object(error)
    if error is not None:
        raise CheckpointError(error)
    return None if found is None else Path(found)


def describe(state: TrainState) -> str:
    """The engine that runs, for people."""
    world = Topology.current().world_size
    apart = ", gradient caching (ZeRO-3 recomputes a network once a backward)" if goes_back_apart(state) else ""
    return f"engine {state.engine.running()} on {world} process(es) of {state.engine.device.type}{apart}"
