"""What `python -m lzn_dist.data.inspect` prints and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from published import imagenet
from test_prepare import imagenet_source

from lzn_dist.data import (
    RandomResizedCrops,
    ShardedDataset,
    ShardIndex,
    SimCLRPolicy,
    inspect,
    make_views,
    to_unit_range,
)
from lzn_dist.data.prepare import Options, prepare


def test_it_says_and_shows_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet(tmp_path / "published", size=(60, 80))
    prepare(imagenet_source(tmp_path / "published"), Options(tmp_path / "shards", samples_per_shard=10), quiet=True)
    sheet = tmp_path / "sheet.png"
    arguments = [str(tmp_path / "shards"), "--samples", "6", "--size", "48", "--output", str(sheet)]
    assert inspect.main(arguments) == 0
    said = capsys.readouterr().out
    assert "ImageNet ILSVRC2012" in said and "train: 21 samples in 3 shards" in said
    assert "height x width of 21: 60x80 (21)" in said and "3 classes of 7 to 7 samples" in said
    assert "0 n01440764 tench, Tinca tinca: 7" in said and f"contact sheet: {sheet}" in said
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 200 and pixels.std() > 20
    assert inspect.main([*arguments, "--split", "none"]) == 2
    assert "no split 'none'; it has" in capsys.readouterr().err


def test_views_are_those_of_training(tmp_path: Path) -> None:
    imagenet(tmp_path / "published", size=(60, 80))
    prepare(imagenet_source(tmp_path / "published"), Options(tmp_path / "shards"), quiet=True)
    index = ShardIndex.load(tmp_path / "shards")
    dataset = ShardedDataset(index, "train", 3, RandomResizedCrops(48, 7))
    picture = inspect.pictures(index, index.split("train"), 1)[0]
    rows = np.array([picture.row])
    pixels, labels = dataset.read(rows)
    assert labels.item() == picture.label
    expected = make_views([to_unit_range(v) for v in pixels], torch.from_numpy(rows), 0, 7, SimCLRPolicy())
    for found, view in zip(inspect.two_views(picture, 48, "simclr", 7), expected, strict=True):
        assert torch.equal(found, ((view[0] + 1) * 127.5).round().to(torch.uint8))
