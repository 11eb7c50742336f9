"""Captions on their way from a shard to tokens."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lzn_dist.config import ConfigError
from lzn_dist.data import CaptionReader, ShardedDataset, ShardIndex, Tokenizer, load_tokenizer
from lzn_dist.data.captions import captions_of
from lzn_dist.data.pixels import Exact
from lzn_dist.distributed import Topology
from lzn_dist.prepare.captions import HELD_OUT, LEVELS, WORDINGS, levels, measure, thresholds
from lzn_dist.prepare.digits import digits_pixels, digits_splits
from lzn_dist.prepare.tokenizer import train_tokenizer, write_tokenizer
from lzn_dist.training.batches import open_stream
from lzn_dist.training.resolve import resolve
from tests.helpers.small_run import small_config

TEXTS = ["a thin three", "a bold four", "grün, 火"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train_tokenizer(TEXTS * 3, 400), "test")


def test_a_file_s_lines_are_its_captions() -> None:
    assert captions_of("\ufeffa  thin\tthree\r\n\n  \nschön\n".encode()) == ["a thin three", "schön"]
    assert captions_of(b"") == []
    with pytest.raises(ValueError, match=r"not UTF-8 \(byte 2"):
        captions_of(b"ab\xff")


def test_tokens_come_back_as_the_text(tokenizer: Tokenizer) -> None:
    others = [*TEXTS, "never seen: Ωλ 🦉", "x" * 50]
    tokens = tokenizer.encode(others, 80)
    assert tokens.shape == (5, 80) and tokens.max() < tokenizer.vocabulary
    assert tokenizer.decode(tokens) == others
    lengths = (tokens >= 0).sum(1)
    assert all(bool((row[n:] == -1).all()) for row, n in zip(tokens, lengths.tolist(), strict=True))
    assert torch.equal(tokenizer.encode(others, 4), tokens[:, :4])  # cut
    assert train_tokenizer(TEXTS * 3, 400) == tokenizer.content
    with pytest.raises(ValueError, match="file is no tokenizer"):
        Tokenizer("{}", "file")


def test_one_caption_is_drawn_an_epoch(tokenizer: Tokenizer) -> None:
    reader = CaptionReader(tokenizer, 8, seed=3, partial=False)
    content = "\n".join(TEXTS[:2]).encode()
    rows = torch.arange(400)
    first, again, next_epoch = (torch.stack(reader([content] * 400, rows, epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, next_epoch)
    assert torch.equal(torch.stack(reader([content] * 10, rows[50:60], 0)), first[50:60])  # of the sample alone
    texts = tokenizer.decode(first)
    assert set(texts) == set(TEXTS[:2]) and 150 < texts.count(TEXTS[0]) < 250
    both = {(a, b) for a, b in zip(texts, tokenizer.decode(next_epoch), strict=True)}
    assert len(both) == 4


@pytest.mark.parametrize("partial", [False, True])
def test_captions_that_are_missing_or_damaged(tokenizer: Tokenizer, partial: bool) -> None:
    reader = CaptionReader(tokenizer, 6, seed=0, partial=partial)
    missing, empty, damaged, long = reader([None, b"  \n", b"\xff", b"xyz " * 20], torch.arange(4), 0)
    assert isinstance(damaged, ValueError) and "not UTF-8" in str(damaged)
    assert isinstance(long, torch.Tensor) and long.shape == (7,) and bool((long >= 0).all())  # one more than fits
    for found, why in ((missing, "has no caption"), (empty, "its caption is empty")):
        if partial:
            assert torch.equal(found, torch.full((7,), -1))
        else:
            assert isinstance(found, ValueError) and str(found) == why


def write_shard(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    image = io.BytesIO()
    Image.new("L", (8, 8)).save(image, "PNG")
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in {"png": image.getvalue(), **members}.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("cached", [False, True])
def test_a_batch_has_captions_beside_its_images(tokenizer: Tokenizer, tmp_path: Path, cached: bool) -> None:
    samples = {f"{i}": {"cls": b"1", "txt": f"number {i}\n".encode()} for i in range(6)}
    samples["3"]["txt"] = b"\xff\xff"
    del samples["4"]["txt"]
    write_shard(tmp_path / "train-000000.tar", samples)
    reader = CaptionReader(tokenizer, 16, seed=0, partial=False)
    dataset = ShardedDataset(
        ShardIndex.load(tmp_path), "train", 1, Exact(8), num_classes=2, members={"text": reader}, cache_decoded=cached
    )
    for _ in range(2):  # then decoded images are kept
        found = dataset.read_or_replace(np.arange(6))
        texts = tokenizer.decode(found.members["text"])
        assert texts == [f"number {row}" for row in found.rows.tolist()]
        assert found.rows[:3].tolist() == [0, 1, 2] and not {3, 4} & set(found.rows.tolist())
        whys = {bad.row: bad.why.rpartition(": ")[2] for bad in found.bad}
        assert whys[3] == "its caption is not UTF-8 (byte 0)" and whys[4] == "has no caption"
    assert dataset.captions(np.array([0, 3, 4])) == [["number 0"], [], []]


def test_samples_without_a_label_may_stay(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", {"a": {"cls": b"1"}, "b": {}, "c": {"cls": b"7"}})
    for partial, kept in ((False, [0]), (True, [0, 1])):
        dataset = ShardedDataset(
            ShardIndex.load(tmp_path), "train", 1, Exact(8), num_classes=2, partial=partial
        )  # fmt: skip
        found = dataset.read_or_replace(np.arange(3))
        assert set(found.rows.tolist()) == set(kept)
        assert found.labels[0] == 1 and (not partial or found.labels[1] == -1)


def test_what_captions_say_is_what_is_measured() -> None:
    pixels, labels = digits_pixels()
    train = digits_splits(labels)["train"]
    bounds = thresholds(measure(pixels[train]))
    found = levels(pixels[train], bounds)
    for name, words in LEVELS.items():
        counts = [sum(level[name] == word for level in found) for word in words]
        assert max(counts) - min(counts) <= 2  # a third each
    slanted = np.zeros((3, 9, 9), np.uint8)
    for row in range(9):
        slanted[0, row, 4], slanted[1, row, 8 - row], slanted[2, row, row] = 255, 255, 255
    slant = measure(slanted)["slant"]
    assert slant == pytest.approx([0, 1, -1])  # columns to the right a row upwards
    block = np.zeros((2, 9, 9), np.uint8)
    block[0, 2:7, 2:7], block[1, 2:7, 3:5] = 255, 255
    assert measure(block)["weight"] == pytest.approx(1, rel=0.2) and measure(block)["width"][0] == pytest.approx(1)
    assert measure(block)["width"][1] < 0.5
    assert not set(HELD_OUT) & set(WORDINGS)


def test_digits_have_captions_and_held_out_ones_are_worded_anew(digits: Path) -> None:
    index = ShardIndex.load(digits)
    texts = {
        split: ShardedDataset(index, split, 1, Exact(8)).captions(np.arange(index.samples(split)))
        for split in ("train", "test")
    }
    assert {len(own) for own in texts["train"]} == {5} and {len(own) for own in texts["test"]} == {2}
    train, test = ({text for own in texts[split] for text in own} for split in ("train", "test"))
    assert not train & test
    assert load_tokenizer(index).decode(load_tokenizer(index).encode(sorted(test), 64)) == sorted(test)


TEXT = [f"modalities.text.{role}.arguments={{width: 16, depth: 1, heads: 2}}" for role in ("encoder", "decoder")]


def test_the_tokenizer_is_the_model_s(digits: Path, tmp_path: Path) -> None:
    config = resolve(small_config(*TEXT, f"data.shards={digits}", task="text"))
    assert config.data.vocabulary == load_tokenizer(ShardIndex.load(digits)).vocabulary
    other = tmp_path / "other.json"
    other.write_text(train_tokenizer(TEXTS, 300))
    changed = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": str(other)})})
    with pytest.raises(ConfigError, match=r"other\.json .* is not the tokenizer that this model was made for"):
        open_stream(changed, Topology())
    with pytest.raises(ConfigError, match=r"data\.tokenizer: .*nowhere\.json cannot be read"):
        resolve(small_config(*TEXT, f"data.shards={digits}", f"data.tokenizer={tmp_path}/nowhere.json", task="text"))


def test_shards_without_captions_or_tokenizer(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", {str(i): {"cls": b"1"} for i in range(300)})
    small = [*TEXT, f"data.shards={tmp_path}", "data.embedded=none"]
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json: python data_prep/tokenizer\.py"):
        resolve(small_config(*small, task="text"))
    with pytest.raises(ValueError, match="split 'train' has no captions"):
        write_tokenizer(tmp_path)
    write_shard(tmp_path / "train-000000.tar", {str(i): {"cls": b"1", "txt": b"one"} for i in range(300)})
    assert write_tokenizer(tmp_path, 300).is_file()
    with pytest.raises(FileExistsError, match="--replace"):
        write_tokenizer(tmp_path)
    config = resolve(small_config(*small, task="text"))
    assert open_stream(config, Topology()).batch(0).members["text"].shape == (256, 25)
    write_shard(tmp_path / "train-000000.tar", {str(i): {"cls": b"1"} for i in range(300)})
    with pytest.raises(ConfigError, match=r"has no captions \(KEY\.txt\)"):
        open_stream(config, Topology())


@pytest.mark.process
def test_a_tokenizer_is_the_same_in_another_process(tokenizer: Tokenizer) -> None:
    """Hash tables have another order in each."""
    code = f"from lzn_dist.prepare.tokenizer import *; print(train_tokenizer({TEXTS * 3!r}, 400))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip("\n") == tokenizer.content
