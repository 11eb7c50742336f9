"""The engine of a run: Accelerate, asked for what the launch configuration says and checked against it."""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from lzn_dist.config import Config, ConfigError
from lzn_dist.distributed.topology import Topology


def check_launch() -> None:
    """Refuse a launch that asked for several processes and started one.

    `accelerate launch --cpu --num_processes 2` starts a single process and says nothing (seen with 1.15). Its trace
    is a rendezvous address without a world size. Raises ConfigError.
    """
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            "accelerate was asked for several processes but started one; "
            "use `accelerate launch --config_file launch/ddp.yaml` (two processes, with or without GPUs)"
        )


def build_accelerator(config: Config) -> Accelerator:
    """The Accelerator of this process; the world must be as large as the launcher said. Raises ConfigError."""
    check_launch()
    use_cpu = not torch.cuda.is_available()
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if use_cpu:
        # the launchers set one thread a process; share the machine's cores instead
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))
    else:
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        log_with=None if config.tracking.wandb == "disabled" else "wandb",
        step_scheduler_with_optimizer=False,
    )
    started = Topology.current().world_size
    if started != asked or accelerator.num_processes != asked:
        raise ConfigError(f"the launcher asked for {asked} processes but the world has {started}")
    if config.data.global_batch % started:
        raise ConfigError(
            f"data.global_batch={config.data.global_batch} does not divide among {started} processes; "
            f"the nearest that does: {max(1, config.data.global_batch // started) * started}"
        )
    return accelerator


def same_everywhere(value: str | None) -> str | None:
    """The main process's value on every process (which checkpoint to resume from, say)."""
    shared: list[str | None] = [value]
    broadcast_object_list(shared)
    return shared[0]
