"""A new run that starts with what was trained: all that fits is taken, and what does not is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lzn_dist import load
from lzn_dist.config import Config, ConfigError
from lzn_dist.networks import Networks
from lzn_dist.training.init_from import start_from
from lzn_dist.training.setup import fresh_networks
from tests.helpers.small_run import rows, small_config
from tests.helpers.trained import train_three

pytestmark = pytest.mark.slow  # a run is trained and exported for them, once a worker

CPU = torch.device("cpu")


def fresh(config: Config) -> Networks:
    return fresh_networks(config, CPU)


def like(source: Path, *overrides: str, task: str = "joint") -> Config:
    """Of the networks' sizes of `three`."""
    more = ["modalities.image.encoder.arguments.dropout=0.0", "data.text_length=24"] if task == "three" else []
    return small_config(f"init_from={source}", *more, *overrides, task=task)


@pytest.mark.parametrize("kind", ["run", "checkpoint", "export"])
def test_the_encoder_alone_or_all_that_fits(kind: str, three: Path, exported: Path) -> None:
    source = {"run": three, "checkpoint": three / "checkpoints" / "step_00000002", "export": exported}[kind]
    trained = load(source).networks.state_dict()
    config = like(source)
    networks = fresh(config)
    before = {name: value.clone() for name, value in networks.state_dict().items()}
    lines = start_from(networks, config)
    for name, value in networks.state_dict().items():
        same = name in trained and trained[name].shape == value.shape
        assert torch.equal(value, trained[name] if same else before[name]), name
    assert lines[0].startswith(f"started from {source} at step 2: ")
    text = " ".join(lines)
    assert "left out there: text.encoder, text.decoder" in text
    config = like(source, "init_networks=[image.encoder]")
    networks = fresh(config)
    lines = start_from(networks, config)
    for name, value in networks.state_dict().items():
        assert torch.equal(value, (trained if name.startswith("image.encoder.") else before)[name]), name
    assert "new here: image.decoder, label.encoder" in lines[1]


def test_other_shapes_are_new_and_named(three: Path) -> None:
    config = like(three, "latent.dim=12", "init_networks=[image.encoder]")
    networks = fresh(config)
    lines = start_from(networks, config)
    assert "latent_transformations.0.2.weight (there 8×" in lines[1] and "here 12×" in lines[1]
    trained = load(three).networks.state_dict()["image.encoder.all_modules.0.weight"]
    assert torch.equal(networks.state_dict()["image.encoder.all_modules.0.weight"], trained)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["init_from=/gone"], "init_from: no complete checkpoint in /gone"),
        (["init_networks=[audio.encoder]"], r"init_networks: .* has no audio\.encoder, but image\.encoder"),
        (["init_networks=[text.encoder]"], r"init_networks: this run has no text\.encoder"),
    ],
)
def test_what_cannot_be_taken_is_one_line(overrides: list[str], says: str, three: Path) -> None:
    config = like(three, *overrides)
    with pytest.raises(ConfigError, match=says) as refused:
        start_from(fresh(config), config)
    assert "\n" not in str(refused.value)


def test_nothing_that_fits_is_refused(three: Path, tmp_path: Path) -> None:
    config = like(three, task="representation")
    networks = fresh(config)
    with pytest.raises(ConfigError, match=r"has no network that fits: it has image\.encoder"):
        start_from(networks, config)


def test_a_run_starts_with_it_and_resumes_without_looking_back(
    three: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train_three(tmp_path / "run", digits, f"init_from={three}", "max_steps=1")
    said = capsys.readouterr().out
    assert f"started from {three} at step 2" in said and "left out there" not in said
    fresh_loss = rows(three)[0]["loss"]
    assert rows(run)[0]["loss"] < fresh_loss  # the averaged weights of two steps
    train_three(tmp_path / "run", digits, "init_from=/moved/away", "max_steps=2")
    said = capsys.readouterr().out
    assert "resumed from" in said and "started from" not in said and "init_from" not in said


def test_text_of_another_tokenizer_is_refused(three: Path) -> None:
    config = load(three).config
    other = Config.model_validate(
        config.model_dump()
        | {"init_from": str(three), "data": config.data.model_dump() | {"tokenizer_sha256": "0" * 64}}
    )
    with pytest.raises(ConfigError, match=r"trained with another tokenizer .*: set data\.tokenizer to its"):
        start_from(fresh(other), other)
