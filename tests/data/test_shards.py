from __future__ import annotations

import io
import json
import multiprocessing
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image
from sklearn.datasets import load_digits

from lzn_dist.data import Batch, BatchStream, CorruptSampleError, ShardedDataset, ShardIndex

TRAIN = 1437


def stream(
    index: ShardIndex, rank: int = 0, world_size: int = 1, global_batch: int = 256, seed: int = 3, **kw: Any
) -> BatchStream:
    return BatchStream(index, "train", global_batch, seed, rank, world_size, **kw)


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.epoch == b.epoch
    for field in ("index", "images", "labels"):
        torch.testing.assert_close(getattr(a, field), getattr(b, field), rtol=0, atol=0)


def write_shard(path: Path, images: dict[str, Image.Image], extension: str = "png", labels: bool = True) -> None:
    with open(path, "wb") as file, wds.TarWriter(file, mtime=0) as shard:
        for label, (key, image) in enumerate(images.items()):
            buffer = io.BytesIO()
            image.save(buffer, {"jpg": "JPEG"}.get(extension, extension.upper()))
            shard.write({"__key__": key, extension: buffer.getvalue()} | ({"cls": label} if labels else {}))


# ------------------------------------------------------------------------------------------------ index and samples


def test_random_access_reads_the_right_sample(index: ShardIndex) -> None:
    source = load_digits()
    dataset = ShardedDataset(index, "test", channels=1, image_size=8)
    assert len(dataset) == 360 == index.samples("test")
    for i in (359, 0, 299, 300, 17):  # both sides of the border between shards, in no order
        row = int(dataset.raw(i)["__key__"])
        image, label = dataset[i]
        assert image.dtype == torch.uint8 and image.shape == (1, 8, 8)
        np.testing.assert_array_equal(np.rint(image[0].numpy() * (16 / 255)), source.images[row])
        assert label == source.target[row]
    with pytest.raises(IndexError):
        dataset[360]


def test_scan_without_manifest_gives_the_same_index(digits: Path, index: ShardIndex, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "manifest.json").unlink()
    scanned = ShardIndex.load(folder)
    assert scanned.splits.keys() == index.splits.keys()
    for split in index.splits:
        for ours, theirs in zip(scanned.shards(split), index.shards(split), strict=True):
            assert (ours.name, ours.bytes, ours.keys) == (theirs.name, theirs.bytes, theirs.keys)
            assert ours.offsets.keys() == theirs.offsets.keys()
            for extension in ours.offsets:
                np.testing.assert_array_equal(ours.offsets[extension], theirs.offsets[extension])
    assert_equal(stream(scanned).batch(4), stream(index).batch(4))


def test_colour_jpeg_subfolders_and_no_labels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    blocks = np.kron(generator.integers(0, 256, (3, 1, 1, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
    images = {f"cats/{i}": Image.fromarray(block) for i, block in enumerate(blocks)}
    write_shard(tmp_path / "train-000000.tar", images, extension="jpg", labels=False)
    dataset = ShardedDataset(ShardIndex.load(tmp_path), "train", channels=3, image_size=16)
    pixels, labels = dataset.read([2, 0])
    assert pixels.shape == (2, 3, 16, 16) and labels.tolist() == [-1, -1]
    expected = torch.from_numpy(blocks[[2, 0]]).permute(0, 3, 1, 2)
    assert (pixels.int() - expected.int()).abs().max() <= 3
    grey = ShardedDataset(ShardIndex.load(tmp_path), "train", channels=1, image_size=16)[1][0]
    np.testing.assert_allclose(grey[0], np.asarray(images["cats/1"].convert("L")), atol=3)


def test_data_set_survives_pickling_and_threads(index: ShardIndex) -> None:
    dataset = ShardedDataset(index, "train", 1, 8)
    expected, _ = dataset.read(range(600))
    restored = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(restored.read(range(600))[0], expected)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(dataset.read(range(600))[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


# ---------------------------------------------------------------------------------------------------------- batches


def test_batch_contents(index: ShardIndex) -> None:
    batch = stream(index).batch(7)
    assert batch.index.dtype == batch.labels.dtype == torch.int64 and batch.images.dtype == torch.float32
    assert batch.images.shape == (256, 1, 8, 8) and batch.epoch == 1
    assert batch.images.min() == -1.0 and batch.images.max() == 1.0
    keys = [int(ShardedDataset(index, "train", 1, 8).raw(i)["__key__"]) for i in batch.index.tolist()]
    source = load_digits()
    np.testing.assert_allclose(batch.images[:, 0], source.images[keys] / 8 - 1, atol=1 / 255 + 1e-6)
    np.testing.assert_array_equal(batch.labels, source.target[keys])


@pytest.mark.parametrize("cache_decoded", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batch(
    index: ShardIndex, world_size: int, cache_decoded: bool
) -> None:
    for step in (0, 4, 5, 23):  # 5 batches an epoch
        whole = stream(index).batch(step)
        parts = [stream(index, r, world_size, cache_decoded=cache_decoded).batch(step) for r in range(world_size)]
        joined = [torch.cat([getattr(p, f) for p in parts]) for f in ("index", "images", "labels")]
        assert_equal(Batch(joined[0], joined[1], joined[2], parts[0].epoch), whole)


@pytest.mark.parametrize("global_batch", [256, 1437, 100])
def test_epochs(index: ShardIndex, global_batch: int) -> None:
    batches = stream(index, global_batch=global_batch)
    n = batches.batches_per_epoch
    assert n == TRAIN // global_batch
    orders = [torch.cat([batches.indices(e * n + k) for k in range(n)]) for e in range(3)]
    for order in orders:
        assert len(order.unique()) == len(order) == n * global_batch
        assert order.min() >= 0 and order.max() < TRAIN
        assert not torch.equal(order, order.sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert not torch.equal(stream(index, global_batch=global_batch, seed=4).indices(0), orders[0][:global_batch])
    if n * global_batch < TRAIN:  # the remainder differs between epochs
        assert set(orders[0].tolist()) != set(orders[1].tolist())
    assert [batches.batch(k).epoch for k in (0, n - 1, n)] == [0, 0, 1]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cache_decoded", [False, True])
def test_iterate_is_batch_from_any_step(index: ShardIndex, workers: int, cache_decoded: bool) -> None:
    reference = [stream(index, 1, 2).batch(k) for k in range(12)]
    resumed = stream(index, 1, 2, cache_decoded=cache_decoded, workers=workers)
    state = torch.get_rng_state()
    for start, stop in ((0, 12), (3, 12), (7, 8), (5, 5)):
        seen = list(resumed.iterate(start, stop))
        assert len(seen) == stop - start
        for batch, expected in zip(seen, reference[start:stop], strict=True):
            assert_equal(batch, expected)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator


def test_leaving_early_ends_the_thread_and_changes_nothing(index: ShardIndex) -> None:
    batches = stream(index)
    iterator = batches.iterate(0, 1000)
    next(iterator)
    iterator.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]
    assert_equal(next(batches.iterate(1, 1000)), stream(index).batch(1))


def test_the_thread_reads_no_further_than_two_batches_ahead(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = stream(index, cache_decoded=True)
    read: list[int] = []
    monkeypatch.setattr(batches, "batch", read.append)
    for step, _ in enumerate(batches.iterate(0, 20)):
        assert step < 19 or read == list(range(20))
        time.sleep(0.002)
        assert len(read) <= step + 3


def test_cache_is_not_handed_out(index: ShardIndex) -> None:
    batches = stream(index, cache_decoded=True)
    first = batches.batch(0)
    expected = first.images.clone()
    first.images.zero_()
    first.index.zero_()
    torch.testing.assert_close(batches.batch(0).images, expected)
    assert len(batches.batch(0).index.unique()) == 256


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_fixed_batches(index: ShardIndex, cache_decoded: bool) -> None:
    dataset = ShardedDataset(index, "test", 1, 8, cache_decoded)
    batches = list(dataset.fixed_batches(100))
    assert [len(batch.images) for batch in batches] == [100] * 4
    valid = torch.cat([batch.valid for batch in batches])
    assert valid.tolist() == [True] * 360 + [False] * 40
    order = torch.cat([batch.index for batch in batches])
    assert order.tolist() == [*range(360), *range(40)]
    torch.testing.assert_close(batches[3].images[60:], batches[0].images[:40])
    (more,) = dataset.fixed_batches(800)  # more than twice the split
    assert more.valid.sum() == 360 and torch.equal(more.images[360:720], more.images[:360])


# ----------------------------------------------------------------------------------------------------------- errors


def test_missing_shards(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/nowhere.*data_prep/digits.py --output"):
        ShardIndex.load(tmp_path / "nowhere")
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "train-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000002.tar is missing"):
        ShardIndex.load(folder)


def test_truncated_shard_and_wrong_hash(tmp_path: Path, digits: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-000001.tar: its SHA-256"):
        ShardIndex.load(folder).verify()
    index = ShardIndex.load(folder)
    path.write_bytes(data[:5000])
    with pytest.raises(ValueError, match=r"train-000001.tar has 5000 bytes"):
        ShardIndex.load(folder)
    with pytest.raises(CorruptSampleError, match=r"train-000001.tar: sample .*: the shard ends inside"):
        ShardedDataset(index, "train", 1, 8)[400]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("extension", ["png", "cls"])
def test_corrupt_member_names_shard_and_key(tmp_path: Path, digits: Path, extension: str, workers: int) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    shard = ShardIndex.load(folder).shards("train")[1]
    offset, size = shard.offsets[extension][5].tolist()
    with open(folder / shard.name, "r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    batches = stream(ShardIndex.load(folder), global_batch=TRAIN, workers=workers)
    message = f"train-000001.tar: sample {shard.keys[5]}: cannot decode {extension}"
    with pytest.raises(CorruptSampleError, match=message) as caught:
        list(batches.iterate(0, 2))
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()


def test_wrong_image_size_and_missing_members(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", {"a": Image.new("L", (16, 16)), "b": Image.new("L", (16, 12))})
    dataset = ShardedDataset(ShardIndex.load(tmp_path), "train", 1, 16)
    assert dataset[0][0].shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"train-000000.tar: sample b is 12x16 pixels, image_size is 16"):
        dataset[1]
    with open(tmp_path / "train-000000.tar", "wb") as file, wds.TarWriter(file) as shard:
        shard.write({"__key__": "a", "png": b"", "cls": 1})
        shard.write({"__key__": "b", "cls": 1})
    with pytest.raises(ValueError, match=r"train-000000.tar: sample b has \['cls'\]"):
        ShardIndex.load(tmp_path)
    with open(tmp_path / "train-000000.tar", "wb") as file, wds.TarWriter(file) as shard:
        shard.write({"__key__": "a", "cls": 1})
    with pytest.raises(ValueError, match=r"train-000000.tar: no images"):
        ShardedDataset(ShardIndex.load(tmp_path), "train", 1, 16)


def test_impossible_batches(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"larger than split 'train' .* 1437 samples: use at most 1437"):
        stream(index, global_batch=1438)
    with pytest.raises(ValueError, match="over 3 ranks: use a global batch of 255 or 258, or 1 or 2 or 4 ranks"):
        stream(index, 0, 3)
    with pytest.raises(ValueError, match="cannot be split evenly over 8 ranks: use a global batch of 8, or 1 or 2 or"):
        stream(index, 0, 8, global_batch=6)
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        BatchStream(index, "validation", 8, 0)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        stream(index, 2, 2)
    with pytest.raises(ValueError, match="no batch -1"):
        stream(index).batch(-1)
    with pytest.raises(ValueError, match="channels must be 1"):
        stream(index, channels=4)


def test_unreadable_manifest(tmp_path: Path, digits: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    for text in ("{", json.dumps({"splits": {}}), "[]"):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: not a manifest of shards"):
            ShardIndex.load(folder)
