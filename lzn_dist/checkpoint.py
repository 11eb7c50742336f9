"""Checkpoints: everything a run needs to go on, written atomically.

A checkpoint is a folder ``checkpoints/step_00000100`` that appears under its name only when it is complete (written
beside, synced, renamed); ``checkpoints/latest`` names the newest complete one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from lzn_dist.config import Config, load_config, save_config
from lzn_dist.models.ema import EMA
from lzn_dist.networks import Networks, build_networks
from lzn_dist.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing, incomplete or of another model; the message says what to do."""


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    _sync(temporary)
    temporary.replace(path)


def save_checkpoint(state: TrainState, folder: Path) -> Path:
    """Write the state's checkpoint under `folder` (the run's ``checkpoints``); call on the main process alone."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step_{state.step:08d}"
    temporary = folder / f".{final.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    content = {
        "step": state.step,
        "networks": state.networks.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
    }
    torch.save(content, temporary / "state.pt")
    save_config(state.config, temporary / "config.yaml")
    for file in temporary.iterdir():
        _sync(file)
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    _sync(folder)
    _write_text(folder / "latest", final.name)
    for old in complete_checkpoints(folder)[: -state.config.keep_last]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.pt").is_file())


def find_checkpoint(run_or_checkpoint: str | Path) -> Path:
    """The checkpoint itself, or a run folder's newest complete one. Raises CheckpointError."""
    path = Path(run_or_checkpoint)
    if (path / "state.pt").is_file():
        return path
    found = complete_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(f"no complete checkpoint in {path}: train a run there first, or name another folder")
    return found[-1]


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read ({error}); name an older checkpoint") from error
    return content


def _load_weights(networks: Networks, weights: dict[str, Any], path: Path) -> None:
    try:
        networks.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path} is of another model than the configuration describes: {first}") from None


def resume(state: TrainState, path: Path) -> None:
    """Put a checkpoint's weights, averages, moments and step into the state. Raises CheckpointError."""
    content = _read(path)
    _load_weights(state.networks, content["networks"], path)
    state.ema.load_state_dict(content["ema"])
    state.optimizer.load_state_dict(content["optimizer"])
    state.step = int(content["step"])


def load_networks(run_or_checkpoint: str | Path) -> tuple[Networks, Config, int]:
    """Networks with the averaged (EMA) weights in evaluation mode, their configuration, and the step.

    Raises CheckpointError for a folder without a complete checkpoint or one of another model.
    """
    path = find_checkpoint(run_or_checkpoint)
    config = load_config(path / "config.yaml")
    networks = build_networks(config)
    content = _read(path)
    _load_weights(networks, content["networks"], path)
    averages = EMA(networks, config.optimizer.ema_decay)
    averages.load_state_dict(content["ema"])
    averages.copy_to(networks)
    return networks.eval(), config, int(content["step"])
