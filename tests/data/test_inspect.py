"""What `python -m lzn_dist.tools.inspect` prints and draws."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lzn_dist.data import RandomResizedCrops, ShardedDataset, ShardIndex, SimCLRPolicy, make_views, to_unit_range
from lzn_dist.evaluation.figures import sample_grid
from lzn_dist.evaluation.zone_figure import toy_anchors, zone_figure
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Options, prepare
from lzn_dist.tools import inspect
from tests.helpers.published import add, encode, imagenet, imagenet_source, picture


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


def test_damage_is_left_out_and_classes_are_counted_without_a_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels that are none, images that are none, samples that lack either; at last nothing is left to be shown."""
    image = encode(picture(0))
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for i, label in enumerate([b"0", b"12", b"12", b"?", b"\xff"]):
            add(tar, f"{i}.jpg", image)
            add(tar, f"{i}.cls", label)
        add(tar, "5.jpg", image)
        add(tar, "6.cls", b"0")
    with tarfile.open(tmp_path / "val-000000.tar", "w") as tar:
        add(tar, "a.jpg", b"?")
    sheet = tmp_path / "sheet.png"
    arguments = [str(tmp_path), "--size", "16", "--output", str(sheet)]
    assert inspect.main([*arguments, "--samples", "0"]) == 0 and not sheet.exists()
    said = capsys.readouterr().out
    assert "no manifest" in said and "height x width of 4: 40x50 (4)" in said
    assert "  2 classes of 2 to 2 samples\n        0: 2\n       12: 2\n" in said and "contact" not in said
    assert inspect.main(arguments) == 0 and sheet.exists()
    assert inspect.main([*arguments, "--split", "val"]) == 2
    assert "all samples that were tried are damaged" in capsys.readouterr().err
    for wrong in (["--samples", "-1"], ["--size", "0"]):
        assert inspect.main([*arguments, *wrong]) == 2
        assert "error: --size must be positive, --samples too" in capsys.readouterr().err


def test_views_are_those_of_training(tmp_path: Path) -> None:
    imagenet(tmp_path / "published", size=(60, 80))
    prepare(imagenet_source(tmp_path / "published"), Options(tmp_path / "shards"), quiet=True)
    index = ShardIndex.load(tmp_path / "shards")
    dataset = ShardedDataset(index, "train", 3, RandomResizedCrops(48, 7))
    shown = inspect.pictures(index, index.split("train"), 1)[0]
    rows = np.array([shown.row])
    pixels, labels = dataset.read(rows)
    assert labels.item() == shown.label
    expected = make_views([to_unit_range(v) for v in pixels], torch.from_numpy(rows), 0, 7, SimCLRPolicy())
    for found, view in zip(inspect.two_views(shown, 48, "simclr", 7), expected, strict=True):
        assert torch.equal(found, ((view[0] + 1) * 127.5).round().to(torch.uint8))


@pytest.mark.slow
def test_names_of_others_are_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dollars are no formulas (a broken one ended the drawing), escape sequences move no cursor."""
    names = ["$\\frac$", "a$", "\x1b[2Jbell\x07"]
    for number, name in enumerate(names):
        (folder := tmp_path / "in" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (80 * number, 0, 0)).save(folder / "$_{.png")
    prepare(ImageFolder(tmp_path / "in"), Options(tmp_path / "shards"), quiet=True)
    capsys.readouterr()
    assert inspect.main([str(tmp_path / "shards"), "--size", "16", "--output", str(tmp_path / "sheet.png")]) == 0
    told = capsys.readouterr().out
    assert "$\\frac$: 1" in told and "\x1b" not in told and "\\x1b[2Jbell\\x07: 1" in told
    images = torch.zeros(6, 3, 8, 8)
    sample_grid(images, 2, tmp_path / "formula.png", ["$x$", *names[:2]])
    sample_grid(images, 2, tmp_path / "text.png", ["x", *names[:2]])
    drawn = [np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("formula", "text")]
    assert not np.array_equal(*drawn)
    anchors, labels = toy_anchors(3)
    zone_figure(anchors, labels, tmp_path / "zones.png", lines=0, class_names=names)
