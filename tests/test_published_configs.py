"""The configurations of the case studies: the published networks' sizes, rates and steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lzn_dist.config import load_config
from lzn_dist.objectives import build_networks
from lzn_dist.training.optimizer import schedule

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


def test_rates_warm_up_and_the_joint_studys_decoder_stops_alone() -> None:
    """Appendix, settings of the case studies: lr/5000 at first, the whole from step 5,000 on; the decoder to 60,000."""
    config = load_config(CONFIGS / "cifar10_joint.yaml")
    engine = SimpleNamespace(groups=[{"name": name} for name in ("image.encoder", "image.decoder", "label.encoder")])
    engine.freeze = lambda group: group.update(lr=0.0)
    for step, share, decoder in ((0, 1 / 5000, 1), (2499, 0.5, 1), (5000, 1.0, 1), (59_999, 1.0, 1), (60_000, 1.0, 0)):
        schedule(engine, step, config)  # type: ignore[arg-type]
        rates = [group["lr"] for group in engine.groups]
        assert rates == pytest.approx([5e-5 * share, 2e-3 * share * decoder, 1e-4 * share])
