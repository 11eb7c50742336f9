"""Random small folders and tars of what people have: names, nesting, links, encodings, files that are broken."""

from __future__ import annotations

import io
import json
import os
import random
import tarfile
from pathlib import Path

from PIL import Image

from lzn_dist.data.index import ShardIndex, sample_of, scan_tar
from lzn_dist.prepare.image_folder import ImageFolder
from lzn_dist.prepare.writer import Options, PrepareError, prepare

NAMES = [
    "a", "B", "a.b", "x y", "#1", "~", "ü", "日本", "caf\udce9", "new\nline", "-rf", "'q'", "Thumbs", "IMG_0001", "0",
    "1", "10", "2", "...", "long" * 40, "._x", ".hidden", "e\u0301", "\xe9",
]  # fmt: skip
FOLDERS = [
    "cat", "dog", "train", "val", "Test", "validation", "0", "1", "10", "__MACOSX", ".ipynb_checkpoints", "@eaDir",
    "my cat", "caf\udce9", "a.b", "extra",
]  # fmt: skip
EXTENSIONS = [
    "",
    ".jpg",
    ".JPG",
    ".jpeg",
    ".jfif",
    ".png",
    ".gif",
    ".tif",
    ".webp",
    ".heic",
    ".txt",
    ".json",
    ".bmp",
    ".",
]
KINDS = ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"]


def picture(kind: str, shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5), (shade, 255 - shade, 7)).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {(kind, shade): picture(kind, shade) for kind in KINDS for shade in (0, 90, 200)}


def content(chance: random.Random) -> bytes:
    what = chance.random()
    whole = PICTURES[chance.choice(KINDS), chance.choice((0, 90, 200))]
    if what < 0.72:
        return whole
    if what < 0.80:
        return whole[: chance.randrange(len(whole))]
    if what < 0.86:
        place = chance.randrange(len(whole))
        return whole[:place] + bytes([whole[place] ^ (1 << chance.randrange(8))]) + whole[place + 1 :]
    return chance.choice([b"", b"a,b\n1,2\n", b"\0\0\0\x18ftypheic\0\0\0\0", b"{}", os.urandom(40), b"BM not a bitmap"])


def fill(folder: Path, chance: random.Random) -> int:
    """Make a folder; returns how many files and links that are not followed it holds at least."""
    places = [folder]
    for _ in range(chance.randrange(1, 7)):
        place = chance.choice(places[-3:]) / chance.choice(FOLDERS)
        place.mkdir(parents=True, exist_ok=True)
        places.append(place)
    for _ in range(chance.randrange(1, 14)):
        path = chance.choice(places) / (chance.choice(NAMES) + chance.choice(EXTENSIONS))
        if os.path.lexists(path):
            continue
        what = chance.random()
        if what < 0.06:
            path.symlink_to(chance.choice([folder, Path("nowhere"), chance.choice(places), Path("..")]))
        elif what < 0.08:
            os.mkfifo(path)
        else:
            path.write_bytes(content(chance))
    return sum(len(files) for _, _, files in os.walk(folder))


def check_folder(work: Path, seed: int) -> str:
    """Prepare a random folder, leaving out what is to be left out: written + left out = seen, whatever happens. Returns
    how it ended: written, or the refusal's first words."""
    chance = random.Random(seed)
    folder, output = work / "in", work / "out"
    folder.mkdir()
    files = fill(folder, chance)
    labelled = chance.random() < 0.7
    options = {
        "split_folders": chance.choice(["", "", "none"]),
        "allow_empty": chance.random() < 0.8,
        "max_left_out": 1.0,
    }
    source = ImageFolder(folder, labelled, exclude=output, **options)  # type: ignore[arg-type]
    try:
        prepare(source, Options(output, skip_corrupt=True), quiet=True)
    except PrepareError as error:
        assert "\n" not in str(error).replace("new\nline", "") and "Traceback" not in str(error), (seed, error)
        return str(error).replace(str(folder), "")[:40]
    account = source.account()
    index = ShardIndex.load(output)
    written = sum(len(split) for split in index.splits.values())
    assert written == account.taken, (seed, written, account)
    told = json.loads((output / "manifest.json").read_text())["account"]
    assert account.seen == told["taken"] + sum(count for count, _ in told["left_out"].values()), seed
    # os.walk counts links to folders as folders: what is seen besides are these, and what is behind them
    assert account.seen >= files, (seed, files, account)
    scanned = ShardIndex.scan(output)  # and every key survives in the tars
    for name, split in index.splits.items():
        assert list(scanned.split(name).keys) == list(split.keys), seed
    return "written"


def check_tar(work: Path, seed: int) -> None:
    """Read a random tar as a shard: members of samples + those passed over = files in it."""
    chance = random.Random(seed)
    path = work / "train-000000.tar"
    names = []
    with tarfile.open(path, "w") as tar:
        for _ in range(chance.randrange(12)):
            folders = [chance.choice([".", *FOLDERS]) for _ in range(chance.randrange(3))]
            name = "/".join([*folders, chance.choice(NAMES) + chance.choice([*EXTENSIONS, ".cls"])])
            member = tarfile.TarInfo(name)
            data = content(chance)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            names.append(name)
    keys = [key for key in map(sample_of, names) if key is not None]
    passed_over: list[str] = []
    try:
        found, members = scan_tar(path, passed_over)
    except ValueError as error:
        assert "two members are" in str(error) and len(set(keys)) < len(keys), (seed, error)
        return
    assert sum(map(len, members)) + len(passed_over) == len(names), seed
    assert sorted((key, part) for key, parts in zip(found, members, strict=True) for part in parts) == sorted(keys), (
        seed
    )


def damage(folder: Path, extension: str, row: int, split_name: str = "train") -> str:
    """Overwrite a member of a sample; returns what messages call the sample."""
    split = ShardIndex.load(folder).split(split_name)
    offset, size = split.offsets[extension][row].tolist()
    with open(folder / split.shard_of(row).name, "r+b") as file:
        file.seek(offset)
        file.write(b"?" * size)
    return f"{folder}/{split.shard_of(row).name}: sample {split.key(row)}"
