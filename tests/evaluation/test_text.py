"""Retrieval and zero-shot: measures with known answers, and a model from its checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lzn_dist.config import Config
from lzn_dist.evaluation import EvaluationData
from lzn_dist.evaluation.text import recalls, retrieval_values, zero_shot_values
from lzn_dist.inference import LZN, MissingCapability, load
from lzn_dist.objectives import build_networks
from lzn_dist.train import main
from lzn_dist.training.centres import mean_anchors
from lzn_dist.training.checkpoint import CheckpointError
from lzn_dist.training.resolve import resolve
from tests.helpers.settings import both_with, decoder_with
from tests.helpers.small_run import rows, small_config

SMALL = [
    "modalities.text.encoder.arguments={width: 16, depth: 1, heads: 2}",
    "cpu_threads=1",
    "tracking.wandb=disabled",
]


def test_recalls_in_closed_form() -> None:
    candidates = torch.eye(12)
    queries = torch.eye(12)[:3].clone()
    queries[1] = torch.arange(12.0).flip(0) + 1  # candidate 0 first, 1 second, …
    belongs = torch.zeros(3, 12, dtype=torch.bool)
    belongs[0, 0] = True  # found at once
    belongs[1, 4] = belongs[1, 7] = True  # fifth
    belongs[2, 11] = True  # as good as nine others: last of them
    found = recalls(queries, candidates, belongs, "x")
    assert found == {"x_recall_at_1": pytest.approx(1 / 3), "x_recall_at_5": pytest.approx(2 / 3),
                     "x_recall_at_10": pytest.approx(2 / 3)}  # fmt: skip


def text_config(digits: Path, *overrides: str) -> Config:
    return resolve(small_config(*SMALL, f"data.shards={digits}", *overrides, task="text"))


def text_model(config: Config, **more: object) -> LZN:
    torch.manual_seed(0)
    return LZN(build_networks(config), config, centres={name: torch.zeros(8) for name in ("image", "text")}, **more)  # type: ignore[arg-type]


def test_a_model_that_knows_retrieves_and_classifies(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = text_config(digits)
    model, data = text_model(config), EvaluationData(config)
    axes = torch.eye(10)

    def embed_text(texts: list[str]) -> torch.Tensor:
        words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
        return torch.stack([axes[next(n for n, word in enumerate(words) if word in text)] for text in texts])

    labels = torch.cat([batch.labels for batch in data.batches("test")])
    images = torch.cat([batch.images for batch in data.batches("test")])
    known = {image.numpy().tobytes(): int(label) for image, label in zip(images, labels, strict=True)}
    monkeypatch.setattr(model, "embed_text", embed_text)
    monkeypatch.setattr(
        model, "anchors", lambda images: 3 * axes[[known[image.numpy().tobytes()] for image in images]]
    )  # fmt: skip
    assert zero_shot_values(model, data) == {"zero_shot_accuracy": 1.0}
    values = retrieval_values(model, data)
    # all captions of a digit lie at one point: one's own counts behind the others
    assert values["image_to_text_recall_at_1"] == 0.0
    monkeypatch.setattr(model, "embed_text", lambda texts: embed_text(texts).flip(1))
    assert zero_shot_values(model, data)["zero_shot_accuracy"] == 0.0


def test_zero_shot_is_its_formula(digits: Path) -> None:
    config = text_config(digits, "modalities.text.anchor_norm=0.5", "alignment.steps=5")
    model = text_model(config)
    images = EvaluationData(config).first("test", 6).images
    wordings = [["a one", "the one"], "a two", ["three"]]
    found = model.zero_shot(images, wordings)
    assert found.shape == (6, 3) and torch.allclose(found.sum(1), torch.ones(6))
    anchors = F.normalize(model.anchors(images), dim=1)
    logits = []
    for own in wordings:
        own = [own] if isinstance(own, str) else own
        logits.append(2 * 4 * 0.5 * anchors @ F.normalize(F.normalize(model.embed_text(own), dim=1).mean(0), dim=0))
    torch.testing.assert_close(found, torch.stack(logits, 1).softmax(1))
    torch.testing.assert_close(model.similarities(images, ["a two"])[:, 0], logits[1] / 4)


def test_texts_that_are_none(digits: Path) -> None:
    model = text_model(text_config(digits))
    assert model.embed_text([]).shape == (0, 8) and model.embed_text("a one").shape == (1, 8)
    for wrong, kind, why in (
        ([3], TypeError, "texts must be a str"), (["a", ""], ValueError, "one of them is empty"),
        (7, TypeError, "texts must be a str"),
    ):  # fmt: skip
        with pytest.raises(kind, match=why):
            model.embed_text(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no wording"):
        model.zero_shot(torch.zeros(1, 1, 8, 8), [[]])
    config = small_config(task="joint")
    with pytest.raises(MissingCapability, match="without text"):
        LZN(build_networks(config), config).embed_text("a one")
    config = text_config(digits)
    with pytest.raises(MissingCapability, match="has no centre"):
        LZN(build_networks(config), config).anchors(torch.zeros(1, 1, 8, 8))


@pytest.mark.slow
def test_a_run_s_centres_and_tokenizer_travel_with_its_checkpoint(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(digits, folder)
    arguments = [
        "digits_text", *SMALL, f"data.shards={folder}", f"output_dir={run}", "data.global_batch=64", "latent.dim=8",
        "modalities.text.decoder.arguments={width: 16, depth: 1, heads: 2}", *both_with(channels=8),
        *decoder_with(attention_resolutions=[]), "max_steps=4", "log_every=1", "checkpoint_every=2",
        "evaluation.centre_samples=500",
    ]  # fmt: skip
    assert main(arguments) == 0
    model = load(run)
    index = EvaluationData(model.config).index
    centres = mean_anchors(model.networks, model.config, index)
    assert set(model.centres) == {"image", "text"}
    for name, centre in centres.items():
        torch.testing.assert_close(model.centres[name], centre)
        assert centre.norm() > 1e-3
    before = model.embed_text(["a thin three"])
    torch.testing.assert_close(before.norm(dim=1), torch.ones(1))
    (raw,) = [model.networks.find("text", "encoder")(model.tokenizer.encode(["a thin three"], 24))]  # type: ignore[misc]
    torch.testing.assert_close(before, F.normalize(raw - centres["text"], dim=1))
    # where the data is not
    folder.rename(tmp_path / "gone")
    torch.testing.assert_close(load(run).embed_text(["a thin three"]), before)
    (tmp_path / "gone").rename(folder)
    # resumed, the centres of before are known until they are measured anew
    assert main([*arguments, "max_steps=6"]) == 0
    assert "resumed from" in capsys.readouterr().out and load(run).step == 6
    whole = tmp_path / "whole"
    assert main([*arguments, f"output_dir={whole}", "max_steps=6"]) == 0
    straight, stopped = (
        {row["step"]: (row["loss"], row["loss_text"], row["loss_flow"]) for row in rows(folder)}
        for folder in (whole, run)
    )
    assert straight == stopped and load(whole).centres["text"].equal(load(run).centres["text"])
    # another tokenizer is refused by what was trained with this one
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"add_prefix_space":true', '"add_prefix_space":false'))
    assert main([*arguments, "max_steps=8"]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    (folder / "tokenizer.json").write_text(text)
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    (newest / "tokenizer.json").write_text(text.replace(":true", ":false", 1))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not what was written"):
        load(newest)


def test_centres_are_means_of_present_samples(digits: Path) -> None:
    config = text_config(digits, "evaluation.centre_samples=700", "evaluation.batch=300")
    model, data = text_model(config), EvaluationData(config)
    found = mean_anchors(model.networks, config, data.index)
    images = data.first("train", 700).images
    expected = model.networks.find("image", "encoder")(images).detach().mean(0)  # type: ignore[misc]
    torch.testing.assert_close(found["image"], expected, rtol=1e-4, atol=1e-5)
    assert np.isfinite(found["text"].numpy()).all()
