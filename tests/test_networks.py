"""Networks by target and arguments: what is refused before anything runs, and whose code is imported."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import lzn_dist
from lzn_dist import networks
from lzn_dist.config import Config, ConfigError, load_config
from lzn_dist.networks import network_class
from lzn_dist.objectives import build_networks
from lzn_dist.training.checkpoint import CheckpointWriter
from lzn_dist.training.step import train_step
from tests.helpers.settings import OWN, RESNET, decoder_with, encoder_with
from tests.helpers.small_run import ROOT, small_config, small_samples, small_state


@pytest.fixture(autouse=True)
def nobody_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_trusted", {"lzn_dist"})
    monkeypatch.setattr(sys, "path", [*sys.path])


def digits(*overrides: str, task: str = "joint") -> Config:
    return load_config(ROOT / "configs" / f"digits_{task}.yaml", overrides)


@pytest.mark.parametrize("overrides,says", [
    (encoder_with(blocks=[1, 1]), r"image\.encoder: ncsnpp takes no blocks; it takes channels, channel_multipliers, "),
    (encoder_with(image_size=9), r"image\.encoder\.arguments\.image_size follows from the data and the run \(8\)"),
    (decoder_with(latent_dim=9), r"image\.decoder\.arguments\.latent_dim follows from the data and the run \(32\)"),
    (encoder_with(channels="many"), r"image\.encoder\.arguments\.channels: .*integer"),
    (encoder_with(channels=1.5), r"image\.encoder\.arguments\.channels: .*integer"),
    (decoder_with(embedding="sinus"), r"image\.decoder\.arguments\.embedding: .*positional"),
    (encoder_with(channels=0), r"image\.encoder\.arguments: channels: a positive number"),
    ([RESNET, *encoder_with(dropout=0.1)], r"image\.encoder: resnet takes no dropout; it takes channels, blocks"),
    (["modalities.image.decoder.target=resnet"], "resnet is no decoder; these are: ncsnpp, transformer, or package"),
    (["modalities.image.encoder.target=vit"], "target 'vit' is neither of ncsnpp, resnet, .* nor package"),
    (["modalities.image.encoder.target=lzn_dist.models:ViT"], "cannot be imported: AttributeError"),
    (["modalities.image.encoder.target=lzn_dist.config:Config"], r"is no class of networks \(a subclass of"),
    (["modalities.image.encoder.target=os:system"], "say --trust os "),
    (["modalities.image.encoder.target=lzn_dist.models..x:y z"], "is neither of"),
])  # fmt: skip
def test_what_a_class_does_not_take_is_refused_by_name(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build_networks(digits(*overrides))


def test_another_target_begins_with_its_own_arguments() -> None:
    config = digits(RESNET, *encoder_with(channels=8, blocks=[1], stem="small"))
    assert config.network("image", "encoder").arguments == {"channels": 8, "blocks": (1,), "stem": "small"}
    assert config.network("image", "encoder").lr == 2e-3  # which is not the class's


def test_code_of_others_is_imported_only_from_packages_that_were_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "from_others.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="--trust from_others"):
        network_class("from_others:Network", "encoder")
    assert not (tmp_path / "ran").exists()
    networks.trust(["from_others"])
    with pytest.raises(ConfigError, match="cannot be imported: AttributeError"):
        network_class("from_others:Network", "encoder")
    assert (tmp_path / "ran").exists()


def test_a_run_with_networks_of_ones_own_is_loaded_by_who_trusts_them(tmp_path: Path) -> None:
    networks.trust(["tests"])
    state = small_state(small_config(*OWN))
    train_step(state, small_samples())
    writer = CheckpointWriter(tmp_path / "checkpoints", state.config, 1, nullcontext)
    writer.save(state)
    writer.close()
    networks._trusted.remove("tests")
    with pytest.raises(ConfigError, match=r"--trust tests \(or load\(\.\.\., trust=\['tests'\]\)\)"):
        lzn_dist.load(tmp_path)
    model = lzn_dist.load(tmp_path, trust=["tests"])
    assert model.generate(2, labels=1).shape == (2, 1, 8, 8)
    assert model.embed(torch.zeros(3, 1, 8, 8)).shape == (3, 32)
