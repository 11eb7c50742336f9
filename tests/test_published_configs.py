"""The configurations of the case studies: the published networks' sizes, rates and steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lzn_dist.config import load_config
from lzn_dist.evaluation.linear_probe import ProbeSettings
from lzn_dist.objectives import build_networks

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize("name,encoder,decoder,labels", [
    ("cifar10_generation", 49_790_260, 61_906_819, 0), ("cifar10_joint", 49_790_260, 61_911_939, 2000),
    ("afhq_cat_generation", 87_768_896, 65_676_821, 0), ("celeba_hq_generation", 87_768_896, 65_676_821, 0),
    ("lsun_bedroom_generation", 87_768_896, 65_676_821, 0), ("imagenet_representation", 28_231_232, 0, 0),
])  # fmt: skip
def test_networks_have_the_published_number_of_parameters(name: str, encoder: int, decoder: int, labels: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        networks = build_networks(config)
    counts = [
        0 if part is None else sum(p.numel() for p in part.parameters() if p.requires_grad)
        for part in map(networks.named().get, ("image.encoder", "image.decoder", "label.encoder"))
    ]
    assert counts == [encoder, decoder, labels]


@pytest.mark.parametrize("name,batch,steps,rates,average", [
    ("cifar10_generation", 2000, 50_000, (2.5e-5, 1e-3), 0.999999),
    ("cifar10_joint", 2000, 200_000, (5e-5, 2e-3), 0.999999),
    ("afhq_cat_generation", 256, 60_000, (2e-6, 2e-4), 0.999999),
    ("celeba_hq_generation", 256, 350_000, (4e-6, 2e-4), 0.9999),
    ("lsun_bedroom_generation", 256, 2_050_000, (2e-6, 2e-4), 0.99999),
])  # fmt: skip
def test_published_settings(name: str, batch: int, steps: int, rates: tuple[float, float], average: float) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    optimizer = config.optimizer
    assert (config.data.global_batch, config.max_steps) == (batch, steps)
    networks = [config.network("image", role) for role in ("encoder", "decoder")]
    assert (*(network.lr for network in networks), optimizer.ema_decay) == (*rates, average)
    assert (optimizer.warmup_steps, optimizer.clip_norm) == (5000, 1.0)
    assert (config.latent.dim, config.latent.solver, config.latent.steps) == (200, "dpm_solver_pp", 20)
    assert config.data.flip and config.precision == "float32" and config.latent.noise_scale == 1.0
    assert (config.flow.sampler, config.flow.sampler_steps, config.flow.t_min) == ("dopri5", 10, 1e-3)
    dropout = 0.15 if config.data.image_size == 32 else 0.0
    assert [network.arguments["dropout"] for network in networks] == [dropout, dropout]


def test_imagenets_published_settings() -> None:
    config = load_config(CONFIGS / "imagenet_representation.yaml")
    optimizer, data, probe = config.optimizer, config.data, ProbeSettings()
    assert (data.global_batch, data.image_size, data.resize, data.views) == (8192, 224, 256, "simclr")
    assert config.max_steps == 5_000_000 and config.precision == "float32"
    assert config.network("image", "encoder").lr == 8e-4
    assert (optimizer.ema_decay, optimizer.warmup_steps, optimizer.clip_norm) == (0.9999, 5000, 1.0)
    latent, alignment = config.latent, config.alignment
    assert (latent.dim, latent.solver, latent.steps, latent.noise_scale) == (256, "euler", 20, 0.45)
    assert (alignment.steps, alignment.cutoff, alignment.kind) == (20, 0.2, "cross_entropy")
    assert (probe.epochs, probe.batch, probe.lr) == (300, 8192, 3e-4)


def test_the_joint_study_stops_its_decoder() -> None:
    config = load_config(CONFIGS / "cifar10_joint.yaml")
    assert config.network("image", "decoder").stop == 60_000 and config.network("label", "encoder").lr == 1e-4
    assert (config.alignment.kind, config.alignment.steps, config.alignment.cutoff) == ("probability", 100, 0.2)
