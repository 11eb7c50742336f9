"""A new run that starts with what another one, or an exported model, has learned."""

from __future__ import annotations

from pathlib import Path

import torch

from lzn_dist.config import Config, ConfigError
from lzn_dist.exchange import ExportError, Loaded, is_export, read_export
from lzn_dist.networks import Networks
from lzn_dist.paths import expand_path
from lzn_dist.training.checkpoint import CheckpointError, load_networks


@torch.no_grad()
def start_from(networks: Networks, config: Config) -> list[str]:
    """Fill fresh networks with the averaged weights of `init_from`, as far as names and shapes agree; returns lines
    that say what was taken, what is new here and what was left out there.

    Raises ConfigError where nothing fits, where a network of `init_networks` is missing on either side, and for text
    networks of another tokenizer.
    """
    source = _source(Path(expand_path(config.init_from)))
    here, there = networks.named(), source.networks.named()
    wanted = config.init_networks or tuple(name for name in here if name in there)
    for name in wanted:
        for where, known in ((config.init_from, there), ("this run", here)):
            if name not in known:
                raise ConfigError(f"init_networks: {where} has no {name}, but {', '.join(known)}")
    ours, theirs = config.data.tokenizer_sha256, source.config.data.tokenizer_sha256
    if any(name.startswith("text.") for name in wanted) and ours != theirs:
        raise ConfigError(
            f"init_from={config.init_from} was trained with another tokenizer (SHA-256 {theirs[:12] or 'unknown'}…): "
            "set data.tokenizer to its tokenizer.json, or init_networks without text"
        )
    taken, new, left = 0, [], []
    for name in wanted:
        mine, other = here[name].state_dict(), there[name].state_dict()
        for key, value in mine.items():
            if key in other and other[key].shape == value.shape:
                value.copy_(other[key])
                taken += value.numel()
            else:
                why = f" (there {_shape(other[key])}, here {_shape(value)})" if key in other else ""
                new.append(f"{name}.{key}{why}")
        left += [f"{name}.{key}" for key in other if key not in mine]
    if not taken:
        raise ConfigError(
            f"init_from={config.init_from} has no network that fits: it has {', '.join(there)}, this run "
            f"{', '.join(here)}" + (f"; of these, shapes differ: {new[0]}" if new else "")
        )
    lines = [f"started from {config.init_from} at step {source.step}: {taken:,} numbers of {', '.join(wanted)}"]
    whole_new = [name for name in here if name not in wanted]
    if whole_new or new:
        lines.append(f"new here: {_listed(whole_new + new)}")
    whole_left = [name for name in there if name not in wanted]
    if whole_left or left:
        lines.append(f"left out there: {_listed(whole_left + left)}")
    return lines


def _source(path: Path) -> Loaded:
    try:
        return read_export(path) if is_export(path) else load_networks(path)
    except (CheckpointError, ExportError) as error:
        raise ConfigError(f"init_from: {error}") from error


def _shape(value: torch.Tensor) -> str:
    return "×".join(map(str, value.shape)) or "a number"


def _listed(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
