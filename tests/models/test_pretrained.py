"""Text encoders from folders that others wrote; here tiny ones, written on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from lzn_dist.config import ConfigError
from lzn_dist.models import PretrainedTextEncoder, StaticTextEncoder
from lzn_dist.objectives import build_networks
from lzn_dist.training.optimizer import make_optimizer
from tests.test_text import TEXT, gradients, small_state, text_config, text_samples


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("a #model")
    torch.manual_seed(3)
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                        max_position_embeddings=24)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_model_is_its_own(bert: Path) -> None:
    encoder = PretrainedTextEncoder(folder=str(bert), vocabulary=40, text_length=16, latent_dim=8)
    model = BertModel.from_pretrained(bert).eval()
    tokens = text_samples().view(TEXT)
    encoder.train()  # no dropout
    found = encoder.features(tokens)
    row = tokens[3][tokens[3] >= 0][None]
    with torch.no_grad():
        states = model(input_ids=row).last_hidden_state
    torch.testing.assert_close(found[3], states[0].mean(0), atol=1e-5, rtol=1e-4)
    first = PretrainedTextEncoder(folder=str(bert), vocabulary=40, text_length=16, latent_dim=8, pool="first")
    torch.testing.assert_close(first.features(tokens)[3], states[0, 0], atol=1e-5, rtol=1e-4)
    assert [type(block).__name__ for block in encoder.blocks()].count("BertLayer") == 2
    anchors = encoder(tokens)
    assert anchors.shape == (12, 8) and not any(p.requires_grad for p in encoder.model.parameters())


@pytest.mark.parametrize("trained", [False, True])
def test_it_is_trained_as_any_other(bert: Path, trained: bool) -> None:
    own = [
        "modalities.text.encoder.target=pretrained",
        f"modalities.text.encoder.arguments.folder={json.dumps(str(bert))}",
        f"modalities.text.encoder.arguments.trained={str(trained).lower()}",
    ]  # fmt: skip
    config = text_config(*own, "data.text_length=16")
    whole, cached = (
        gradients(small_state(text_config(*own, "data.text_length=16", *more)), text_samples())
        for more in ([], ["micro_batch=5"])
    )
    names = [name for name in whole[1] if name.startswith("text.encoder.model")]
    assert bool(names) == trained and "text.encoder.head.0.weight" in whole[1]
    for name, value in whole[1].items():
        torch.testing.assert_close(cached[1][name], value, atol=1e-9, rtol=1e-6)
    networks = build_networks(config)
    make_optimizer(networks, config)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in build_networks(config).named_parameters()}
    assert shapes == {name: p.shape for name, p in networks.named_parameters()}


def test_static_embeddings_are_a_mean(tmp_path: Path) -> None:
    table = torch.randn(45, 6, generator=torch.Generator().manual_seed(0))
    save_file({"embeddings": table}, tmp_path / "model.safetensors")
    encoder = StaticTextEncoder(folder=str(tmp_path), vocabulary=40, text_length=16, latent_dim=8)
    tokens = text_samples().view(TEXT)
    torch.testing.assert_close(encoder.features(tokens)[3], table[tokens[3][tokens[3] >= 0]].mean(0))
    assert encoder(tokens).shape == (12, 8) and not encoder.table.requires_grad


def test_folders_that_hold_no_such_model(bert: Path, tmp_path: Path) -> None:
    for target, folder, more, why in (
        ("pretrained", tmp_path, [], "has no config.json"), ("static", tmp_path, [], "has no matrix of embeddings"),
        ("pretrained", bert, ["data.vocabulary=60"], "has 50 tokens, the tokenizer 60"),
        ("pretrained", bert, ["data.text_length=30"], "takes at most 24 tokens"),
        ("static", bert, [], "has no matrix of embeddings"),
    ):  # fmt: skip
        own = [f"modalities.text.encoder.target={target}"]
        own.append(f"modalities.text.encoder.arguments.folder={json.dumps(str(folder))}")
        with pytest.raises(ConfigError, match=why):
            build_networks(text_config(*own, *more))
    (tmp_path / "config.json").write_text("{}")
    own = ["modalities.text.encoder.target=pretrained", f"modalities.text.encoder.arguments.folder={tmp_path}"]
    with pytest.raises(ConfigError, match="cannot be loaded"):
        build_networks(text_config(*own))
