"""The engine that the launcher asked for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator

from lzn_dist.config import Config, ConfigError
from lzn_dist.engines.activation_checkpointing import checkpoint_activations
from lzn_dist.engines.base import Engine
from lzn_dist.engines.launch import Launch
from lzn_dist.networks import Networks


def build_engine(
    config: Config, launch: Launch, networks: Networks, optimizer: Callable[[], torch.optim.Optimizer],
    accelerator: Accelerator,
) -> Engine:  # fmt: skip
    """The launch's engine, or ConfigError where another one would run.

    networks: whole, with their initial or resumed weights. optimizer: makes the optimiser of the networks' parameters,
    as they are after sharding.
    """
    checkpointed = checkpoint_activations(networks, config.activation_checkpointing)
    if config.compile:
        for network in networks.named().values():
            network.compile()
    engine: Engine
    # each engine's libraries are imported where they are used: DeepSpeed's alone take seconds
    if launch.deepspeed is not None:
        from lzn_dist.engines.zero import ZeROEngine

        engine = ZeROEngine(networks, optimizer(), accelerator, checkpointed)
    elif launch.engine == "fsdp":
        from lzn_dist.engines.fsdp import FSDPEngine

        engine = FSDPEngine(networks, optimizer)
    elif launch.engine == "ddp":
        from lzn_dist.engines.ddp import DDPEngine

        engine = DDPEngine(networks, optimizer, accelerator)
    else:
        from lzn_dist.engines.single import SingleEngine

        engine = SingleEngine(networks, optimizer)
    runs = engine.running()
    if runs != launch.engine:
        raise ConfigError(f"the launch configuration asks for engine {launch.engine}, but {runs} is what would run")
    return engine
