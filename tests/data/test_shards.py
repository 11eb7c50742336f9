from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.util
import os
import pickle
import re
import shutil
import signal
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from webdataset.tariterators import base_plus_ext

from lzn_dist.data import (
    Batch,
    BatchStream,
    CentreCrop,
    CorruptSampleError,
    Exact,
    RandomResizedCrops,
    SampleOrder,
    ShardedDataset,
    ShardIndex,
    shards,
    to_unit_range,
)
from lzn_dist.data.index import sample_of, scan_tar
from lzn_dist.data.shards import _Ahead, check_divisible
from lzn_dist.prepare.writer import check
from tests.helpers.messy import damage

TRAIN = 1437


def make_dataset(
    index: ShardIndex, split: str = "train", channels: int = 1, size: int = 8, **options: Any
) -> ShardedDataset:
    return ShardedDataset(index, split, channels, options.pop("reading", Exact(size)), **options)


def stream(
    index: ShardIndex, rank: int = 0, world_size: int = 1, global_batch: int = 256, seed: int = 3, *,
    workers: int = 0, streams: int = 1, window: int = 0, **options: Any,
) -> BatchStream:  # fmt: skip
    dataset = make_dataset(index, **options)
    order = SampleOrder([shard.samples for shard in dataset.table.shards], global_batch, seed, streams, window)
    return BatchStream(dataset, order, rank, world_size, workers)


def assert_equal(a: Batch, b: Batch) -> None:
    assert a.epoch == b.epoch
    for field in ("index", "pixels", "labels"):
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
    dataset = make_dataset(index, "test")
    assert len(dataset) == 360 == index.samples("test")
    for i in (359, 0, 299, 300, 17):  # both sides of the border between shards, in no order
        row = int(dataset.table.key(i))
        image, label = dataset[i]
        assert image.dtype == torch.uint8 and image.shape == (1, 8, 8)
        np.testing.assert_array_equal(np.rint(image[0].numpy() * (16 / 255)), source.images[row])
        assert label == source.target[row]
        assert f"test-00000{int(i >= 300)}.tar: sample {row:06d}" in dataset.where(i)
    with pytest.raises(IndexError):
        dataset[360]


def test_scan_without_manifest_gives_the_same_index(digits: Path, index: ShardIndex, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "manifest.json").unlink()
    scanned = ShardIndex.load(folder)
    assert scanned.splits.keys() == index.splits.keys()
    for split in index.splits:
        ours, theirs = scanned.split(split), index.split(split)
        assert [(a.name, a.bytes, a.samples) for a in ours.shards] == [
            (b.name, b.bytes, b.samples) for b in theirs.shards
        ]
        np.testing.assert_array_equal(ours.keys, theirs.keys)
        assert ours.offsets.keys() == theirs.offsets.keys()
        for extension in ours.offsets:
            np.testing.assert_array_equal(ours.offsets[extension], theirs.offsets[extension])
    assert_equal(stream(scanned).batch(4), stream(index).batch(4))


def test_colour_jpeg_subfolders_and_no_labels(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    blocks = np.kron(generator.integers(0, 256, (3, 1, 1, 3)), np.ones((1, 16, 16, 1))).astype(np.uint8)
    images = {f"cats/{i}": Image.fromarray(block) for i, block in enumerate(blocks)}
    write_shard(tmp_path / "train-000000.tar", images, extension="jpg", labels=False)
    dataset = make_dataset(ShardIndex.load(tmp_path), channels=3, size=16)
    pixels, labels = dataset.read(np.array([2, 0]))
    assert pixels.shape == (1, 2, 3, 16, 16) and labels.tolist() == [-1, -1]
    expected = torch.from_numpy(blocks[[2, 0]]).permute(0, 3, 1, 2)
    assert (pixels[0].int() - expected.int()).abs().max() <= 3
    grey = make_dataset(ShardIndex.load(tmp_path), size=16)[1][0]
    np.testing.assert_allclose(grey[0], np.asarray(images["cats/1"].convert("L")), atol=3)


# ------------------------------------------------------------------------------------------------ tars of others

NAME = st.lists(
    st.sampled_from([".", "a", "b.c", "__MACOSX", ".hidden", "x y", "ü"]), max_size=2
).flatmap(lambda folders: st.sampled_from(
    ["1.png", "1.PNG", "2.cls", "._1.png", ".DS_Store", "README", "3.seg.png", ".png", "4.", "5.json"]
).map(lambda file: "/".join([*folders, file])))  # fmt: skip


def write_tar(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))


@settings(max_examples=150, deadline=None)
@given(st.lists(NAME, max_size=8, unique=True))
def test_samples_are_those_of_webdataset(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """But for hidden folders and a Mac's, which it takes, ./, which is part of its keys, and a hidden file in a folder,
    of which it makes the folder's name a key. It ends a sample where the next key begins, we where the tar does."""
    path = tmp_path_factory.mktemp("tar") / "train-000000.tar"
    keys = [sample_of(name) for name in names]
    known = [key for key in keys if key is not None]
    write_tar(path, names)
    if len(set(known)) < len(known):
        with pytest.raises(ValueError, match="two members are"):
            scan_tar(path)
        return
    passed_over: list[str] = []
    found, members = scan_tar(path, passed_over)
    assert sum(map(len, members)) + len(passed_over) == len(names)
    expected: dict[str, set[str]] = {}
    for name in names:
        key, extension = base_plus_ext(name)
        folders = name.split("/")[:-1]
        if (
            key is not None
            and not key.endswith("/")
            and not any(part == "__MACOSX" or part.startswith(".h") for part in folders)
        ):
            plain = "/".join(part for part in key.split("/") if part != ".")
            expected.setdefault(plain, set()).add(extension.lower())
    assert {key: set(parts) for key, parts in zip(found, members, strict=True)} == expected


def test_a_tar_from_a_mac_has_no_phantoms(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    with tarfile.open(tmp_path / "train-000000.tar", "w") as tar:
        for i in range(4):
            for name, content in (
                (f"./._{i}.png", b"Mac OS X"), (f"./{i}.png", image.getvalue()), (f"./{i}.cls", b"\xef\xbb\xbf1\r\n"),
            ):  # fmt: skip
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        for name in ("./.DS_Store", "__MACOSX/._x.png", "./folder"):
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("folder") else tarfile.REGTYPE
            tar.addfile(member)
    index = ShardIndex.load(tmp_path)
    assert "6 members are hidden or have no extension" in capsys.readouterr().err
    dataset = make_dataset(index, "train", num_classes=2)
    assert [dataset.table.key(row) for row in range(len(dataset))] == ["0", "1", "2", "3"]
    _, labels, _, _, bad = dataset.read_or_replace(np.arange(4))
    assert labels.tolist() == [1] * 4 and not bad


def test_data_set_survives_pickling_and_threads(index: ShardIndex) -> None:
    dataset = make_dataset(index)
    rows = np.arange(600)
    expected, _ = dataset.read(rows)
    restored = pickle.loads(pickle.dumps(dataset))
    torch.testing.assert_close(restored.read(rows)[0], expected)
    results: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: results.append(dataset.read(rows)[0])) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4 and all(torch.equal(result, expected) for result in results)


# ---------------------------------------------------------------------------------------------------------- batches


def test_batch_contents(index: ShardIndex) -> None:
    batch = stream(index).batch(7)
    assert batch.index.dtype == batch.labels.dtype == torch.int64 and batch.pixels.dtype == torch.uint8
    assert batch.pixels.shape == (1, 256, 1, 8, 8) and batch.epoch == 1 and batch.bad == ()
    keys = [int(index.split("train").key(i)) for i in batch.index.tolist()]
    source = load_digits()
    images = to_unit_range(batch.pixels[0])
    assert images.dtype == torch.float32 and images.min() == -1.0 and images.max() == 1.0
    np.testing.assert_allclose(images[:, 0], source.images[keys] / 8 - 1, atol=1 / 255 + 1e-6)
    np.testing.assert_array_equal(batch.labels, source.target[keys])


@pytest.mark.parametrize("cache_decoded", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_sees_the_same_global_batch(
    index: ShardIndex, world_size: int, cache_decoded: bool
) -> None:
    for step in (0, 4, 5, 23):  # 5 batches an epoch
        whole = stream(index).batch(step)
        parts = [stream(index, r, world_size, cache_decoded=cache_decoded).batch(step) for r in range(world_size)]
        pixels = torch.cat([p.pixels for p in parts], dim=1)
        joined = [torch.cat([getattr(p, f) for p in parts]) for f in ("index", "labels")]
        assert_equal(Batch(joined[0], pixels, joined[1], parts[0].epoch), whole)


@pytest.mark.parametrize("global_batch", [256, 1437, 100])
def test_epochs(index: ShardIndex, global_batch: int) -> None:
    batches = stream(index, global_batch=global_batch)
    n = batches.batches_per_epoch
    assert n == TRAIN // global_batch
    orders = [torch.from_numpy(np.concatenate([batches.indices(e * n + k) for k in range(n)])) for e in range(3)]
    for order in orders:
        assert len(order.unique()) == len(order) == n * global_batch
        assert order.min() >= 0 and order.max() < TRAIN
        assert not torch.equal(order, order.sort().values)
    assert not torch.equal(orders[0], orders[1]) and not torch.equal(orders[1], orders[2])
    assert stream(index, global_batch=global_batch, seed=4).indices(0).tolist() != orders[0][:global_batch].tolist()
    if n * global_batch < TRAIN:  # the remainder differs between epochs
        assert set(orders[0].tolist()) != set(orders[1].tolist())
    assert [batches.batch(k).epoch for k in (0, n - 1, n)] == [0, 0, 1]


@pytest.mark.process
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


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
def test_a_wait_for_data_can_be_interrupted_and_is_told(
    index: ShardIndex, workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that does not answer, say; closing does not wait for it either."""
    slow = stream(index, workers=workers)
    release = multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(BatchStream, "batch", lambda self, number: release.wait(60))
    monkeypatch.setattr(shards, "SILENCE", 0.3)
    monkeypatch.setattr(_Ahead, "CLOSING", 0.2)
    began = time.monotonic()
    batches = slow.iterate(3, 9, lambda: time.monotonic() - began > 1.5)
    with pytest.raises(InterruptedError, match="told to end while waiting for global batch 3"):
        next(batches)
    assert "waiting for global batch 3 of split 'train' since 0 s" in capsys.readouterr().err
    release.set()


@pytest.mark.process
@pytest.mark.parametrize("when", ["between two batches", "while a batch is handed over"])
def test_a_loader_process_that_ends_is_an_error(index: ShardIndex, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the batch that is missing, and nowhere else: not in what the process does when it happens."""
    before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
    batches = stream(index, workers=1, global_batch=8).iterate(0, 1000)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) is handler
    (loader,) = set(multiprocessing.active_children()) - before
    if when == "while a batch is handed over":  # its memory is asked for at a socket that is gone

        def lost(*_: object) -> object:
            raise ConnectionResetError(104, "Connection reset by peer")

        monkeypatch.setattr(multiprocessing.reduction, "recv_handle", lost)
    else:
        os.kill(loader.pid, signal.SIGKILL)  # type: ignore[arg-type]
        loader.join()  # the system tells of its end; nothing is raised here
    with pytest.raises(OSError, match=r"a loader process ended by itself .* fewer data\.workers"):
        for _ in range(100):
            next(batches)


@pytest.mark.process
def test_loaders_work_under_a_long_temporary_folder(
    index: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sockets have paths of at most 107 bytes; without the remedy nothing would ever come."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setitem(multiprocessing.current_process()._config, "tempdir", None)  # type: ignore[attr-defined]
    began = time.monotonic()
    found = list(stream(index, workers=1).iterate(0, 2, lambda: time.monotonic() - began > 20))
    assert len(found) == 2 and tempfile.gettempdir() == str(folder)
    assert str(multiprocessing.util.get_temp_dir()).startswith("/tmp/pymp-")


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
    expected = first.pixels.clone()
    first.pixels.zero_()
    first.index.zero_()
    torch.testing.assert_close(batches.batch(0).pixels, expected)
    assert len(batches.batch(0).index.unique()) == 256


@pytest.mark.parametrize("cache_decoded", [False, True])
def test_fixed_batches(index: ShardIndex, cache_decoded: bool) -> None:
    dataset = make_dataset(index, "test", cache_decoded=cache_decoded)
    batches = list(dataset.fixed_batches(100))
    assert [len(batch.images) for batch in batches] == [100] * 4
    valid = torch.cat([batch.valid for batch in batches])
    assert valid.tolist() == [True] * 360 + [False] * 40
    order = torch.cat([batch.index for batch in batches])
    assert order.tolist() == [*range(360), *range(40)]
    torch.testing.assert_close(batches[3].images[60:], batches[0].images[:40])
    (more,) = dataset.fixed_batches(800)  # more than twice the split
    assert more.valid.sum() == 360 and torch.equal(more.images[360:720], more.images[:360])


def test_a_damaged_sample_is_left_out_of_evaluation_and_told_once(
    tmp_path: Path, digits: Path, index: ShardIndex, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    names = [damage(folder, "png", 100, "test"), damage(folder, "cls", 20, "test")]  # rows 0 and 20 of their batches
    whole = make_dataset(index, "test", num_classes=10).fixed_batches(100)
    for _ in range(2):
        batches = make_dataset(ShardIndex.load(folder), "test", num_classes=10).fixed_batches(100)
        for batch, expected in zip(batches, whole, strict=True):
            left_out = (expected.valid & ~batch.valid).nonzero()[:, 0]
            assert torch.equal(batch.index, expected.index)
            assert batch.index[left_out].tolist() == [row for row in (20, 100) if row in expected.index[expected.valid]]
            same = ~torch.isin(batch.index, torch.tensor([20, 100]))
            assert torch.equal(batch.images[same], expected.images[same])
            assert torch.equal(batch.labels[same], expected.labels[same]) and batch.labels.min() >= 0
    said = [line for line in capfd.readouterr().err.splitlines() if "leaves out a sample that it cannot use" in line]
    assert len(said) == 2 and all(any(name in line for line in said) for name in names)
    wrong = make_dataset(index, "test", size=16).fixed_batches(100)
    with pytest.raises(CorruptSampleError, match=r"data\.image_size is 16"):
        wrong[0]


# ----------------------------------------------------------------------------------------------------------- errors


def test_missing_shards(tmp_path: Path, digits: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"no shards .* {tmp_path}/nowhere.*data_prep/image_folder.py"):
        ShardIndex.load(tmp_path / "nowhere")
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    (folder / "train-000002.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000002.tar is missing"):
        ShardIndex.load(folder)


@pytest.mark.process
def test_truncated_shard_and_wrong_hash(tmp_path: Path, digits: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    path = folder / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert check(folder, quiet=True) == [f"{path}: its SHA-256 is not the one in manifest.json"]
    index = ShardIndex.load(folder)
    path.write_bytes(data[:5000])
    with pytest.raises(ValueError, match=r"train-000001.tar has 5000 bytes"):
        ShardIndex.load(folder)
    with pytest.raises(CorruptSampleError, match=r"train-000001.tar: sample .*: the shard ends inside"):
        make_dataset(index)[400]


@pytest.mark.parametrize("header", [0, 3, -1])
def test_a_damaged_header_is_not_the_end_of_a_shard(header: int, tmp_path: Path, digits: Path) -> None:
    folder = tmp_path / "foreign"
    folder.mkdir()
    path = Path(shutil.copy(digits / "train-000001.tar", folder))
    with tarfile.open(path) as tar:
        place = tar.getmembers()[header].offset
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train-000001\.tar: not a readable tar"):
        ShardIndex.load(folder)
    path.write_bytes(content[:place])  # cut off where a header was to follow
    with pytest.raises(ValueError, match=r"train-000001\.tar: not a readable tar"):
        ShardIndex.load(folder)


@pytest.mark.process
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("extension,what", [("png", "not a whole image"), ("cls", r"its label is b'\?'")])
@pytest.mark.parametrize("cache_decoded", [False, True])
def test_a_damaged_sample_is_replaced_by_a_function_of_its_key(
    tmp_path: Path, digits: Path, extension: str, what: str, workers: int, cache_decoded: bool
) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    name = damage(folder, extension, 305)
    whole = stream(ShardIndex.load(digits), global_batch=479)
    options: dict[str, Any] = {"global_batch": 479, "num_classes": 10}
    found = stream(ShardIndex.load(folder), workers=workers, cache_decoded=cache_decoded, **options)
    replacements = []
    for batch, expected in zip(found.iterate(0, 6), whole.iterate(0, 6), strict=True):  # two epochs
        assert len(batch.index) == 479
        places = torch.nonzero(batch.index != expected.index).flatten().tolist()
        assert len(places) == len(batch.bad) == int(305 in expected.index)
        for place, bad in zip(places, batch.bad, strict=True):
            assert expected.index[place] == bad.row == 305
            assert bad.why.startswith(name) and re.search(what, bad.why) and "\n" not in bad.why
            replacements.append(int(batch.index[place]))
            image, label = found.dataset[replacements[-1]]
            assert torch.equal(batch.pixels[0, place], image) and batch.labels[place] == label
    assert len(replacements) == 2 and len(set(replacements)) == 1  # the same one in both epochs
    with pytest.raises(CorruptSampleError, match=name):
        found.dataset[305]
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_replacements_that_are_damaged_too_are_replaced(tmp_path: Path, digits: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    damage(folder, "png", 7)
    first = int(make_dataset(ShardIndex.load(folder)).read_or_replace(np.array([7])).rows[0])
    damage(folder, "png", first)
    _, _, _, rows, bad = make_dataset(ShardIndex.load(folder)).read_or_replace(np.array([7, 3]))
    assert rows[1] == 3 and rows[0] not in (7, first) and [b.row for b in bad] == [7, first]
    for row in range(1437):
        damage(folder, "cls", row)
    with pytest.raises(CorruptSampleError, match="so are 16 others in a row"):
        make_dataset(ShardIndex.load(folder), num_classes=10).read_or_replace(np.array([7]))


def test_a_replacement_depends_on_keys_and_not_on_the_order_in_the_shards(tmp_path: Path) -> None:
    found = []
    for name, order in (("a", range(20)), ("b", reversed(range(20)))):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "train-000000.tar", "wb") as file, wds.TarWriter(file) as shard:
            for number in order:
                image = {} if number in (3, 8, 15) else {"png": np.full((8, 8), number, np.uint8)}
                shard.write({"__key__": f"k{number}", "cls": number, **image})
        dataset = make_dataset(ShardIndex.load(tmp_path / name), seed=4)
        keys = dataset.table.keys.tolist()
        bad = [keys.index(f"k{number}".encode()) for number in (3, 8, 15)]
        found.append([keys[row] for row in dataset.read_or_replace(np.array(bad)).rows])
    assert found[0] == found[1] and len(set(found[0])) > 1


def test_missing_members_and_impossible_labels_are_damage(tmp_path: Path) -> None:
    labels = {0: b"0", 1: b"1", 3: b"3\n", 4: b"12", 5: b"-1", 6: b"9" * 40, 7: b"10"}  # 2 has none
    with open(tmp_path / "train-000000.tar", "wb") as file, wds.TarWriter(file) as shard:
        for number in range(8):
            image = {} if number == 1 else {"png": np.full((8, 8), number, np.uint8)}
            label = {"cls": labels[number]} if number in labels else {}
            shard.write({"__key__": f"k{number}", **image, **label})
    index = ShardIndex.load(tmp_path)
    pixels, found, _, rows, bad = make_dataset(index, num_classes=10).read_or_replace(np.arange(8))
    assert [b.why.partition(": sample ")[2] for b in bad[:6]] == [
        "k1: has no image", "k2: has no label", "k4: its label is b'12', not one of 0 to 9",
        "k5: its label is b'-1', not one of 0 to 9", f"k6: its label is b'{'9' * 20}', not one of 0 to 9",
        "k7: its label is b'10', not one of 0 to 9",
    ]  # fmt: skip
    assert set(rows.tolist()) == {0, 3} and rows[[0, 3]].tolist() == [0, 3]
    assert torch.equal(pixels[0, :, 0, 0, 0].long(), found) and found.tolist() == rows.tolist()
    # where labels are not needed, the images are
    pixels, found = make_dataset(index).read(np.array([0, 2, 3, 4, 5, 6, 7]))
    assert pixels[0, :, 0, 0, 0].tolist() == [0, 2, 3, 4, 5, 6, 7] and found.tolist() == [0, -1, 3, 12, -1, -1, 10]


def test_wrong_image_size_and_no_images(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-000000.tar", {"a": Image.new("L", (16, 16)), "b": Image.new("L", (16, 12))})
    dataset = make_dataset(ShardIndex.load(tmp_path), size=16)
    assert dataset[0][0].shape == (1, 16, 16)
    with pytest.raises(ValueError, match=r"is 12x16 pixels, data\.image_size is 16: set data\.resize"):
        dataset[1]
    assert make_dataset(ShardIndex.load(tmp_path), reading=CentreCrop(8, 12))[1][0].shape == (1, 8, 8)
    with open(tmp_path / "train-000000.tar", "wb") as file, wds.TarWriter(file) as shard:
        shard.write({"__key__": "a", "cls": 1})
    with pytest.raises(ValueError, match=r"split 'train': no images \(jpg"):
        make_dataset(ShardIndex.load(tmp_path))


def test_views_that_differ_are_not_kept(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match="cache_decoded=false"):
        make_dataset(index, reading=RandomResizedCrops(8, 0), cache_decoded=True)


@pytest.mark.process
@pytest.mark.parametrize("world_size,workers,streams", [(2, 0, 4), (1, 2, 4), (4, 1, 4), (2, 3, 1)])
def test_random_crops_are_the_same_on_any_ranks_and_workers(
    index: ShardIndex, world_size: int, workers: int, streams: int
) -> None:
    """Three batches past the first epoch's end, in two epochs' crops."""
    options: dict[str, Any] = {"reading": RandomResizedCrops(6, 5), "global_batch": 480, "window": 50}
    whole = [stream(index, streams=streams, **options).batch(k) for k in range(1, 5)]
    parts = [
        list(stream(index, rank, world_size, workers=workers, streams=streams, **options).iterate(1, 5))
        for rank in range(world_size)
    ]
    for number, expected in enumerate(whole):
        assert torch.equal(torch.cat([part[number].pixels for part in parts], dim=1), expected.pixels)
        assert expected.pixels.shape == (2, 480, 1, 6, 6) and not torch.equal(*expected.pixels)


def test_impossible_batches(index: ShardIndex) -> None:
    with pytest.raises(ValueError, match=r"larger than split 'train' .* 1437 samples: use a global batch of 1437$"):
        stream(index, global_batch=1438)
    with pytest.raises(ValueError, match="over 3 ranks: use a global batch of 255 or 258, or 1 or 2 or 4 ranks"):
        stream(index, 0, 3)
    with pytest.raises(ValueError, match="cannot be split evenly over 8 ranks: use a global batch of 8, or 1 or 2 or"):
        stream(index, 0, 8, global_batch=6)
    with pytest.raises(ValueError, match=r"6 streams .* by 4 ranks: use data.streams=4 or 8 .*, or 1 or 2 ranks"):
        stream(index, 0, 4, streams=6)
    with pytest.raises(ValueError, match=r"batch of 10 or 15 with data.streams=5 .*, or 1 or 2 or 4 ranks"):
        stream(index, 0, 5, streams=4, global_batch=12)
    with pytest.raises(ValueError, match=r"no split 'validation'; it has \['test', 'train'\]"):
        stream(index, split="validation")
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        stream(index, 2, 2)
    with pytest.raises(ValueError, match="no batch -1"):
        stream(index).batch(-1)
    with pytest.raises(ValueError, match="channels must be 1"):
        stream(index, channels=4)
    for options in ({"global_batch": 0}, {"streams": 0}, {"window": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be at least"):
            stream(index, **options)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 8), st.integers(1, 12))
def test_every_number_that_a_refusal_names_works(samples: int, batch: int, streams: int, ranks: int) -> None:
    def refusal(batch: int, streams: int, ranks: int) -> str:
        try:
            check_divisible(SampleOrder([samples], batch, 0, streams), ranks, "the split")
        except ValueError as error:
            return str(error).partition(": use ")[2]
        return ""

    if not (said := refusal(batch, streams, ranks)):
        return
    named = [re.search(rf"{what}((?: or |\d)+)", said) for what in ("batch of ", r"data\.streams=")]
    others = re.search(r"(?:^|, or )((?: or |\d)+) ranks?$", said)
    assert any(named) or others or "1 rank and a global batch of at most" in said
    batches, counts = ([int(n) for n in found[1].split(" or ")] if found else None for found in named)
    if batches or counts:
        for size in batches or [batch]:
            assert all(not refusal(size, count, ranks) for count in counts or [streams]), said
    for count in others[1].split(" or ") if others else ():
        assert not refusal(batch, streams, int(count)), said
    if most := re.search("1 rank and a global batch of at most (.*)", said):
        assert not refusal(int(most[1]), streams, 1)


def test_unreadable_manifest(tmp_path: Path, digits: Path) -> None:
    folder = Path(shutil.copytree(digits, tmp_path / "digits"))
    right = (folder / "manifest.json").read_text()
    for text in ("{", json.dumps({"splits": {}}), "[]", right.replace('"format": 2', '"format": 1')):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(ValueError, match=r"manifest.json: not a manifest of shards"):
            ShardIndex.load(folder)
    (folder / "manifest.json").write_text(right)
    (folder / "train.index.npz").write_bytes((folder / "test.index.npz").read_bytes())
    with pytest.raises(ValueError, match=r"train.index.npz is not the file that was written with it"):
        ShardIndex.load(folder)
    (folder / "train.index.npz").unlink()
    with pytest.raises(ValueError, match=r"train.index.npz is missing"):
        ShardIndex.load(folder)
