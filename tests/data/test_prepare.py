"""The scripts of data_prep/ on small data sets in their published formats, read back with plain tarfile."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lzn_dist.data import CentreCrop, ShardedDataset, ShardIndex, Split, write_manifest
from lzn_dist.data.index import IMAGE_EXTENSIONS
from lzn_dist.data.pixels import decode
from lzn_dist.prepare import sources, writer
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.sources import CIFAR10, AFHQCat, ImageNet, read_devkit
from lzn_dist.prepare.writer import Item, Options, PrepareError, check, prepare
from tests.helpers.launching import data_prep
from tests.helpers.published import (
    NAMES,
    WNIDS,
    add,
    afhq,
    cifar10,
    encode,
    imagenet,
    imagenet_arguments,
    imagenet_source,
    picture,
)

ROOT = Path(__file__).parents[2]


def members(folder: Path, split: str) -> dict[str, bytes]:
    """All members of a split's shards by name."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                assert member.name not in found
                found[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    return found


@pytest.mark.process
def test_imagenet(tmp_path: Path) -> None:
    images = imagenet(tmp_path / "published")
    output = tmp_path / "shards"
    said = data_prep(
        "imagenet", *imagenet_arguments(tmp_path / "published"), "--output", output, "--samples-per-shard", 5,
        "--processes", 2,
    )  # fmt: skip
    assert "train: 21 images" in said and "val: 8 images" in said and "complete" in said
    assert " 0/29 [" in said and " 29/29 [" in said  # how far it is, while it works
    order = sorted(WNIDS)
    train, val = members(output, "train"), members(output, "val")
    assert len(train) == 42 and len(val) == 16
    for key, content in images.items():
        found = val if key.startswith("ILSVRC") else train
        assert found[f"{key}.jpg"] == content  # byte for byte, the PNG that is called .JPEG too
        wnid = key.split("_")[0] if found is train else list(WNIDS)[(int(key[-8:]) - 1) % 3]
        assert found[f"{key}.cls"] == str(order.index(wnid)).encode()
    shards = sorted(path.name for path in output.glob("*.tar"))
    assert shards == [f"train-{i:06d}.tar" for i in range(5)] + [f"val-{i:06d}.tar" for i in range(2)]

    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["classes"] == [f"{wnid} {WNIDS[wnid]}" for wnid in order]
    assert [a["name"] for a in manifest["archives"]][2] == "ILSVRC2012_devkit_t12.tar.gz"
    for archive in manifest["archives"]:
        content = (tmp_path / "published" / archive["name"]).read_bytes()
        assert (archive["bytes"], archive["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert "no problems" in data_prep("check", output, "--decode", "--processes", 2)
    # all classes in the first shards: the shuffle is global, and repeatable
    first = [name for name in members(output, "train")][:20]
    assert len({name.split("_")[0] for name in first}) == 3
    data_prep("imagenet", *imagenet_arguments(tmp_path / "published"), "--output", tmp_path / "again",
           "--samples-per-shard", 5, "--processes", 1)  # fmt: skip
    for path in output.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.process
@pytest.mark.parametrize("kind", ["python", "binary"])
def test_cifar10(tmp_path: Path, kind: str) -> None:
    data = cifar10(tmp_path)
    data_prep("cifar10", "--archive", tmp_path / f"cifar-10-{kind}.tar.gz", "--output", tmp_path / "shards")
    for split, (pixels, labels) in data.items():
        found = members(tmp_path / "shards", split)
        assert len(found) == 2 * len(labels)
        for row, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            read = np.asarray(Image.open(io.BytesIO(found[f"{split}_{row:05d}.png"])))
            np.testing.assert_array_equal(read, image.reshape(3, 32, 32).transpose(1, 2, 0))
            assert found[f"{split}_{row:05d}.cls"] == str(label).encode()
    assert ShardIndex.load(tmp_path / "shards").classes == tuple(NAMES)


def test_a_pickle_that_runs_code_does_not(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return os.system, (f"touch {tmp_path / 'owned'}",)

    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name in ("batches.meta", "data_batch_1", "test_batch"):
            add(tar, f"cifar-10-batches-py/{name}", pickle.dumps(Evil(), protocol=2))
    with pytest.raises(PrepareError, match=r"asks for posix\.system: this is not the published archive"):
        CIFAR10(tmp_path / "cifar-10-python.tar.gz").splits()
    assert not (tmp_path / "owned").exists()


@pytest.mark.process
def test_afhq_cat(tmp_path: Path) -> None:
    cats = afhq(tmp_path)
    data_prep("afhq_cat", "--archive", tmp_path / "afhq.zip", "--output", tmp_path / "shards", "--processes", 2)
    for split, count in (("train", 5), ("test", 2)):
        found = members(tmp_path / "shards", split)
        assert len(found) == 2 * count
        for name, content in cats.items():
            if name.startswith(split):
                key = name.partition("/")[2]
                assert found[f"{key}.jpg"] == content and found[f"{key}.cls"] == b"0"


@pytest.mark.process
@pytest.mark.parametrize("name", ["celeba_hq", "lsun_bedroom"])
def test_folders_without_labels_resized(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "images"
    (folder / "0" / "a").mkdir(parents=True)
    pictures = {f"0/a/{i}": picture(i, 60, 90) for i in range(3)} | {"tall": picture(9, 100, 40)}
    for key, pixels in pictures.items():
        (folder / f"{key}.png").write_bytes(encode(pixels, "PNG"))
    data_prep(name, "--folder", folder, "--output", tmp_path / "shards", "--resize", 32, "--crop")
    found = members(tmp_path / "shards", "train")
    assert sorted(found) == sorted(f"{key}.png" for key in pictures)
    for key, pixels in pictures.items():
        image = Image.fromarray(pixels)
        width, height = (round(side * 32 / min(image.size)) for side in image.size)
        left, top = (width - 32) // 2, (height - 32) // 2
        expected = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(found[f"{key}.png"]))), np.asarray(expected))
    assert ShardIndex.load(tmp_path / "shards").split("train").labels is None


@pytest.mark.parametrize("kind", ["PNG", "PPM"])
def test_16_bit_grey_keeps_its_tones_when_resized(tmp_path: Path, kind: str) -> None:
    """As `decode` has them."""
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / f"a.{'png' if kind == 'PNG' else 'pgm'}"
    Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 64).save(path, kind)
    for size in (32, 8):
        output = tmp_path / str(size)
        prepare(ImageFolder(path.parent, labelled=False), Options(output, resize=size), quiet=True)
        found = decode(members(output, "train")["a.png"], 1)
        expected = Image.fromarray(decode(path.read_bytes(), 1)[..., 0]).resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found[..., 0], expected)


def test_an_image_of_too_many_pixels_is_a_damaged_one(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.ppm").write_bytes(b"P6 20000 20000 255\n" + bytes(100))
    with pytest.raises(PrepareError, match=r"a\.ppm cannot be decoded .*178956970 pixels"):
        prepare(ImageFolder(tmp_path / "images", labelled=False), Options(tmp_path / "shards"), quiet=True)
    assert Image.MAX_IMAGE_PIXELS is not None  # importing changes nothing for others


@pytest.mark.process
def test_image_folder_by_folders_and_by_table(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for split, count in (("train", 4), ("val", 2)):
        for name in ("dog", "cat"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"x.{i}.jpeg").write_bytes(encode(picture(i)))
    data_prep("image_folder", "--folder", folder, "--output", tmp_path / "shards", "--resize", 24, "--quality", 90)
    found = members(tmp_path / "shards", "val")
    assert sorted(found) == sorted(f"{n}/x_{i}.{e}" for n in ("cat", "dog") for i in range(2) for e in ("cls", "jpg"))
    assert found["dog/x_1.cls"] == b"1" and Image.open(io.BytesIO(found["cat/x_0.jpg"])).size == (30, 24)
    index = ShardIndex.load(tmp_path / "shards")
    assert index.classes == ("cat", "dog") and index.samples("train") == 8

    table = tmp_path / "table.csv"
    table.write_text("path,label,split\ntrain/dog/x.1.jpeg,wolf,train\ntrain/cat/x.2.jpeg,lynx,test\n")
    data_prep("image_folder", "--folder", folder, "--csv", table, "--output", tmp_path / "table")
    assert members(tmp_path / "table", "test")["train/cat/x_2.cls"] == b"0"
    assert members(tmp_path / "table", "train")["dog/x_1.jpg"] == (folder / "train/dog/x.1.jpeg").read_bytes()
    assert ShardIndex.load(tmp_path / "table").classes == ("lynx", "wolf")
    table.write_text("path,label\ntrain/dog/none.jpeg,wolf\n")
    said = data_prep("image_folder", "--folder", folder, "--csv", table, "--output", tmp_path / "no", status=2)
    assert "table.csv, line 2: there is no" in said
    for rows, why in (
        ("train/dog/x.1.jpeg,wolf\n\ntrain/cat/x.2.jpeg,", r"line 4: train/cat/x\.2\.jpeg has no label, others have"),
        ("train/cat/x.2.jpeg\ntrain/dog/x.1.jpeg,wolf", r"line 2: train/cat/x\.2\.jpeg has no label, others have"),
    ):
        table.write_text(f"path,label\n{rows}\n")
        with pytest.raises(PrepareError, match=rf"table\.csv, {why}: give each row one, or none"):
            ImageFolder(folder, table=table).splits()
    table.write_text("path,label\ntrain/dog/x.1.jpeg,\ntrain/cat/x.2.jpeg,\n")
    prepare(ImageFolder(folder, table=table), Options(tmp_path / "unlabelled"), quiet=True)
    assert ShardIndex.load(tmp_path / "unlabelled").split("train").labels is None


def test_what_is_written_can_be_read(tmp_path: Path) -> None:
    """All formats that are taken."""
    (tmp_path / "images").mkdir()
    for extension in (*IMAGE_EXTENSIONS, "BMP"):
        picture_of = Image.fromarray(picture(0)).convert("L" if extension == "pgm" else "RGB")
        picture_of.save(tmp_path / "images" / f"{extension}_{len(extension)}.{extension}")
    prepare(ImageFolder(tmp_path / "images", labelled=False), Options(tmp_path / "shards"), quiet=True)
    dataset = ShardedDataset(ShardIndex.load(tmp_path / "shards"), "train", 3, CentreCrop(32, 32))
    assert len(dataset) == len(IMAGE_EXTENSIONS) + 1
    pixels, _ = dataset.read(np.arange(len(dataset)))
    assert (pixels.float().std(dim=(0, 2, 3, 4)) > 10).all()


@pytest.mark.process
def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    imagenet(tmp_path / "published")
    said = data_prep(
        "imagenet", *imagenet_arguments(tmp_path / "published"), "--output", tmp_path / "shards", "--dry-run"
    )
    assert "train: 21 images" in said and "3 classes: n01440764 tench" in said and "nothing was written" in said
    assert not (tmp_path / "shards").exists()


def many(folder: Path, count: int) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(encode(picture(i, 200, 200), "PNG"))
    return folder


@pytest.mark.process
@pytest.mark.parametrize("how,whom", [
    (signal.SIGINT, os.killpg), (signal.SIGKILL, os.killpg), (signal.SIGKILL, os.kill),
], ids=["interrupt", "kill", "kill the parent alone"])  # fmt: skip
def test_stopped_it_goes_on_where_it_was(
    tmp_path: Path, how: signal.Signals, whom: Callable[[int, signal.Signals], None]
) -> None:
    folder = many(tmp_path / "images", 60)
    prepare(ImageFolder(folder), Options(tmp_path / "whole", samples_per_shard=6, resize=180), quiet=True)
    output = tmp_path / "cut"
    arguments = ["--folder", folder, "--samples-per-shard", 6, "--processes", 2, "--resize", 180, "--output", output]
    command = [sys.executable, str(ROOT / "data_prep" / "image_folder.py"), *map(str, arguments)]
    # where the tests run in the background, a shell may have told them, and so their children, to ignore interrupts
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        end = time.monotonic() + 60
        while len(list(output.glob("train-*.tar"))) < 4 and time.monotonic() < end:
            time.sleep(0.002)
        whom(process.pid, how)
        said = process.communicate(timeout=30)[1]  # until no worker is left
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0 and not (output / "manifest.json").exists()
    assert how == signal.SIGKILL or ("finished shards are kept" in said and "Traceback" not in said)
    kept = {path.name: path.stat().st_mtime_ns for path in output.glob("train-*.tar")}
    known = {path.name.removesuffix(".json") for path in (output / ".shards").glob("*.json")}
    assert 3 <= len(known) < 20
    with pytest.raises(PrepareError, match=r"was begun with other settings \(options\)"):
        prepare(ImageFolder(folder), Options(output, samples_per_shard=6, resize=100), quiet=True)
    data_prep("image_folder", *arguments)
    for path in (tmp_path / "whole").iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes(), path.name
    assert all((output / name).stat().st_mtime_ns == kept[name] for name in known)
    assert sorted(path.name for path in output.iterdir()) == sorted(p.name for p in (tmp_path / "whole").iterdir())


def killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.process
def test_a_killed_process_is_one_line_that_says_what_to_do() -> None:
    with pytest.raises(PrepareError, match="a process was killed, for want of memory perhaps: try fewer --processes"):
        list(writer._run(killed, range(5), 2))


def test_two_preparations_do_not_write_to_one_folder(tmp_path: Path) -> None:
    source, output = ImageFolder(many(tmp_path / "images", 2)), tmp_path / "shards"
    writing = source.read

    def read(item: Item) -> bytes:
        with pytest.raises(PrepareError, match=f"another data preparation writes to {output}: let it finish"):
            prepare(ImageFolder(source.folder), Options(output), quiet=True)
        return writing(item)

    output.mkdir()
    (output / ".lock").touch()  # of one that was killed, as the next
    (output / ".plan.json.tmp").write_text("{")
    source.read = read  # type: ignore[method-assign]
    prepare(source, Options(output), quiet=True)
    assert sorted(p.name for p in output.iterdir()) == ["manifest.json", "train-000000.tar", "train.index.npz"]


@pytest.mark.process
def test_a_damaged_image_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    folder = many(tmp_path / "images", 3)
    content = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "1.png").write_bytes(content[: len(content) // 2])
    said = data_prep("image_folder", "--folder", folder, "--output", tmp_path / "shards", status=2)
    assert "a/1.png cannot be decoded" in said and "--skip-corrupt" in said
    assert not (tmp_path / "shards" / "manifest.json").exists()
    said = data_prep("image_folder", "--folder", folder, "--output", tmp_path / "new", "--skip-corrupt")
    assert "1 damaged images left out" in said
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert manifest["skipped"] == {"train": ["a/1"]} and manifest["splits"]["train"]["samples"] == 5
    assert "a/1.png" not in members(tmp_path / "new", "train")


def test_an_error_does_not_wait_for_the_archives_hash(tmp_path: Path) -> None:
    folder = many(tmp_path / "images", 1)
    (folder / "a" / "0.png").write_bytes((folder / "a" / "0.png").read_bytes()[:60])
    archive = tmp_path / "large"
    archive.touch()
    os.truncate(archive, 1 << 36)  # a minute's work; without room on the disk
    source = ImageFolder(folder)
    source.archives = lambda: [archive]  # type: ignore[method-assign]
    began = time.monotonic()
    with pytest.raises(PrepareError, match="cannot be decoded"):
        prepare(source, Options(tmp_path / "shards"), quiet=True)
    assert time.monotonic() - began < 10


@pytest.mark.process
def test_what_is_left_out_is_counted_by_split(tmp_path: Path) -> None:
    """Keys may be the same in two splits."""
    for split in ("train", "val"):
        many(tmp_path / "images" / split, 2)
    damaged = tmp_path / "images" / "train" / "a" / "1.png"
    damaged.write_bytes(damaged.read_bytes()[:-200])
    options = Options(tmp_path / "shards", samples_per_shard=1, skip_corrupt=True)
    prepare(ImageFolder(tmp_path / "images"), options, quiet=True)
    manifest = json.loads((tmp_path / "shards" / "manifest.json").read_text())
    assert manifest["skipped"] == {"train": ["a/1"]} and manifest["counts"] == {"train": [1, 2], "val": [2, 2]}
    assert check(tmp_path / "shards", decode=True, quiet=True) == []


def test_a_split_without_a_good_image_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        many(tmp_path / "images" / split, 1)
    for path in (tmp_path / "images" / "val").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-200])
    for _ in range(2):
        with pytest.raises(PrepareError, match="split 'val' has no image that can be decoded: fetch image folder"):
            prepare(ImageFolder(tmp_path / "images"), Options(tmp_path / "shards", skip_corrupt=True), quiet=True)
        assert not (tmp_path / "shards" / "manifest.json").exists()
    # as earlier versions wrote it
    write_manifest(tmp_path / "shards", {"val": Split((), np.array([], "S1"), {})}, source="", tool="")
    with pytest.raises(ValueError, match=r"val\.index\.npz is of a split without samples"):
        ShardIndex.load(tmp_path / "shards")


@pytest.mark.parametrize("where", ["a member", "behind the end"])
def test_an_archive_that_unpacks_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Three thousandths of its size on the disk."""
    cifar10(tmp_path)
    path = tmp_path / "cifar-10-binary.tar.gz"
    if where == "a member":
        with tarfile.open(path, "w:gz") as tar:
            add(tar, "cifar-10-batches-bin/data_batch_1.bin", bytes(40 << 20))
    else:
        path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(40 << 20)))
    monkeypatch.setattr(sources, "_UNPACKED", 1 << 20)
    tracemalloc.start()
    with pytest.raises(PrepareError, match="unpacks to more than"):
        CIFAR10(path).splits()
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("name", ["ILSVRC2012_devkit_t12.tar.gz", "cifar-10-python.tar.gz", "cifar-10-binary.tar.gz"])
def test_a_damaged_archive_is_to_be_fetched_again(tmp_path: Path, name: str) -> None:
    """Cut off, or with one bit flipped: in deflated data that may read as another file, or as none."""
    imagenet(tmp_path)
    cifar10(tmp_path)
    content = (tmp_path / name).read_bytes()
    path = tmp_path / "damaged.tar.gz"
    for place in np.linspace(50, len(content) - 5, 40).astype(int).tolist():  # gzip's header has the time, and a name
        flipped = bytearray(content)
        flipped[place] ^= 8
        for damaged in (content[:place], flipped):
            path.write_bytes(damaged)
            with pytest.raises(PrepareError, match=r"damaged\.tar\.gz is not a readable archive .*: fetch it again"):
                read_devkit(path) if name.startswith("ILSVRC") else CIFAR10(path).splits()


def test_a_cat_damaged_in_its_zip_may_be_left_out(tmp_path: Path) -> None:
    afhq(tmp_path)
    content = bytearray((tmp_path / "afhq.zip").read_bytes())
    with zipfile.ZipFile(tmp_path / "afhq.zip") as archive:
        start = archive.getinfo("afhq/train/cat/flickr_cat_000002.jpg").header_offset
    content[start + 30 + len("afhq/train/cat/flickr_cat_000002.jpg")] = 0xFF  # deflate knows no such block
    (tmp_path / "afhq.zip").write_bytes(content)
    with pytest.raises(PrepareError, match=r"flickr_cat_000002\.jpg cannot be decoded .* or fetch it again"):
        prepare(AFHQCat(tmp_path / "afhq.zip"), Options(tmp_path / "shards"), quiet=True)
    prepare(AFHQCat(tmp_path / "afhq.zip"), Options(tmp_path / "new", skip_corrupt=True), quiet=True)
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["skipped"] == {"train": ["flickr_cat_000002"]}


@pytest.mark.process
def test_check_finds_what_changed(tmp_path: Path) -> None:
    folder = many(tmp_path / "images", 3)
    output = tmp_path / "shards"
    data_prep("image_folder", "--folder", folder, "--output", output, "--samples-per-shard", 2)
    path = output / "train-000001.tar"
    content = bytearray(path.read_bytes())
    content[700] ^= 1
    path.write_bytes(content)
    assert (
        data_prep("check", output, status=1).splitlines()[0] == f"{path}: its SHA-256 is not the one in manifest.json"
    )
    path.write_bytes(content[:-512])
    assert f"{path} has" in data_prep("check", output, status=2)
    assert "has no manifest.json" in data_prep("check", folder, status=2)


@pytest.mark.process
def test_check_finds_an_index_of_other_shards(tmp_path: Path) -> None:
    """Shards and index as the manifest says, but not of each other."""
    output = tmp_path / "shards"
    prepare(ImageFolder(many(tmp_path / "images", 2)), Options(output), quiet=True)
    split = ShardIndex.load(output).split("train")
    told = {"source": "", "tool": ""}
    write_manifest(output, {"train": split}, **told)
    assert check(output, quiet=True) == []
    moved = {**split.offsets, "png": split.offsets["png"] + 512}
    renamed = np.array([b"other", *split.keys[1:]])
    without = {extension: table for extension, table in split.offsets.items() if extension != "cls"}
    for wrong in (
        Split(split.shards, split.keys, moved), Split(split.shards, renamed, split.offsets),
        Split(split.shards, split.keys, without),
    ):  # fmt: skip
        write_manifest(output, {"train": wrong}, **told)
        assert check(output, quiet=True) == [f"{output}: the index of split 'train' is not that of its shards"]


def test_refusals(tmp_path: Path) -> None:
    imagenet(tmp_path / "published")
    source = imagenet_source(tmp_path / "published")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("the only copy")
    with pytest.raises(PrepareError, match="mine exists and is not empty: name another folder"):
        prepare(source, Options(tmp_path / "mine"), quiet=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    for options in ({"samples_per_shard": -1}, {"processes": 0}, {"quality": 101, "resize": 8}, {"crop": True}):
        with pytest.raises(PrepareError):
            Options(tmp_path, **options)  # type: ignore[arg-type]
    swapped = ImageNet(source.val, source.train, source.devkit)
    with pytest.raises(PrepareError, match=r"ILSVRC2012_val_00000008\.JPEG, which is no class"):
        swapped.splits()
    with pytest.raises(PrepareError, match="not ILSVRC2012_devkit_t12"):
        ImageNet(source.train, source.val, source.val).splits()
    truncated = tmp_path / "truncated.tar"
    truncated.write_bytes(source.train.read_bytes()[:30_000])
    with pytest.raises(PrepareError, match=r"truncated\.tar"):
        ImageNet(truncated, source.val, source.devkit).splits()
    content = bytearray(source.train.read_bytes())
    damaged = tmp_path / "damaged.tar"
    with tarfile.open(source.train) as outer:  # tarfile by itself ends an archive at a damaged header, and says nothing
        first, last = outer.getmembers()[0], outer.getmembers()[-1]
        with tarfile.open(fileobj=outer.extractfile(first)) as inner:
            places = last.offset, first.offset_data + inner.getmembers()[-1].offset
    for place in places:
        content[place] ^= 1
        damaged.write_bytes(content)
        content[place] ^= 1
        with pytest.raises(PrepareError, match=r"damaged\.tar.*damaged or cut off at byte [\d,]+; fetch it again"):
            ImageNet(damaged, source.val, source.devkit).splits()
    with pytest.raises(PrepareError, match="is no folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(PrepareError, match="neither cifar-10-python"):
        CIFAR10(source.val).splits()
    twice = tmp_path / "twice"
    twice.mkdir()
    for name in ("a.png", "a.jpg"):
        (twice / name).write_bytes(encode(picture(0)))
    with pytest.raises(PrepareError, match="images outside of class folders: give --unlabelled"):
        ImageFolder(twice).splits()


def test_shards_end_at_a_number_of_samples_or_bytes(tmp_path: Path) -> None:
    folder = many(tmp_path / "images", 10)
    sizes = [path.stat().st_size for path in folder.rglob("*.png")]
    limit = 3 * max(sizes)
    prepare(ImageFolder(folder), Options(tmp_path / "bytes", bytes_per_shard=limit), quiet=True)
    index = ShardIndex.load(tmp_path / "bytes")
    table = index.split("train")
    assert len(table) == 20 and len(table.shards) >= 20 / (limit // min(sizes))
    for shard, end in zip(table.shards, table.ends, strict=True):
        assert table.images[end - shard.samples : end, 1].sum() <= limit
    prepare(ImageFolder(folder), Options(tmp_path / "samples", samples_per_shard=6), quiet=True)
    assert [s.samples for s in ShardIndex.load(tmp_path / "samples").split("train").shards] == [6, 6, 6, 2]
    assert json.loads((tmp_path / "bytes" / "manifest.json").read_text())["counts"] == {"train": [10, 10]}


def test_no_space_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = many(tmp_path / "images", 2)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(PrepareError, match=r"need about 0.\d GB, .* has 0.0 GB free"):
        prepare(ImageFolder(folder), Options(tmp_path / "shards"), quiet=True)
    assert not list((tmp_path / "shards").glob("*.tar"))


@pytest.mark.process
def test_what_is_complete_is_left_alone_and_checked(tmp_path: Path) -> None:
    folder = many(tmp_path / "images", 2)
    prepare(ImageFolder(folder), Options(tmp_path / "shards"), quiet=True)
    before = (tmp_path / "shards" / "train-000000.tar").stat().st_mtime_ns
    prepare(ImageFolder(folder), Options(tmp_path / "shards"), quiet=True)
    assert (tmp_path / "shards" / "train-000000.tar").stat().st_mtime_ns == before
    assert check(tmp_path / "shards", decode=True, quiet=True) == []
    with pytest.raises(PrepareError, match=r"was written with other settings \(options\)"):
        prepare(ImageFolder(folder), Options(tmp_path / "shards", seed=1), quiet=True)
