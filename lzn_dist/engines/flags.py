"""Flags and configuration files of launchers, as they show in a process: obeyed where they mean a key of ours, else
refused. What only says how accelerate itself would wrap a model (FSDP's wrapping policy, say) has no effect here."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lzn_dist.config import Config, ConfigError

# keys of a DeepSpeed configuration that the run's own configuration decides
_DEEPSPEED = {
    "optimizer": "optimizer.*", "scheduler": "optimizer.warmup_steps", "fp16": "precision=bf16",
    "bf16": "precision=bf16", "amp": "precision=bf16", "torch_autocast": "precision=bf16",
    "train_batch_size": "data.global_batch", "train_micro_batch_size_per_gpu": "data.global_batch and micro_batch",
    "gradient_accumulation_steps": "micro_batch", "gradient_clipping": "optimizer.clip_norm",
    "activation_checkpointing": "activation_checkpointing",
}  # fmt: skip


def obey(config: Config, deepspeed: Mapping[str, Any] | None, environment: Mapping[str, str] | None = None) -> Config:
    """The configuration with what the launcher says of it. environment: a process's, this one's by default.

    Raises ConfigError for what means nothing here, and where launcher and configuration say different things.
    """
    found = os.environ if environment is None else environment
    _refuse(found, deepspeed or {}, config)
    changes: dict[str, Any] = {}
    precision = found.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision == "bf16":
        changes["precision"] = "bf16"
    elif precision != "no":
        raise ConfigError(f"mixed_precision {precision} is not supported: bf16 is, as the key precision=bf16")
    backend = found.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    modes = [found.get(f"ACCELERATE_DYNAMO_{name}", "").lower() for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC")]
    if backend == "inductor" and all(mode in ("", "default", "false") for mode in modes):
        changes["compile"] = True
    elif backend != "no":
        raise ConfigError(
            f"dynamo_backend {backend} (mode {modes[0]}) is not supported: leave it out, set compile=true"
        )
    for key, value in changes.items():
        if key in config.model_fields_set and getattr(config, key) != value:
            raise ConfigError(
                f"the launcher asks for {key}={str(value).lower()}, the configuration says "
                f"{key}={str(getattr(config, key)).lower()}: make them the same (accelerate's flags and its "
                "configuration file count, also the default one)"
            )
    if environment is None:
        for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND"):  # ours to do, not also accelerate's
            if name in os.environ:
                os.environ[name] = "no"
        # accelerate ends at these fields of its own file, whatever they say; what they say has been looked at
        os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(set(_fields(found)) - _LOOKED_AT)
        if changes and os.environ.get("RANK", "0") == "0":
            print(f"as the launcher asks: {', '.join(f'{key}={str(v).lower()}' for key, v in changes.items())}")
    return config.model_copy(update=changes)


_LOOKED_AT = {"mixed_precision", "gradient_accumulation_steps", "gradient_clipping"}


def _fields(found: Mapping[str, str]) -> list[str]:
    """What accelerate's own configuration file says of DeepSpeed, by name."""
    return [name for name in found.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",") if name]


def _refuse(found: Mapping[str, str], deepspeed: Mapping[str, Any], config: Config) -> None:
    def on(name: str) -> bool:
        return found.get(name, "false").lower() in ("true", "1", "yes")

    steps = found.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or _flag_of_launcher("gradient_accumulation_steps")
    if steps not in ("", "1", "auto", None):
        raise ConfigError(
            f"gradient_accumulation_steps {steps} of the launcher: data.global_batch is the batch of one step here, "
            "micro_batch=N how many samples are in memory at once: set these and leave it out"
        )
    clip = found.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clip not in ("none", "auto") and float(clip) != config.optimizer.clip_norm:
        raise ConfigError(f"gradient_clipping {clip} of the launcher is the key optimizer.clip_norm={clip} here")
    for name, advice in {
        "ACCELERATE_USE_MEGATRON_LM": "use launch/ddp.yaml, fsdp.yaml or a zero*.yaml",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "leave parallelism_config out: data parallelism is all there is",
        "FSDP_OFFLOAD_PARAMS": "launch/zero3_offload.yaml keeps state in the host's memory",
        "FSDP_ACTIVATION_CHECKPOINTING": "set activation_checkpointing=selective or full",
    }.items():
        if on(name):
            raise ConfigError(f"{name.removeprefix('ACCELERATE_').lower()} of the launcher is not supported: {advice}")
    if found.get("FSDP_RESHARD_AFTER_FORWARD", "true") not in ("true", "FULL_SHARD"):
        raise ConfigError("fsdp_reshard_after_forward: false is not supported: use launch/zero2.yaml, or leave it out")
    if on("ACCELERATE_USE_CPU") and _has_gpu():
        raise ConfigError("accelerate is asked for the CPU, and there is a GPU: hide it with CUDA_VISIBLE_DEVICES=''")
    decided = [name for name in _fields(found) if name in ("zero_stage", "zero3_save_16bit_model") or "offload" in name]
    if decided:
        raise ConfigError(
            f"{', '.join(decided)} of accelerate's configuration file: the DeepSpeed configuration that it names "
            "decides this; leave it out, and choose launch/zero1.yaml, zero2.yaml, zero3.yaml or zero3_offload.yaml"
        )
    for key, ours in _DEEPSPEED.items():
        value = deepspeed.get(key)
        off = value in (None, "auto", {}) or (isinstance(value, dict) and value.get("enabled") in (False, "auto"))
        same = (key == "gradient_accumulation_steps" and value == 1) or (
            key == "gradient_clipping" and value == config.optimizer.clip_norm
        )
        if not off and not same:
            raise ConfigError(f"{key} of the DeepSpeed configuration is the key {ours} here: leave it out there")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _flag_of_launcher(name: str) -> str:
    """The value of a flag that accelerate passes on to DeepSpeed alone: from its command line, where it can be read."""
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_text(errors="replace").split("\0")
    except (OSError, UnicodeDecodeError):
        return ""
    if not any("accelerate" in word for word in words[:4]):
        return ""
    for place, word in enumerate(words):
        if word.endswith(".py") and "accelerate" not in word:  # what follows is the script's
            return ""
        match = re.fullmatch(rf"--{name.replace('_', '[-_]')}(=(.*))?", word)
        if match:
            return match[2] if match[1] else words[place + 1]
    return ""
