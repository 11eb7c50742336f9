"""Images with captions, as people have them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from lzn_dist.data import ShardedDataset, ShardIndex
from lzn_dist.data.pixels import Exact
from lzn_dist.prepare.image_text import NO_CAPTION, ImageText, adopt_shards, read_pairs
from lzn_dist.prepare.writer import Options, PrepareError, prepare


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twenty images in a messy folder, with captions beside."""
    folder = tmp_path / "my photos #1"
    (folder / "sub.d").mkdir(parents=True)
    for i in range(20):
        Image.new("RGB", (8, 8), (i * 10, 0, 0)).save(folder / f"sub.d/a.{i}.jpg")
        (folder / f"sub.d/a.{i}.txt").write_text(f"red  {i}\n\nshade {i // 2}\n")
    for name in ("bare", "damaged", "empty"):
        Image.new("RGB", (8, 8)).save(folder / f"{name}.png")
    (folder / "damaged.txt").write_bytes(b"\xff\xfe\xfa")
    (folder / "empty.png.txt").write_text(" \n")
    (folder / "notes.txt").write_text("mine")
    return folder


def written(source: ImageText, folder: Path) -> dict[str, list[list[str]]]:
    prepare(source, Options(folder), quiet=True)
    index = ShardIndex.load(folder)
    return {
        split: ShardedDataset(index, split, 3, Exact(8)).captions(np.arange(index.samples(split)))
        for split in index.splits
    }


def test_captions_beside_images(photos: Path, tmp_path: Path) -> None:
    source = ImageText(photos)
    found = written(source, tmp_path / "out")
    assert sorted(found["train"]) == sorted([f"red {i}", f"shade {i // 2}"] for i in range(20))
    account = source.account()
    assert account is not None and account.taken == 20 and account.seen == 25
    assert account.left_out[NO_CAPTION][0] == 3 and account.left_out["no image (.txt)"][0] == 1
    assert account.left_out["a caption that is not UTF-8"][0] == 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kept = written(ImageText(photos, keep_all=True), tmp_path / "all")
    assert len(kept["train"]) == 23 and kept["train"].count([]) == 3


def test_images_that_share_a_caption_are_in_one_split(photos: Path, tmp_path: Path) -> None:
    found = written(ImageText(photos, held_out=0.3), tmp_path / "out")
    assert len(found["test"]) == 6 and len(found["train"]) == 14
    train, test = ({text for own in found[split] for text in own} for split in ("train", "test"))
    assert not train & test
    with pytest.raises(PrepareError, match="shares no caption"):
        ImageText(photos, held_out=0.04).splits()


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "semicolons"])
def test_tables(photos: Path, tmp_path: Path, kind: str) -> None:
    table = tmp_path / f"table.{'csv' if kind == 'semicolons' else kind}"
    rows = [(f"sub.d/a.{i}.jpg", f"schön, {i}", "val" if i > 7 else "training") for i in range(10)]
    rows.append(("sub.d/a.0.jpg", "a second", "train"))
    if kind == "jsonl":
        lines = [
            json.dumps({"image": a, "caption": [b, "x"] if a.endswith(".3.jpg") else b, "split": c}) for a, b, c in rows
        ]
    else:
        mark = {"csv": ",", "tsv": "\t", "semicolons": ";"}[kind]
        lines = [mark.join(("Path", "Caption", "Split"))] + [mark.join((a, f'"{b}"', c)) for a, b, c in rows]
    table.write_bytes("\n".join(lines).encode("cp1252" if kind == "semicolons" else "utf-8"))
    source = ImageText(photos, table)
    found = written(source, tmp_path / "out")
    assert sorted(map(len, found["train"])) == ([1] * 6 + [2, 2] if kind == "jsonl" else [1] * 7 + [2])
    assert ["schön, 0", "a second"] in found["train"] and sorted(found["val"]) == [["schön, 8"], ["schön, 9"]]
    account = source.account()
    assert account is not None and account.left_out["an image that is not in the table"][0] == 13


def test_tables_that_do_not_fit(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    for text, why in (
        ("a,b\n1,2\n", "which column is the image"), ("image,b\nx,2\n", "which column is the caption"),
        ("image,text\nnowhere.jpg,x\n", "line 2: there is no .*nowhere.jpg"),
        ("image,text\n../x.jpg,x\n", "is no path inside"), ("image,text\n,x\n", "not a path"),
        ("image,text\na,b,c\n", "more values than columns"),
        ("image,text,split\nsub.d/a.1.jpg,x,train\nsub.d/a.1.jpg,y,val\n", "is in split train already"),
    ):  # fmt: skip
        table.write_text(text)
        with pytest.raises(PrepareError, match=why):
            ImageText(photos, table).splits()
    with pytest.raises(PrepareError, match="has no column 'title'"):
        list(read_pairs(table, caption_column="title"))
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"image": "a"\n')
    with pytest.raises(PrepareError, match="line 1: not a line of JSON"):
        list(read_pairs(lines))
    (tmp_path / "t.parquet").write_bytes(b"x")
    with pytest.raises(PrepareError, match="is no parquet file that can be read"):
        list(read_pairs(tmp_path / "t.parquet"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(PrepareError, match="pip install pyarrow"):
            list(read_pairs(tmp_path / "t.parquet"))
    (photos / "sub.d").rename(tmp_path / "away")
    with pytest.raises(PrepareError, match="no image with a caption"):
        ImageText(photos).splits()


def test_a_table_of_parquet_is_read_as_one_of_csv(tmp_path: Path) -> None:
    rows = {"file_name": ["a.jpg", "b/c.png"], "text": [["a cat", " two\ncats "], None], "split": ["train", "val"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "t.parquet")
    pairs = list(read_pairs(tmp_path / "t.parquet"))
    assert [(p.image, p.captions, p.split) for p in pairs] == [
        ("a.jpg", ["a cat", "two cats"], "train"), ("b/c.png", [], "val")
    ]  # fmt: skip


def test_shards_of_img2dataset_stay_as_they_are(photos: Path, tmp_path: Path) -> None:
    written(ImageText(photos), tmp_path / "made")
    shards = tmp_path / "shards"
    shards.mkdir()
    with pytest.raises(PrepareError, match="has no shards"):
        adopt_shards(shards)
    for name in ("00000.tar", "00001.tar", "00002.tar"):
        (shards / name).write_bytes((tmp_path / "made" / "train-000000.tar").read_bytes())
    before = {path.name: path.read_bytes() for path in shards.glob("*.tar")}
    with pytest.raises(PrepareError, match="less than the 3"):
        adopt_shards(shards, 3)
    lines = adopt_shards(shards, 1)
    assert lines[0] == "60 samples, 60 with a caption, 60 with several (lines of KEY.txt)"
    assert {path.name: path.read_bytes() for path in shards.glob("*.tar")} == before
    index = ShardIndex.load(shards)
    assert (index.samples("train"), index.samples("test")) == (40, 20)
    with pytest.raises(PrepareError, match="already"):
        adopt_shards(shards)
