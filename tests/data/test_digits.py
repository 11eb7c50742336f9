from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from lzn_dist.data import ShardIndex
from lzn_dist.prepare.digits import HELD_OUT, digits_splits, ensure_digits, write_digits
from lzn_dist.prepare.writer import check
from tests.helpers.launching import data_prep

Samples = dict[str, tuple[np.ndarray, int]]


def levels(pixels: np.ndarray) -> np.ndarray:
    """8-bit pixels back to scikit-learn's levels 0…16."""
    return np.rint(pixels.astype(np.float64) * 16 / 255)


def read_with_tarfile(folder: Path, split: str) -> Samples:
    samples: Samples = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            contents = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        for key in {name.split(".")[0] for name in contents}:
            image = np.asarray(Image.open(io.BytesIO(contents[f"{key}.png"])))
            samples[key] = (image, int(contents[f"{key}.cls"]))
    return samples


def read_with_webdataset(folder: Path, split: str) -> Samples:
    urls = [str(path) for path in sorted(folder.glob(f"{split}-*.tar"))]
    dataset = wds.WebDataset(urls, shardshuffle=False).decode("l8").to_tuple("__key__", "png", "cls")
    return {key: (image, label) for key, image, label in dataset}


@pytest.mark.parametrize("read", [read_with_tarfile, read_with_webdataset])
def test_shards_hold_scikit_learns_digits(digits: Path, read: object) -> None:
    source = load_digits()
    samples = {split: read(digits, split) for split in ("train", "test")}  # type: ignore[operator]
    assert len(samples["train"]) == 1797 - HELD_OUT and len(samples["test"]) == HELD_OUT
    assert samples["train"].keys().isdisjoint(samples["test"])
    for key, (image, label) in (samples["train"] | samples["test"]).items():
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(levels(image), source.images[int(key)])
        assert label == source.target[int(key)]


def test_split_is_stratified_and_repeatable() -> None:
    labels = load_digits().target
    splits = digits_splits(labels)
    assert len(np.unique(np.concatenate([*splits.values()]))) == 1797
    share = np.bincount(labels[splits["test"]]) / np.bincount(labels)
    np.testing.assert_allclose(share, HELD_OUT / 1797, atol=0.005)
    np.testing.assert_array_equal(splits["test"], digits_splits(labels)["test"])


def test_bytes_are_deterministic(digits: Path, tmp_path: Path) -> None:
    again = write_digits(tmp_path / "again")
    names = sorted(path.name for path in digits.iterdir())
    assert names == sorted(path.name for path in again.iterdir()) and "manifest.json" in names
    for name in names:
        assert (digits / name).read_bytes() == (again / name).read_bytes(), name


@pytest.mark.process
def test_manifest_describes_the_tars(digits: Path) -> None:
    manifest = json.loads((digits / "manifest.json").read_text())
    assert manifest["classes"] == [str(c) for c in range(10)]
    assert "scikit-learn" in manifest["source"] and manifest["tool"].startswith("lzn_dist ")
    index = ShardIndex.load(digits)
    for split, entry in manifest["splits"].items():
        table = index.split(split)
        assert entry["samples"] == sum(shard["samples"] for shard in entry["shards"]) == len(table)
        for shard, end in zip(entry["shards"], table.ends, strict=True):
            data = (digits / shard["name"]).read_bytes()
            assert shard["name"].startswith(split) and len(data) == shard["bytes"]
            assert hashlib.sha256(data).hexdigest() == shard["sha256"]
            with tarfile.open(digits / shard["name"]) as tar:
                for row in range(end - shard["samples"], end):
                    for extension, offsets in table.offsets.items():
                        member = tar.extractfile(f"{table.key(row)}.{extension}")
                        offset, size = offsets[row]
                        assert member is not None and member.read() == data[offset : offset + size]
    assert check(digits, decode=True, quiet=True) == []


@pytest.mark.slow
def test_an_existing_folder_is_kept(digits: Path, tmp_path: Path) -> None:
    before = (digits / "manifest.json").stat().st_mtime_ns
    assert write_digits(digits) == digits == ensure_digits(digits)
    assert (digits / "manifest.json").stat().st_mtime_ns == before
    assert [path.name for path in digits.parent.iterdir()] == [digits.name]  # no temporary folder stays

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    with pytest.raises(FileExistsError, match="mine exists and holds something else"):
        write_digits(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "the only copy"
    with pytest.raises(FileExistsError, match="something else"):
        write_digits(digits, samples_per_shard=100)


@pytest.mark.process
def test_processes_that_race_do_no_harm(digits: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "digits"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        assert pool.map(ensure_digits, [folder] * 4, chunksize=1) == [folder] * 4
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    assert (folder / "manifest.json").read_bytes() == (digits / "manifest.json").read_bytes()
    assert check(folder, quiet=True) == []


def test_script(digits: Path, tmp_path: Path) -> None:
    said = data_prep("digits", "--output", tmp_path / "digits")
    assert "train: 1,437 images" in said and "10 classes" in said
    assert "complete already" in data_prep("digits", "--output", tmp_path / "digits")
    assert (tmp_path / "digits" / "manifest.json").read_bytes() == (digits / "manifest.json").read_bytes()
