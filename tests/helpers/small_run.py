"""A small run in this process, without a launcher: networks, engine, objective and samples of the digits' shape."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lzn_dist.config import Config, load_config
from lzn_dist.objectives import Samples
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import TrainState
from tests.helpers.launching import SMALL
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
SIZES = [
    *encoder_with(channels=8), *decoder_with(channels=8, attention_resolutions=[]), "latent.dim=8", "latent.steps=5",
    "alignment.steps=5", "optimizer.warmup_steps=2",
]  # fmt: skip


def small_config(*overrides: str, task: str = "joint") -> Config:
    dropout = [] if task == "representation" else encoder_with(dropout=0.2)  # a ResNet takes none
    return load_config(ROOT / "configs" / f"digits_{task}.yaml", [*SIZES, *dropout, *overrides])


def small_state(config: Config) -> TrainState:
    return single_state(config, torch.device("cpu"))


def small_samples(batch: int = 0, count: int = 12, dtype: torch.dtype = torch.float32, views: int = 1) -> Samples:
    generator = torch.Generator().manual_seed(batch)

    def images() -> Tensor:
        return (torch.rand(count, 1, 8, 8, generator=generator) * 2 - 1).to(dtype)

    index = torch.arange(count) + 100 * batch
    return Samples(batch, index, torch.arange(count), {"image": tuple(images() for _ in range(views))}, index % 10)


SMALL_RUN = [
    *SMALL, *decoder_with(attention_resolutions=[]), "log_every=1", "checkpoint_every=2", "precision=float64",
    "cpu_threads=1",
]  # fmt: skip


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
