"""The published probe: learns, goes on where it stopped, refuses what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from lzn_dist.config import Config, ConfigError, override
from lzn_dist.data import BatchStream, ShardIndex
from lzn_dist.data.storage import RemoteError
from lzn_dist.evaluation import EvaluationData, linear_probe
from lzn_dist.evaluation.linear_probe import ProbeSettings, published_probe
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Options, prepare
from tests.helpers.hand_made import tiny


@pytest.mark.slow
def test_it_learns_and_a_stopped_probe_goes_on_exactly(digits: Path, tmp_path: Path) -> None:
    model = tiny("representation", digits)
    data = EvaluationData(model.config)
    losses: list[float] = []
    settings = ProbeSettings(epochs=3, batch=128, lr=3e-2)
    whole = published_probe(model, data, settings, tmp_path / "whole", lambda _, loss: losses.append(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    assert 0.4 < whole["published_probe_top1"] < whole["published_probe_top5"] < whole["published_probe_top10"] == 1.0

    def stop(epoch: int, _: float) -> None:
        if epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        published_probe(model, data, settings, tmp_path / "parts", stop)
    epochs: list[int] = []
    parts = published_probe(model, data, settings, tmp_path / "parts", lambda epoch, _: epochs.append(epoch))
    assert epochs == [3] and parts == whole
    files = [torch.load(tmp_path / name / "linear_probe.pt", weights_only=True) for name in ("whole", "parts")]
    assert torch.equal(files[0]["probe"]["weight"], files[1]["probe"]["weight"])
    with pytest.raises(ConfigError, match="of another checkpoint or other settings"):
        published_probe(model, data, ProbeSettings(epochs=4, batch=64), tmp_path / "parts")


def test_colour_images_are_cropped_and_coloured_whatever_the_model_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A joint model of CIFAR10 has neither views nor crops of its own, and keeps decoded images."""
    folder = tmp_path / "images"
    for number in range(12):
        (folder / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
        PIL.Image.new("RGB", (16, 16), (20 * number, 90, 9)).save(folder / "ab"[number % 2] / f"{number}.png")
    prepare(ImageFolder(folder), Options(tmp_path / "shards"), quiet=True)
    sizes = {"image_size": 16, "image_channels": 3, "num_classes": 2, "embedded": "none", "cache_decoded": True}
    model = tiny("joint", tmp_path / "shards", **sizes)
    opened: list[tuple[str, bool]] = []
    open_stream = linear_probe.open_stream

    def look(config: Config, *args: Any, **more: Any) -> BatchStream:
        opened.append((config.data.views, config.data.cache_decoded))
        return open_stream(config, *args, **more)

    monkeypatch.setattr(linear_probe, "open_stream", look)
    model.config = override(model.config, ["evaluation.split=train", "evaluation.batch=4"])
    data = EvaluationData(model.config)
    published_probe(model, data, ProbeSettings(epochs=1, batch=6), tmp_path / "a")
    published_probe(model, data, ProbeSettings(epochs=1, batch=6, views="none"), tmp_path / "b")
    assert opened == [("simclr", False), ("none", True)]


def test_damage_is_told_and_bounded_and_what_another_rank_cannot_read_ends_this_one(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    with open(folder / "train-000000.tar", "r+b") as file:
        for offset, size in ShardIndex.load(folder).split("train").offsets["png"][:3].tolist():
            file.seek(offset)
            file.write(bytes(size))
    model = tiny("representation", folder)
    settings = ProbeSettings(epochs=1, batch=479)
    published_probe(model, EvaluationData(model.config), settings, tmp_path / "all")
    assert capfd.readouterr().err.count(f"replaced a damaged sample: {folder}/train-000000.tar: sample ") == 3
    model.config = override(model.config, ["data.max_bad_samples=2"])
    with pytest.raises(ConfigError, match=r"linear probe: 3 samples of this epoch are damaged.* is 2: mend the shards"):
        published_probe(model, EvaluationData(model.config), settings, tmp_path / "few")

    lost = RemoteError("the other rank's server")
    monkeypatch.setattr(linear_probe, "all_gather_object", lambda own: [own, (lost, 0)])
    with pytest.raises(RemoteError, match="the other rank's server"):
        published_probe(model, EvaluationData(model.config), settings, tmp_path / "lost")


def test_too_large_a_batch_is_refused(digits: Path, tmp_path: Path) -> None:
    model = tiny("representation", digits)
    with pytest.raises(ConfigError, match="linear probe: "):
        published_probe(model, EvaluationData(model.config), ProbeSettings(batch=8192), tmp_path)
