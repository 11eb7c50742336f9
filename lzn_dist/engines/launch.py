"""What the launcher asked for, and the Accelerator that answers it.

The launch configurations of launch/ decide the engine; this module reads their trace in the environment. Seen with
Accelerate 1.15 and what is done about it here: `accelerate launch --cpu --num_processes 2` starts one process (refused
below); DeepSpeed is ignored without a word where Accelerate is asked for the CPU (it is not asked); FSDP2 is not
applied on the CPU (`fully_shard` is called by `engine` itself, on CUDA as well).
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

from lzn_dist.config import Config, ConfigError
from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.start import check_world, meeting
from lzn_dist.machine import cores, idle_gpu, keep_freed_memory
from lzn_dist.shipped import shipped

EngineName = Literal["single", "ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp"]


@dataclass(frozen=True)
class Launch:
    """engine and number of processes that the launcher asked for; deepspeed: its JSON, for the ZeRO engines."""

    engine: EngineName
    world_size: int
    deepspeed: dict[str, Any] | None = None

    @staticmethod
    def asked() -> Launch:
        """Read from the environment that accelerate launch (or torchrun) sets. Raises ConfigError."""
        if (
            "ACCELERATE_MIXED_PRECISION" in os.environ
            and "MASTER_ADDR" in os.environ
            and "WORLD_SIZE" not in os.environ
        ):
            # the trace of `accelerate launch --cpu --num_processes 2`: an address to meet at, and nobody to meet
            raise ConfigError(
                "accelerate was asked for several processes but started one; "
                "use `accelerate launch --config_file launch/ddp.yaml` (two processes, with or without GPUs)"
            )
        world_size = check_world()
        if _flag("ACCELERATE_USE_DEEPSPEED"):
            deepspeed = _read_deepspeed()
            zero = deepspeed.get("zero_optimization", {})
            stage = int(zero.get("stage", 0))
            if stage not in (1, 2, 3):
                raise ConfigError("DeepSpeed is used with ZeRO stage 1, 2 or 3; for stage 0 use launch/ddp.yaml")
            offload = zero.get("offload_optimizer", {}).get("device", "none") != "none"
            if offload and stage != 3:
                raise ConfigError(f"offload_optimizer is for ZeRO stage 3 (launch/zero3_offload.json), not {stage}")
            if stage == 1 and zero.get("overlap_comm"):
                # seen with 0.19.8: of several backwards in a step (gradient caching) the last one's are reduced
                raise ConfigError(
                    "overlap_comm with ZeRO stage 1: DeepSpeed loses gradients where a step has several backwards; "
                    "set it to false, or take stage 2 (launch/zero2.yaml)"
                )
            engine: EngineName = "zero3_offload" if offload else ("zero1", "zero2", "zero3")[stage - 1]
            return Launch(engine, world_size, deepspeed)
        if _flag("ACCELERATE_USE_FSDP"):
            if os.environ.get("FSDP_VERSION", "2") != "2":
                raise ConfigError("FSDP is used in its version 2: set fsdp_version: 2 as launch/fsdp.yaml does")
            return Launch("fsdp", world_size)
        return Launch("single" if world_size == 1 else "ddp", world_size)


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def _read_deepspeed() -> dict[str, Any]:
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    # ours name their JSON relative to the project
    for path in (Path(name), shipped("launch").parent / name):
        if name and path.is_file():
            try:
                found = json.loads(path.read_bytes())
            except ValueError as error:
                raise ConfigError(f"{path} is not readable JSON: {error}") from error
            if not isinstance(found, dict):
                raise ConfigError(f"{path} is no configuration of DeepSpeed: it has no keys")
            return found
    raise ConfigError(
        f"no DeepSpeed configuration {name or '(none named)'}: launch with launch/zero2.yaml, which names zero2.json"
    )


def build_accelerator(config: Config, launch: Launch) -> Accelerator:
    """This process's Accelerator; the world must be as large as the launcher said. Raises ConfigError."""
    if launch.deepspeed is not None and config.precision == "float64":
        raise ConfigError("precision=float64 is for DDP and FSDP (launch/ddp.yaml, launch/fsdp.yaml), not DeepSpeed")
    on_cpu = not torch.cuda.is_available()
    # a key of ours: launchers set OMP_NUM_THREADS to one unasked, so that it does not say what the user wants; beside
    # GPUs an optimiser whose state is offloaded steps on the CPU
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(max(1, (config.cpu_threads or cores()) // local))
    if on_cpu:
        keep_freed_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if (why := idle_gpu()) and os.environ.get("RANK", "0") == "0":
            print(why, file=sys.stderr, flush=True)
    else:
        torch.backends.cuda.matmul.allow_tf32 = config.tf32
        torch.backends.cudnn.allow_tf32 = config.tf32
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    plugin = None
    if launch.deepspeed is not None:
        plugin = DeepSpeedPlugin(hf_ds_config=_filled(launch.deepspeed, config, launch.world_size, on_cpu))
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu else "nccl", timeout=timedelta(seconds=config.collective_timeout)
    )
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # ours to apply
    if on_cpu and plugin is not None:
        import deepspeed.ops

        # an all-reduce for inference alone, which DeepSpeed would compile first, for a minute or two
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        with meeting() if launch.world_size > 1 else nullcontext():
            accelerator = Accelerator(
                cpu=on_cpu and plugin is None,
                deepspeed_plugin=plugin,
                log_with=None if config.tracking.wandb == "disabled" else "wandb",
                step_scheduler_with_optimizer=False,
                kwargs_handlers=[group] if launch.world_size > 1 or plugin is not None else [],
            )
    except dist.DistError as error:  # a port that is taken, a host that answers nobody
        raise ConfigError(f"the {launch.world_size} processes do not meet: {str(error).splitlines()[0]}") from error
    started = Topology.current().world_size
    if started != launch.world_size or accelerator.num_processes != launch.world_size:
        raise ConfigError(f"the launcher asked for {launch.world_size} processes but the world has {started}")
    if config.data.global_batch % started:
        raise ConfigError(
            f"data.global_batch={config.data.global_batch} does not divide among {started} processes; "
            f"the nearest that does: {max(1, config.data.global_batch // started) * started}"
        )
    return accelerator


def _filled(deepspeed: dict[str, Any], config: Config, world_size: int, on_cpu: bool) -> dict[str, Any]:
    """The JSON with what the run's configuration decides. Weights stay float32: autocast is the objective's.

    On a CPU no reduction goes on beside the backward: to overlap them makes it a tenth longer, with the same digits.
    """
    share = max(1, config.data.global_batch // world_size)
    waits = {"overlap_comm": False, "contiguous_gradients": False} if on_cpu else {}
    return {
        **deepspeed,
        "zero_optimization": {**deepspeed["zero_optimization"], **waits},
        "train_micro_batch_size_per_gpu": share,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.optimizer.clip_norm,
        "steps_per_print": 2**31,
    }
